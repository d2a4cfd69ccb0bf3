"""The time of one decode step, one new token per sequence of a batch, by the roofline.

The idea: a step reads all weights once, and the KV cache and the activations of every sequence.
Source: Pope et al., "Efficiently Scaling Transformer Inference" (MLSys 2023).
How it differs from `roofline.py`: that has one product, this a whole model.
"""

from dataclasses import dataclass

from qcourse.cost.memory import bytes_per_parameter, kv_cache_bytes
from qcourse.cost.roofline import Device, Work, roofline


@dataclass(frozen=True)
class Model:
    """The sizes of a decoder that decide what a step costs."""

    # Of all linear layers; a token uses each of them once.
    parameters: float
    layers: int
    # Query heads; kv_heads is the number of key-value heads.
    heads: int
    kv_heads: int
    head_dim: int
    # Numbers that enter or leave the linear layers per token.
    activations: float = 0

    @classmethod
    def llama(
        cls,
        layers: int,
        heads: int,
        kv_heads: int,
        head_dim: int,
        *,
        intermediate: int,
        vocabulary: int,
    ) -> "Model":
        """Return the sizes of a Llama, norms left out; `intermediate` is the MLP's inner size."""
        size = heads * head_dim
        kv_size = kv_heads * head_dim
        # q and o, k and v, the three layers of the MLP; then the output head.
        block = [(size, size)] * 2 + [(size, kv_size)] * 2 + [(size, intermediate)] * 3
        shapes = block * layers + [(size, vocabulary)]
        parameters = 0
        activations = 0
        for inputs, outputs in shapes:
            parameters += inputs * outputs
            activations += inputs + outputs
        return cls(parameters, layers, heads, kv_heads, head_dim, activations)


LLAMA_2_7B = Model.llama(32, 32, 32, 128, intermediate=11008, vocabulary=32000)
LLAMA_2_70B = Model.llama(80, 64, 8, 128, intermediate=28672, vocabulary=32000)


def decode_work(
    model: Model,
    *,
    batch: int = 1,
    context: int = 1,
    bits: float = 16,
    group_size: float | None = None,
    kv_bits: float = 16,
    kv_group_size: float | None = None,
    activation_bytes: int = 2,
) -> Work:
    """Return the work of one new token for each of `batch` sequences of `context` tokens.

    >>> round(decode_work(LLAMA_2_7B, bits=4, group_size=128).bytes / 1e9, 2)
    3.41
    """
    if batch < 1 or context < 0:
        raise ValueError(f"batch={batch!r} must be at least 1, context={context!r} 0 or more")
    # Attention reads the keys and values of all tokens so far.
    shape = (model.layers, model.kv_heads, model.head_dim)
    cache = kv_cache_bytes(*shape, context, batch=batch, bits=kv_bits, group_size=kv_group_size)
    # Weights are read once, whatever the batch.
    weights = model.parameters * bytes_per_parameter(bits, group_size)
    activations = batch * model.activations * activation_bytes
    # Attention multiplies and adds twice per token and channel: q k, and the sum of values.
    attention = 4.0 * batch * context * model.layers * model.heads * model.head_dim
    linear = 2.0 * batch * model.parameters
    return Work(weights + cache + activations, linear + attention)


def decode_time(
    model: Model, device: Device, *, dtype: str = "float16", **options: float | None
) -> float:
    """Return the least seconds of a decode step: the roofline of `decode_work(model, **options)`.

    >>> toy = Device("a toy", bandwidth_bytes_per_s=1e12, peak_ops_per_s={"float16": 100e12})
    >>> round(1000 * decode_time(LLAMA_2_7B, toy), 2)  # in ms
    13.22
    """
    work = decode_work(model, **options)  # type: ignore[arg-type]
    return roofline(work, device, dtype)
