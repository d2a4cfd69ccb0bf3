"""A student's page: points, reasons, and nothing that is not theirs or would run."""

from html.parser import HTMLParser
from pathlib import Path

import pytest
from standins import SHEET

from qcourse.grading.book.scores import Score
from qcourse.grading.feedback import page, write_feedback


def score(student: str = "ada", exercise: str = "01.1", comment: str = "", **more: object) -> Score:
    values = {"points": 1.0, "max_points": 3.0, "manual": False, **more}
    return Score(
        student,
        SHEET,
        exercise,
        auto_points=1.0,
        review=False,
        comment=comment,
        auto_comment=comment,
        **values,
    )  # type: ignore[arg-type]


class Tags(HTMLParser):
    """The names of all tags and attributes of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.names: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.names |= {tag, *(name for name, _ in attrs)}


def test_points_reasons_and_who_decided() -> None:
    text = page(
        [score(comment="1 of 3 cases right"), score(exercise="01.2", points=2.5, manual=True)]
    )
    assert "<h1>Sheet 01: quantizer</h1>" in text
    assert "ada: <strong>3.5 of 6 points</strong>" in text
    assert "<h2>01.1: 1 of 3</h2>\n<pre>1 of 3 cases right</pre>" in text
    assert "<h2>01.2: 2.5 of 3, set by a person</h2>\n</section>" in text


def test_what_a_student_wrote_stays_text() -> None:
    plain = Tags(page([score()])).names
    evil = '<script>alert(1)</script><img src=x onerror="alert(2)">{points} </pre>'
    text = page([score(student='<b onload="x">', comment=evil)])
    assert Tags(text).names == plain | {"pre"}
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in text
    assert "{points}" in text
    assert "default-src 'none'" in text


def test_a_page_is_one_student_s() -> None:
    with pytest.raises(
        ValueError, match=r"scores must be of one student and one sheet, not of \[.*ada.*bob"
    ):
        page([score(), score("bob")])
    with pytest.raises(ValueError, match="scores must be of one student"):
        page([])


def test_pages_by_student_written_where_they_changed(tmp_path: Path) -> None:
    scores = [
        score("bob", comment="bob's own"),
        score("ada", comment="ada's own"),
        score("bob", "01.2"),
    ]
    paths = write_feedback(tmp_path, scores)
    assert [str(path.relative_to(tmp_path)) for path in paths] == [
        f"feedback/{name}/{SHEET}/{SHEET}.html" for name in ("ada", "bob")
    ]
    ada, bob = (path.read_text(encoding="utf-8") for path in paths)
    assert "ada" in ada
    assert "bob" not in ada
    assert "ada" not in bob
    assert write_feedback(tmp_path, scores) == []
    assert (
        write_feedback(tmp_path, [score("ada", points=2.0), score("bob"), score("bob", "01.2")])
        == paths
    )
