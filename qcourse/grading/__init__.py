"""Floor 5: grades for a class.

`intake.py` reads what was handed in, `sandbox.py` runs it apart, `judge.py` gives points. `gradebook.py`, `feedback.py`
and `export.py` keep and show them; `grade.py` is the whole run, and `cluster.py` spreads it.
"""
