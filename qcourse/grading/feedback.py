"""What a student reads: one HTML page per sheet, with points, reasons and the mistake by name.

The idea: a page is made of one student's scores and nothing else, so it cannot hold another's;
`grade_submission.py` leaves out expected values. A reason may hold what the student's own code
returned or raised, so every text is escaped. The page also tells the browser to run no script and
to load nothing. Points and comments set by a person replace the grader's.

nbgrader looks for the same files (feedback/STUDENT/SHEET/SHEET.html) when it returns feedback.
"""

from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

from qcourse.grading.book.results import write_changed
from qcourse.grading.book.scores import Score

# The color of a section: all points, some, none.
GOOD = "#2e9e4f"
PARTLY = "#c98a1b"
NONE = "#d0492f"
# The page may use its own style, and nothing else: no script, no image, no link to a file.
POLICY = "default-src 'none'; style-src 'unsafe-inline'"
STYLE = """\
body { font-family: sans-serif; line-height: 1.5; max-width: 48rem; margin: 2rem auto; \
padding: 0 1rem; color: #222; }
section { border-left: 4px solid; padding-left: 0.8rem; margin: 1.2rem 0; }
h1 { font-size: 1.4rem; }
h2 { font-size: 1rem; margin: 0; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; margin: 0.3rem 0 0; font-size: 0.9rem; }"""
PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<title>{title}</title>
<style>
{style}
</style>
</head>
<body>
<h1>{title}</h1>
<p>{student}: <strong>{points} of {worth} points</strong></p>
{whole}{sections}
</body>
</html>
"""
SECTION = """<section style="border-color: {color}">
<h2>{exercise}: {points} of {worth}{by}</h2>
{comment}</section>"""


def page(scores: Iterable[Score]) -> str:
    """Return the page of one student's scores on one sheet.

    Raises:
        ValueError: there are none, or they are not all of one student and one sheet.
    """
    scores = list(scores)
    owners = {(score.student, score.sheet) for score in scores}
    if len(owners) != 1:
        raise ValueError(f"scores must be of one student and one sheet, not of {sorted(owners)}")
    ((student, sheet),) = owners
    # "01_quantizer" is titled "Sheet 01: quantizer".
    number, _, name = sheet.partition("_")
    title = f"Sheet {number}: {name.replace('_', ' ')}"
    points = sum(score.points for score in scores)
    worth = sum(score.max_points for score in scores)

    # A comment on the whole notebook is shown once, at the top, instead of under each exercise.
    whole = _comment_on_all(scores)
    sections = [_section(score, "" if whole else score.comment) for score in scores]
    return PAGE.format(
        policy=POLICY,
        style=STYLE,
        title=escape(title),
        student=escape(student),
        points=_number(points),
        worth=_number(worth),
        whole=_paragraph(f"Your notebook {whole}.") if whole else "",
        sections="\n".join(sections),
    )


def write_feedback(folder: Path, scores: Iterable[Score]) -> list[Path]:
    """Write feedback/STUDENT/SHEET/SHEET.html for these scores; return the pages that changed.

    Raises:
        OSError: a page cannot be written.
    """
    pages: dict[tuple[str, str], list[Score]] = {}
    for score in sorted(scores, key=_page_order):
        pages.setdefault((score.student, score.sheet), []).append(score)

    changed: list[Path] = []
    for (student, sheet), own_scores in pages.items():
        path = folder / "feedback" / student / sheet / f"{sheet}.html"
        if write_changed(path, page(own_scores)):
            changed.append(path)
    return changed


def _page_order(score: Score) -> tuple[str, str, str]:
    return (score.student, score.sheet, score.exercise)


def _comment_on_all(scores: Sequence[Score]) -> str:
    """Return the one comment of a notebook that was not graded at all, else ""."""
    # The gradebook holds such a comment under every exercise of the sheet.
    comments = {score.comment.strip() for score in scores}
    if len(scores) == 1 or len(comments) != 1:
        return ""
    not_graded = all(score.review and not score.points for score in scores)
    return comments.pop() if not_graded else ""


def _paragraph(text: str) -> str:
    return f"<pre>{escape(text)}</pre>\n" if text else ""


def _section(score: Score, comment: str) -> str:
    return SECTION.format(
        color=_color(score),
        exercise=escape(score.exercise),
        points=_number(score.points),
        worth=_number(score.max_points),
        by=", set by a person" if score.manual else "",
        comment=_paragraph(comment.strip()),
    )


def _color(score: Score) -> str:
    if score.points >= score.max_points:
        return GOOD
    return PARTLY if score.points > 0 else NONE


def _number(points: float) -> str:
    """Return the points with at most two digits after the point: 3, 0.5, 0.67."""
    return f"{points:.2f}".rstrip("0").rstrip(".")
