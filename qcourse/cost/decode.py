"""What a step of writing costs: one new token for each text of a batch, by the roofline.

The idea: for each step all weights are read once, whatever the batch, and the cache and the activations of every text.
Which of them is the larger part depends on the batch and on how long the texts are; bits shrink the first two.

Source: the arithmetic of decoding as in Pope et al., "Efficiently Scaling Transformer Inference" (MLSys 2023).

How it differs from ``roofline.py``: there one product, here a whole model's.
"""

from dataclasses import dataclass

from qcourse.cost.memory import bytes_per_parameter, kv_cache_bytes
from qcourse.cost.roofline import Device, Work, roofline


@dataclass(frozen=True)
class Model:
    """The sizes of a decoder that decide what a step costs.

    Args:
        parameters: of all linear layers, each used once a token.
        layers, kv_heads, head_dim: as ``kv_cache_bytes`` takes them.
        heads: query heads.
        activations: numbers that go into and come out of all linear layers for one token.

    >>> LLAMA_2_7B.parameters, LLAMA_2_7B.activations
    (6607077376, 2534656)
    """

    parameters: float
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
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
        """A Llama: q, k, v, o and three layers of the MLP in each block, and the head; norms left out.

        Args:
            intermediate: the MLP's inner size.
            vocabulary: the head's outputs.
        """
        size, kv = heads * head_dim, kv_heads * head_dim
        block = [(size, size)] * 2 + [(size, kv)] * 2 + [(size, intermediate)] * 3
        shapes = block * layers + [(size, vocabulary)]
        parameters, activations = sum(a * b for a, b in shapes), sum(a + b for a, b in shapes)
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
    """One new token for each of `batch` texts: all weights once, the cache and the activations of every text.

    Args:
        context: tokens of each text so far; attention reads the keys and values of all.
        bits, group_size: of the weights; kv_bits, kv_group_size: of the cache.
        activation_bytes: a number that goes into or comes out of a linear layer.

    Raises:
        ValueError: batch below 1, context below 0; what the sizes refuse.

    >>> round(decode_work(LLAMA_2_7B, bits=4, group_size=128).bytes / 1e9, 2)
    3.41
    """
    if batch < 1 or context < 0:
        raise ValueError(f"batch={batch!r} must be at least 1, context={context!r} 0 or more")
    shape = (model.layers, model.kv_heads, model.head_dim)
    cache = kv_cache_bytes(*shape, context, batch=batch, bits=kv_bits, group_size=kv_group_size)
    attention = (
        4.0 * batch * context * model.layers * model.heads * model.head_dim
    )  # q k, and the sum of values
    weights = model.parameters * bytes_per_parameter(bits, group_size)
    activations = batch * model.activations * activation_bytes
    return Work(weights + cache + activations, 2.0 * batch * model.parameters + attention)


def decode_time(
    model: Model, device: Device, *, dtype: str = "float16", **options: float | None
) -> float:
    """Seconds for one step of writing: the roofline of ``decode_work``, whose options these are.

    >>> toy = Device("a toy", bandwidth_bytes_per_s=1e12, peak_ops_per_s={"float16": 100e12})
    >>> round(1000 * decode_time(LLAMA_2_7B, toy), 2)  # in ms
    13.22
    """
    return roofline(decode_work(model, **options), device, dtype)  # type: ignore[arg-type]
