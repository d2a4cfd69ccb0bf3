"""The commands for teachers: grade, feedback, export.

The idea: each is a few lines around the part that does the work, which is imported only then; what stops a teacher
ends in one sentence, which `qcourse.cli` prints.
"""

import argparse
import os
from pathlib import Path


def add_commands(commands: "argparse._SubParsersAction") -> None:
    """Put the three commands and their options on the command line."""
    db = {"default": os.environ.get("QCOURSE_DB"), "metavar": "URL"}
    said = "sqlite:///FILE or postgresql+psycopg2://... (default: $QCOURSE_DB, else gradebook.db in the results)"
    one = commands.add_parser(
        "grade", help="grade submissions in a sandbox, and enter the points in a gradebook"
    )
    one.add_argument("submitted", help="the folder with STUDENT/SHEET.ipynb")
    one.add_argument(
        "--into", help="the folder of the results (default: graded, beside the submissions)"
    )
    where = one.add_mutually_exclusive_group()
    where.add_argument(
        "--workers", type=int, help="processes on this machine (default: one a core)"
    )
    where.add_argument(
        "--scheduler",
        metavar="ADDRESS",
        help="tls://HOST:PORT of a Dask scheduler, whose workers grade",
    )
    one.add_argument(
        "--unsafe", action="store_true", help="no sandbox: only for submissions that you have read"
    )
    one.add_argument(
        "--regrade", action="store_true", help="grade again what has been graded, on new inputs"
    )
    two = commands.add_parser(
        "feedback", help="write the students' pages again, after points were changed by hand"
    )
    three = commands.add_parser("export", help="the grades as a table")
    three.add_argument("--format", choices=("csv", "canvas", "moodle"), default="csv")
    three.add_argument("--to", metavar="FILE", help="where to write it (default: the terminal)")
    for command in (two, three):
        command.add_argument("graded", help="the folder that `qcourse grade` wrote")
    for command in (one, two, three):
        command.add_argument("--sheet", help="the number of a sheet, such as 01 (default: all)")
        command.add_argument("--db", help=said, **db)


def grade(options: argparse.Namespace) -> int:
    """Grade a class; `RunSummary.exit_status` says what the number means."""
    from qcourse.grading.grade_class import Settings, grade_class

    into = options.into or Path(options.submitted).resolve().parent / "graded"
    report = grade_class(
        Settings(
            Path(options.submitted),
            Path(into),
            sheet=options.sheet,
            url=options.db,
            workers=options.workers,
            scheduler=options.scheduler,
            unsafe=options.unsafe,
            regrade=options.regrade,
        )
    )
    print(report)
    return report.exit_status


def feedback(options: argparse.Namespace) -> int:
    """Write the students' pages from what the gradebook holds now."""
    from qcourse.grading.book.results import private_files
    from qcourse.grading.feedback import write_feedback

    with private_files():
        written = write_feedback(Path(options.graded), _held_scores(options)[1])
    pages = "1 page" if len(written) == 1 else f"{len(written)} pages"
    print(f"{pages} written in {Path(options.graded) / 'feedback'}.")
    return 0


def export(options: argparse.Namespace) -> int:
    """Write the grades as a table, to a file or to the terminal."""
    from qcourse.grading.book.export import as_file
    from qcourse.grading.book.export import export as table
    from qcourse.grading.book.results import private_files, write

    text = table(options.format, *_held_scores(options))
    if options.to:
        with private_files():
            write(Path(options.to), as_file(options.format, text))
    else:
        print(text, end="")
    return 0


def _held_scores(options: argparse.Namespace) -> tuple[list, list]:
    """Everyone in the gradebook, and the scores of one sheet or all.

    Raises:
        FileNotFoundError: there is no gradebook.
        ValueError: there is no such sheet in it.
    """
    from qcourse.grading.book.export import people
    from qcourse.grading.book.gradebook import default_url, open_gradebook
    from qcourse.grading.book.scores import scores

    if not options.db and not Path(options.graded, "gradebook.db").exists():
        raise FileNotFoundError(
            f"There is no gradebook.db in {options.graded}: name what `qcourse grade` wrote."
        )
    with open_gradebook(options.db or default_url(Path(options.graded))) as book:
        number = options.sheet.zfill(2) if options.sheet else ""
        found = [one for one in scores(book) if one.sheet.startswith(number)]
        if options.sheet and not found:
            raise ValueError(f"sheet={options.sheet!r} has no grades in this gradebook")
        return people(book), found


COMMANDS = {"grade": grade, "feedback": feedback, "export": export}
