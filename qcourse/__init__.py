"""qcourse: quantization for inference, from the first rounding to a GPU kernel.

The public face. Each name is loaded on first use: `import qcourse` costs nothing, `qcourse.cost` works without torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from qcourse.checks import check as check
    from qcourse.methods.awq import awq as awq
    from qcourse.methods.gptq import gptq as gptq
    from qcourse.models.evaluate import perplexity as perplexity
    from qcourse.models.hub import load_hub as load_hub
    from qcourse.models.minilm import load_minilm as load_minilm
    from qcourse.models.quantize import quantize_model as quantize_model
    from qcourse.models.tinylm import load_tinylm as load_tinylm
    from qcourse.numerics.affine import IntQuantizer as IntQuantizer
    from qcourse.numerics.affine import fake_quantize as fake_quantize
    from qcourse.numerics.affine import integer_range as integer_range
    from qcourse.numerics.affine import quantize as quantize
    from qcourse.numerics.granularity import PerChannel as PerChannel
    from qcourse.numerics.granularity import PerGroup as PerGroup
    from qcourse.numerics.granularity import PerTensor as PerTensor
    from qcourse.numerics.packing import pack as pack
    from qcourse.numerics.packing import unpack as unpack
    from qcourse.numerics.quantized import QuantizedTensor as QuantizedTensor

_HOME = {
    "IntQuantizer": "qcourse.numerics.affine",
    "PerChannel": "qcourse.numerics.granularity",
    "PerGroup": "qcourse.numerics.granularity",
    "PerTensor": "qcourse.numerics.granularity",
    "QuantizedTensor": "qcourse.numerics.quantized",
    "awq": "qcourse.methods.awq",
    "check": "qcourse.checks",
    "fake_quantize": "qcourse.numerics.affine",
    "gptq": "qcourse.methods.gptq",
    "integer_range": "qcourse.numerics.affine",
    "load_hub": "qcourse.models.hub",
    "load_minilm": "qcourse.models.minilm",
    "load_tinylm": "qcourse.models.tinylm",
    "pack": "qcourse.numerics.packing",
    "perplexity": "qcourse.models.evaluate",
    "quantize": "qcourse.numerics.affine",
    "quantize_model": "qcourse.models.quantize",
    "unpack": "qcourse.numerics.packing",
}
__all__ = list(_HOME)


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module 'qcourse' has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
