"""Which names a cell takes and which it gives, so that an exercise can be run with only the cells that it needs.

The idea: the compiler's own table of symbols tells both without running anything. It is asked inside a worker all the
same, for a source can be made that crashes the compiler; `attempt.py` is who asks.
"""

import symtable
from collections.abc import Iterator


def used_and_defined(source: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The names that a cell looks up outside its functions, and those that it sets at its top level.

    >>> used_and_defined("import torch as t\\ndef f(x):\\n    y = helper(x)\\n    return t.round(y)")
    (('helper', 't'), ('f', 't'))
    """
    used: set[str] = set()
    defined: set[str] = set()
    for table in _tables(source):
        at_top = table.get_type() == "module"
        for symbol in table.get_symbols():
            if symbol.is_referenced() and (at_top or symbol.is_global()):
                used.add(symbol.get_name())
            if (symbol.is_assigned() or symbol.is_imported()) and (
                at_top or symbol.is_declared_global()
            ):
                defined.add(symbol.get_name())
    return tuple(sorted(used)), tuple(sorted(defined))


def _tables(source: str) -> Iterator[symtable.SymbolTable]:
    try:
        left = [symtable.symtable(source, "<cell>", "exec")]
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return  # it runs nowhere, so it takes and gives nothing
    while left:
        table = left.pop()
        yield table
        left += table.get_children()
