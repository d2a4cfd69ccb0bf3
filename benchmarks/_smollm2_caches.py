"""SmolLM2 with a KV cache of 8, 4 or 2 bits, as KIVI lays it out, for `agreement`, `perplexity`.

A key channel has one scale per 32 tokens. A value has one scale per 32 channels of its token. The
32 newest tokens stay in floats, and up to 31 older keys wait until their group is complete. Scales
are float16, zero points have the bits of the codes. KIVI itself keeps 32 or 128 tokens.

The windows are read 32 tokens per call. Keys would wait for their group of 32 in any case, so they
are those of a cache that is fed token by token. The values of one call also see each other exactly;
fed token by token, they would be codes up to 31 tokens sooner.

Source: Liu et al., "KIVI" (ICML 2024), sections 3 and 4.
"""

from collections.abc import Callable
from functools import partial

import torch

from qcourse import IntQuantizer, PerGroup, QuantizedKVCache, StreamingModel, kv_cache_bytes
from qcourse.models.llama import Llama

GROUP = 32
RESIDUAL = 32


def with_cache(model: Llama, bits: int, *, residual: int = RESIDUAL) -> StreamingModel:
    """Return the model, reading each window 32 tokens at a time through a new cache of `bits`."""
    per_group = PerGroup(GROUP)
    integers = IntQuantizer(bits, granularity=per_group, symmetric=False, scale_dtype=torch.float16)
    cache = partial(QuantizedKVCache, integers, integers, residual=residual)
    return StreamingModel(model, cache, step=GROUP)


def bits_per_number(bits: int, tokens: int, *, residual: int = RESIDUAL) -> float:
    """Return the bits per key or value in a cache of `tokens`: codes, scales, zeros, window.

    Keys that wait for their group are left out: they add less than 16 * 31 / 2 / tokens bits.
    """
    stored = {"bits": bits, "group_size": GROUP, "zero_bytes": bits / 8, "residual": residual}
    return 8 * kv_cache_bytes(1, 1, 1, tokens, **stored) / (2 * tokens)


CACHES: dict[str, Callable[[Llama], StreamingModel]] = {
    "KV cache 8 bits": partial(with_cache, bits=8),
    "KV cache 4 bits": partial(with_cache, bits=4),
    "KV cache 2 bits": partial(with_cache, bits=2),
}
