"""Floor 6: what notebooks show. Figures, widgets and verdicts, each a function that tests call too."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
