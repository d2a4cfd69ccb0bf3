"""qcourse: quantization for inference, from the first rounding to a GPU kernel.

The public face: lessons, sheets and users import from here, whatever the rooms of the package are
called. `__init__.pyi` lists the names, for type checkers and for this file alike. Each is loaded
on first use, so `import qcourse` costs next to nothing and `qcourse.cost` works without torch.
"""

from difflib import get_close_matches

import lazy_loader

_load, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)


def __getattr__(name: str) -> object:
    try:
        return _load(name)
    except AttributeError:
        near = get_close_matches(name, __all__, n=1, cutoff=0.6)
        hint = f"; did you mean {near[0]!r}?" if near else f"; it has {', '.join(__all__)}"
        raise AttributeError(f"module 'qcourse' has no attribute {name!r}{hint}") from None
