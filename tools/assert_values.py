"""An IPython extension for tools/portability.py: each assert of a lesson, with the values that it compared.

A bare `assert 0.7 < ratio` fails without a number. pytest rewrites asserts so that they name their values, failed or
passed; here the same rewriting is done to the cells of a kernel. What an assert decides stays as it was. The log holds
one JSON object per line: the values of one assert, or the modules of qcourse that are loaded after a cell.

Source: ``_pytest.assertion.rewrite``; IPython's documentation of ``ast_transformers``. Differs from nbval, which
judges a notebook: this only writes down what it saw.
"""

import ast
import json
import os
import sys
from types import SimpleNamespace

from _pytest.assertion import rewrite, util

LOG = "QCOURSE_ASSERT_LOG"
PASSES_TOO = SimpleNamespace(getini=lambda name: name == "enable_assertion_pass_hook")


class Rewriter(ast.NodeTransformer):
    """Rewrite the asserts of each cell, whose text `pre_run_cell` has left here."""

    def __init__(self, shell: object) -> None:
        self.shell = shell
        self.source = ""
        self.cell = -1  # nbval counts code cells from 0

    def pre_run_cell(self, info: object) -> None:
        """Keep the number and the text of the cell that runs next."""
        self.cell += 1
        self.source = self.shell.transform_cell(info.raw_cell)

    def visit(self, node: ast.AST) -> ast.AST:
        """Rewrite a whole cell; what pytest puts before it ends on the line where it begins."""
        rewrite.rewrite_asserts(node, self.source.encode(), config=PASSES_TOO)
        for each in ast.walk(node):
            if hasattr(each, "lineno") and getattr(each, "end_lineno", None) is None:
                each.end_lineno = each.lineno
                each.end_col_offset = each.col_offset
        return node


def load_ipython_extension(shell: object) -> None:
    """Install the rewriting in a kernel; IPython calls this at its start."""

    def write(**row: object) -> None:
        with open(os.environ[LOG], "a", encoding="utf-8") as file:
            file.write(json.dumps({"cell": rewriter.cell, **row}) + "\n")

    def passed(line: int, source: str, values: str) -> None:
        write(line=line, source=source, values=values)

    def loaded(result: object) -> None:
        files = [
            getattr(module, "__file__", None)
            for name, module in sys.modules.items()
            if name.startswith("qcourse")
        ]
        write(modules=sorted(filter(None, files)))

    rewriter = Rewriter(shell)
    util._assertion_pass = passed
    shell.ast_transformers.append(rewriter)
    shell.events.register("pre_run_cell", rewriter.pre_run_cell)
    shell.events.register("post_run_cell", loaded)
