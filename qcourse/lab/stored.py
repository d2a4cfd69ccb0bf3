"""Results that the scripts in benchmarks/ measured and stored, for lessons to show.

How it differs from ``published.py``: that holds what others have published.
"""

import json
from typing import Any

from qcourse.course_files import find


def stored_results(name: str) -> dict[str, Any]:
    """Return what benchmarks/results/NAME.json holds: the rows, and where and when they were made.

    Raises FileNotFoundError if it is not there.

    >>> sorted(stored_results("gptq_cpu"))
    ['results', 'stamp']
    """
    path = find(f"benchmarks/results/{name}.json")
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found
