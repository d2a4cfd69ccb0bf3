"""The commands for teachers: grade, feedback, export.

The idea: each command is a few lines around the part that does the work, and imports that part
only when it runs. An error that stops a command is one sentence, which `qcourse.cli` prints.
"""

import argparse
import os
from pathlib import Path

DATABASES = (
    "sqlite:///FILE or postgresql+psycopg2://... "
    "(default: $QCOURSE_DB, else gradebook.db in the results)"
)


def add_commands(commands: "argparse._SubParsersAction") -> None:
    """Put the three commands and their options on the command line."""
    grade_parser = commands.add_parser(
        "grade", help="grade submissions in a sandbox, and enter the points in a gradebook"
    )
    feedback_parser = commands.add_parser(
        "feedback", help="write the students' pages again, after points were changed by hand"
    )
    export_parser = commands.add_parser("export", help="the grades as a table")

    _add_grade_options(grade_parser)
    _add_export_options(export_parser)
    for parser in (feedback_parser, export_parser):
        parser.add_argument("graded", help="the folder that `qcourse grade` wrote")

    # A command line is visible to every user, so an address with a password comes from here.
    url = os.environ.get("QCOURSE_DB")
    for parser in (grade_parser, feedback_parser, export_parser):
        parser.add_argument("--sheet", help="the number of a sheet, such as 01 (default: all)")
        parser.add_argument("--db", help=DATABASES, default=url, metavar="URL")


def _add_grade_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("submitted", help="the folder with STUDENT/SHEET.ipynb")
    parser.add_argument(
        "--into", help="the folder of the results (default: graded, beside the submissions)"
    )
    where = parser.add_mutually_exclusive_group()
    where.add_argument(
        "--workers", type=int, help="processes on this machine (default: one per core)"
    )
    where.add_argument(
        "--scheduler",
        metavar="ADDRESS",
        help="tls://HOST:PORT of a Dask scheduler, whose workers grade",
    )
    parser.add_argument(
        "--unsafe", action="store_true", help="no sandbox: only for submissions that you have read"
    )
    parser.add_argument(
        "--regrade", action="store_true", help="grade again what has been graded, on new inputs"
    )


def _add_export_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--format", choices=("csv", "canvas", "moodle"), default="csv")
    parser.add_argument("--to", metavar="FILE", help="where to write it (default: the terminal)")


def grade(options: argparse.Namespace) -> int:
    """Grade a class; `RunSummary.exit_status` says what the number means."""
    from qcourse.grading.grade_class import Settings, grade_class

    submitted = Path(options.submitted)
    # Results are never written among the submissions.
    into = options.into or submitted.resolve().parent / "graded"
    settings = Settings(
        submitted,
        Path(into),
        sheet=options.sheet,
        url=options.db,
        workers=options.workers,
        scheduler=options.scheduler,
        unsafe=options.unsafe,
        regrade=options.regrade,
    )
    summary = grade_class(settings)
    print(summary)
    return summary.exit_status


def feedback(options: argparse.Namespace) -> int:
    """Write the students' pages from what the gradebook holds now."""
    from qcourse.grading.book.results import private_files
    from qcourse.grading.feedback import write_feedback

    folder = Path(options.graded)
    with private_files():
        _, scores = _people_and_scores(options)
        written = write_feedback(folder, scores)
    pages = "1 page" if len(written) == 1 else f"{len(written)} pages"
    print(f"{pages} written in {folder / 'feedback'}.")
    return 0


def export(options: argparse.Namespace) -> int:
    """Write the grades as a table, to a file or to the terminal."""
    from qcourse.grading.book.export import as_file
    from qcourse.grading.book.export import export as table
    from qcourse.grading.book.results import private_files, write

    everyone, scores = _people_and_scores(options)
    text = table(options.format, everyone, scores)
    if options.to:
        with private_files():
            write(Path(options.to), as_file(options.format, text))
    else:
        print(text, end="")
    return 0


def _people_and_scores(options: argparse.Namespace) -> tuple[list, list]:
    """Return everyone in the gradebook, and the scores of one sheet or all.

    Raises:
        FileNotFoundError: there is no gradebook.
        ValueError: the gradebook does not hold the sheet.
    """
    from qcourse.grading.book.export import people
    from qcourse.grading.book.gradebook import default_url, open_gradebook
    from qcourse.grading.book.scores import scores

    # Opening SQLite would make an empty gradebook in a folder that holds none.
    folder = Path(options.graded)
    if not options.db and not (folder / "gradebook.db").exists():
        raise FileNotFoundError(
            f"There is no gradebook.db in {options.graded}: name what `qcourse grade` wrote."
        )
    with open_gradebook(options.db or default_url(folder)) as book:
        # "1" means "01"; without a number, every sheet's name matches.
        number = options.sheet.zfill(2) if options.sheet else ""
        found = [score for score in scores(book) if score.sheet.startswith(number)]
        if options.sheet and not found:
            raise ValueError(f"sheet={options.sheet!r} has no grades in this gradebook")
        return people(book), found


COMMANDS = {"grade": grade, "feedback": feedback, "export": export}
