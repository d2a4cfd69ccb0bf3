"""Grades for a class.

`intake.py` finds what was handed in, `sandbox/` runs it, `grade_submission.py` gives the points,
and `recorder.py` keeps them in `book/`. `grade_class.py` is the whole run; `processes.py` and
`dask_cluster.py` are the two places where submissions are graded.
"""
