"""An IPython extension for tools/portability.py: log each assert with the values it compared.

A bare `assert 0.7 < ratio` fails without a number. pytest rewrites asserts so that they name their
values, failed or passed; this does the same to the cells of a kernel. The outcome of an assert does
not change. The log holds one JSON object per line: the values of one assert, or the modules of
qcourse that are loaded after a cell.

Source: ``_pytest.assertion.rewrite``; IPython's documentation of ``ast_transformers``.

How it differs from nbval: that tests a notebook; this only records.
"""

import ast
import json
import os
import sys
from types import SimpleNamespace

from _pytest.assertion import rewrite, util

LOG = "QCOURSE_ASSERT_LOG"

# the one option of pytest's configuration that the rewriting reads: report passed asserts too
PASSES_TOO = SimpleNamespace(getini=lambda name: name == "enable_assertion_pass_hook")


class Rewriter(ast.NodeTransformer):
    """Rewrites the asserts of each cell, whose text `pre_run_cell` has stored here."""

    def __init__(self, shell: object) -> None:
        self.shell = shell
        self.source = ""
        # nbval counts code cells from 0
        self.cell = -1

    def pre_run_cell(self, info: object) -> None:
        """Store the number and the text of the cell that runs next."""
        self.cell += 1
        self.source = self.shell.transform_cell(info.raw_cell)

    def visit(self, node: ast.AST) -> ast.AST:
        """Rewrite the asserts of a whole cell."""
        rewrite.rewrite_asserts(node, self.source.encode(), config=PASSES_TOO)
        # pytest's new nodes have no end, which IPython needs: they end on their first line
        for each in ast.walk(node):
            if hasattr(each, "lineno") and getattr(each, "end_lineno", None) is None:
                each.end_lineno = each.lineno
                each.end_col_offset = each.col_offset
        return node


def load_ipython_extension(shell: object) -> None:
    """Install the rewriting in a kernel; IPython calls this when it starts."""
    rewriter = Rewriter(shell)

    def write(**row: object) -> None:
        # opened anew for each line, so that a dying kernel loses none
        line = json.dumps({"cell": rewriter.cell, **row})
        with open(os.environ[LOG], "a", encoding="utf-8") as file:
            file.write(line + "\n")

    def passed(line: int, source: str, values: str) -> None:
        write(line=line, source=source, values=values)

    def loaded(result: object) -> None:
        write(modules=loaded_files())

    # pytest's rewritten asserts call this after each pass
    util._assertion_pass = passed
    shell.ast_transformers.append(rewriter)
    shell.events.register("pre_run_cell", rewriter.pre_run_cell)
    shell.events.register("post_run_cell", loaded)


def loaded_files() -> list[str]:
    """Return the files of the loaded modules of qcourse."""
    files = []
    for name, module in sys.modules.items():
        path = getattr(module, "__file__", None)
        if name.startswith("qcourse") and path:
            files.append(path)
    return sorted(files)
