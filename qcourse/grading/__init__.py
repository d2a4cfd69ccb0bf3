"""Floor 5: grades for a class.

`intake.py` reads what was handed in, `host.py` runs it apart, `grade_submission.py` gives points. `gradebook.py`, `feedback.py`
and `export.py` keep and show them; `grade_class.py` is the whole run, and `cluster.py` spreads it.
"""
