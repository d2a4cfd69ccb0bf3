"""Read given sequences through a KV cache, to evaluate the cache.

In a whole window attention never reads a cache. Here each window goes through a new cache, `step`
tokens at a time. Tokens of one call see each other's exact keys and values, and earlier tokens as
the cache stored them.

Source: Liu et al., "KIVI" (ICML 2024), section 3.
`generate.py` chooses each token; here all tokens are given.
"""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from qcourse.models.llama import Cache, Llama


class StreamingModel(nn.Module):
    """Llama that reads its ids through a new cache per call; for ``perplexity`` and ``agreement``.

    cache makes an empty cache, such as ``KVCache`` or ``partial(QuantizedKVCache, int4, int4)``.
    Raises TypeError if model is no Llama or cache no function, ValueError if step is below 1.

    >>> from qcourse.models.llama import KVCache, LlamaConfig, random_llama
    >>> model = random_llama(LlamaConfig(64, 32, 48, 2, 4, 2), seed=0)
    >>> ids = torch.tensor([[1, 2, 3, 4, 5], [6, 7, 8, 9, 10]])
    >>> torch.allclose(StreamingModel(model, KVCache)(ids), model(ids), atol=1e-5)
    True
    """

    def __init__(self, model: Any, cache: Any, *, step: int = 1) -> None:
        super().__init__()
        if not isinstance(model, Llama):
            raise TypeError(
                "model must be a Llama: only a Llama takes one of these caches,"
                f" got {type(model).__name__}"
            )
        # One cache for all windows would carry the tokens of one window to the next.
        if not callable(cache):
            raise TypeError(
                f"cache must be a function that makes an empty cache for each window, got {cache!r}"
            )
        if step < 1:
            raise ValueError(f"step={step} must be at least 1 token")
        self.model = model
        self.step = step
        self.cache: Callable[[], Cache] = cache
        self.config = model.config

    def forward(self, ids: Int[Tensor, "batch tokens"]) -> Float[Tensor, "batch tokens vocabulary"]:
        """Return the logits of the token after each id."""
        # Each call has its own cache, so no window sees another.
        cache = self.cache()
        parts = ids.split(self.step, dim=1)
        logits = [self.model(part, cache) for part in parts]
        return torch.cat(logits, dim=1)
