"""The numbers and the words that the widgets show.

How it differs from ``widgets.py``: these are pure functions of a widget's settings.
"""

import math
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from qcourse.cost.decode import LLAMA_2_7B, LLAMA_2_70B, decode_work
from qcourse.cost.devices import DEVICES
from qcourse.cost.memory import bytes_per_parameter
from qcourse.numerics.affine import quantize
from qcourse.numerics.metrics import code_entropy, relative_error
from qcourse.numerics.minifloat import FloatFormat, code_values

MODELS = {"Llama-2-7B": LLAMA_2_7B, "Llama-2-70B": LLAMA_2_70B}
GROUP_SIZE = 128


def step_parts(*, model: str, bits: int, batch: int, context: int, device: str) -> dict[str, float]:
    """Return the seconds of a decoding step: of its weights, cache, activations and operations."""
    sizes = MODELS[model]
    on = DEVICES[device]
    group_size = GROUP_SIZE if bits < 16 else None
    work = partial(decode_work, sizes, batch=batch, bits=bits, group_size=group_size)

    # a step without any context reads no cache, so the difference is the cache
    without_context = work(context=0)
    whole = work(context=context)
    weight_bytes = sizes.parameters * bytes_per_parameter(bits, group_size)
    cache_bytes = whole.bytes - without_context.bytes
    activation_bytes = without_context.bytes - weight_bytes

    # each kind of bytes at full bandwidth, the operations at the peak rate
    bandwidth = on.bandwidth_bytes_per_s
    return {
        "weights": weight_bytes / bandwidth,
        "cache": cache_bytes / bandwidth,
        "activations": activation_bytes / bandwidth,
        "operations": whole.operations / on.peak("float16"),
    }


def step_readout(*, model: str, bits: int, batch: int, context: int, device: str) -> str:
    """Return the words of `time_a_step`: time, bottleneck, tokens per second, memory needed.

    >>> step_readout(model="Llama-2-7B", bits=4, batch=1, context=512, device="NVIDIA A10")
    '6.1 ms a step, bound by memory (weights 93%, cache 7%) · 163 tokens a second · 3.7 GB of 24 GB'
    """
    parts = step_parts(model=model, bits=bits, batch=batch, context=context, device=device)
    on = DEVICES[device]

    # the slower of the two sets the time of the step
    operations_s = parts["operations"]
    memory_s = sum(parts.values()) - operations_s
    step_s = max(memory_s, operations_s)
    if memory_s >= operations_s:
        weights_share = parts["weights"] / memory_s
        cache_share = parts["cache"] / memory_s
        bound = f"memory (weights {weights_share:.0%}, cache {cache_share:.0%})"
    else:
        bound = "its multipliers"

    # back from seconds to bytes
    needed = (parts["weights"] + parts["cache"]) * on.bandwidth_bytes_per_s
    available = on.memory_bytes or math.inf
    room = f"{needed / 1e9:.1f} GB of {available / 1e9:g} GB"
    if needed > available:
        room += ": it does not fit"

    time = f"{1000 * step_s:,.1f} ms a step, bound by {bound}"
    rate = f"{batch / step_s:,.0f} tokens a second"
    return f"{time} · {rate} · {room}"


def float_readout(code: int, format: FloatFormat) -> str:
    """Return the words of `click_the_bits`: the code, its fields, and the number.

    >>> from qcourse.numerics.minifloat import E4M3
    >>> float_readout(0b0_0111_100, E4M3), float_readout(0b1_0000_001, E4M3)
    ('code 60 · + 2^(7 - 7) · (1 + 4/8) = 1.5', 'code 129 · - 2^(1 - 7) · 1/8 = -0.00195312')
    >>> float_readout(0x7F, E4M3)
    'code 127 · above the largest number of E4M3: NaN'
    """
    value = float(code_values(format)[code])
    if not math.isfinite(value):
        name = "NaN" if math.isnan(value) else "infinity"
        return f"code {code} · above the largest number of {format}: {name}"

    # split the code into sign, exponent and mantissa
    sign_bit = code >> (format.bits - 1)
    sign = "-" if format.signed and sign_bit else "+"
    unsigned_bits = format.exponent_bits + format.mantissa_bits
    magnitude = code & ((1 << unsigned_bits) - 1)
    steps = 1 << format.mantissa_bits
    exponent, mantissa = divmod(magnitude, steps)

    # exponent 0 marks the subnormal numbers, which have no leading 1
    if exponent == 0:
        product = f"2^(1 - {format.bias}) · {mantissa}/{steps}"
    else:
        product = f"2^({exponent} - {format.bias}) · (1 + {mantissa}/{steps})"
    return f"code {code} · {sign} {product} = {value:g}"


def grid_readout(
    weights: Float[Tensor, " count"], *, bits: int, symmetric: bool, outlier: float
) -> str:
    """Return the words of `watch_the_grid`: step, codes in use, their entropy, the error.

    >>> weights = torch.tensor([-0.5, 0.25, 0.5])
    >>> words = grid_readout(weights, bits=4, symmetric=True, outlier=3.5)
    >>> print(words.replace(" · ", "\\n"))
    step 0.5
    3 of 16 codes in use by the ordinary weights, entropy 1.58 bits of 4
    their relative error 0.333
    """
    with_outlier = torch.cat([weights, weights.new_tensor([outlier])])
    quantized = quantize(with_outlier, bits, symmetric=symmetric)

    # the outlier only sets the scale: the rest is about the ordinary weights
    codes = quantized.codes[:-1]
    w_hat = quantized.dequantize()[:-1]
    used = len(codes.unique())
    entropy = code_entropy(codes)
    error = relative_error(weights, w_hat)
    return (
        f"step {quantized.scale.item():.3g} · "
        f"{used} of {1 << bits} codes in use by the ordinary weights, "
        f"entropy {entropy:.2f} bits of {bits} · their relative error {error:.3f}"
    )
