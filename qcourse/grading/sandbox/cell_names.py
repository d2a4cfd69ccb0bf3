"""Which names a cell uses and defines, so an exercise runs with only the cells that it needs.

The idea: the compiler's own symbol table tells both without running anything. It is still asked
inside a worker, because some sources crash the compiler; `attempt.py` is what asks.
"""

import symtable
from collections.abc import Iterator


def used_and_defined(source: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the names that a cell takes from other cells, and those it sets at its top level.

    >>> used_and_defined("import math as m\\ndef f(x):\\n    y = helper(x)\\n    return m.ceil(y)")
    (('helper', 'm'), ('f', 'm'))
    """
    used: set[str] = set()
    defined: set[str] = set()
    for table in _tables(source):
        at_top = table.get_type() == "module"
        for symbol in table.get_symbols():
            name = symbol.get_name()
            # A name counts inside a function only if it is not local to it.
            if symbol.is_referenced() and (at_top or symbol.is_global()):
                used.add(name)
            is_set = symbol.is_assigned() or symbol.is_imported()
            if is_set and (at_top or symbol.is_declared_global()):
                defined.add(name)
    return tuple(sorted(used)), tuple(sorted(defined))


def _tables(source: str) -> Iterator[symtable.SymbolTable]:
    """Yield the symbol table of the cell, and of each function and class in it."""
    try:
        left = [symtable.symtable(source, "<cell>", "exec")]
    # A source that does not compile runs nowhere, so it uses and defines nothing.
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return
    while left:
        table = left.pop()
        yield table
        left += table.get_children()
