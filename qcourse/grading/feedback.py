"""What a student reads: one HTML page a sheet, with points, reasons and the mistake by name.

The idea: a page is made of one student's scores and nothing else, so it cannot hold another's; expected values never
come this far (`grade_submission.py` leaves them out). What the student's own code returned or raised may stand in a reason, so
every text is escaped, and the page tells the browser to run no script and to load nothing.

Where a person has decided, their points and their comment stand. nbgrader looks for the same files
(feedback/STUDENT/SHEET/SHEET.html) when it hands feedback back.
"""

from collections.abc import Iterable, Sequence
from html import escape
from itertools import groupby
from pathlib import Path

from qcourse.grading.book.results import write_changed
from qcourse.grading.book.scores import Score

GOOD, PARTLY, NONE = "#2e9e4f", "#c98a1b", "#d0492f"
PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>{title}</title>
<style>
body {{ font-family: sans-serif; line-height: 1.5; max-width: 48rem; margin: 2rem auto; padding: 0 1rem; color: #222; }}
section {{ border-left: 4px solid; padding-left: 0.8rem; margin: 1.2rem 0; }}
h1 {{ font-size: 1.4rem; }}
h2 {{ font-size: 1rem; margin: 0; }}
pre {{ white-space: pre-wrap; overflow-wrap: anywhere; margin: 0.3rem 0 0; font-size: 0.9rem; }}
</style>
</head>
<body>
<h1>{title}</h1>
<p>{student}: <strong>{points} of {worth} points</strong></p>
{whole}{sections}
</body>
</html>
"""
SECTION = '<section style="border-color: {colour}">\n<h2>{exercise}: {points} of {worth}{by}</h2>\n{comment}</section>'


def page(scores: Iterable[Score]) -> str:
    """The page of one student's scores on one sheet.

    Raises:
        ValueError: there are none, or they are not all of one student and one sheet.
    """
    scores = list(scores)
    whose = {(score.student, score.sheet) for score in scores}
    if len(whose) != 1:
        raise ValueError(f"scores must be of one student and one sheet, not of {sorted(whose)}")
    ((student, sheet),) = whose
    number, _, name = sheet.partition("_")
    whole = _comment_of_all(scores)
    return PAGE.format(
        title=escape(f"Sheet {number}: {name.replace('_', ' ')}"),
        student=escape(student),
        points=_number(sum(score.points for score in scores)),
        worth=_number(sum(score.max_points for score in scores)),
        whole=_paragraph(f"Your notebook {whole}.") if whole else "",
        sections="\n".join(_section(score, "" if whole else score.comment) for score in scores),
    )


def write_feedback(folder: Path, scores: Iterable[Score]) -> list[Path]:
    """Write feedback/STUDENT/SHEET/SHEET.html for each student and sheet in these scores; returns what has changed.

    Raises:
        OSError: a page cannot be written.
    """
    paths = []
    by_page = sorted(scores, key=lambda score: (score.student, score.sheet, score.exercise))
    for (student, sheet), group in groupby(by_page, key=lambda score: (score.student, score.sheet)):
        path, text = folder / "feedback" / student / sheet / f"{sheet}.html", page(group)
        if write_changed(path, text):
            paths.append(path)
    return paths


def _comment_of_all(scores: Sequence[Score]) -> str:
    """The one comment of a notebook that was not graded at all: it stands under every exercise in the gradebook."""
    comments = {score.comment.strip() for score in scores}
    not_graded = (
        len(scores) > 1
        and len(comments) == 1
        and all(score.review and not score.points for score in scores)
    )
    return comments.pop() if not_graded else ""


def _paragraph(text: str) -> str:
    return f"<pre>{escape(text)}</pre>\n" if text else ""


def _section(score: Score, comment: str) -> str:
    colour = GOOD if score.points >= score.max_points else PARTLY if score.points > 0 else NONE
    return SECTION.format(
        colour=colour,
        exercise=escape(score.exercise),
        points=_number(score.points),
        worth=_number(score.max_points),
        by=", set by a person" if score.manual else "",
        comment=_paragraph(comment.strip()),
    )


def _number(points: float) -> str:
    return f"{points:.2f}".rstrip("0").rstrip(".")
