"""A language model that reads a text through a cache, as it would while writing, so that the cache can be judged.

The idea: ``perplexity`` gives a model whole windows, and attention then meets keys and values that no cache has held.
Here each window goes through a new cache, a step of tokens at a time, so a token sees those before it as the cache
kept them when its turn came. Windows of a batch go side by side: 2,048 tokens take as many steps as one window has.

Source: decoding as it is done everywhere, with the text given; Liu et al., "KIVI" (ICML 2024), section 3: tokens of one
call meet each other's keys and values as they are, so a whole text in one call would hide what the cache loses.

How it differs from ``generate.py``: there each token is chosen, here all are given.
"""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from qcourse.models.llama import Cache, Llama


class StreamingModel(nn.Module):
    """A Llama whose every call streams its ids through a new cache: for ``perplexity`` and ``agreement``.

    Args:
        model: a Llama, which reads the text.
        cache: makes an empty cache when it is called: ``KVCache``, or ``partial(QuantizedKVCache, int4, int4)``.
        step: tokens at a time. Tokens of one step meet each other's keys and values as they are.

    Raises:
        TypeError: model is no Llama; cache is no function (a cache itself would keep one window for the next).
        ValueError: step is below 1.

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
                f"model must be a Llama: only a Llama takes one of these caches, got {type(model).__name__}"
            )
        if not callable(cache):
            raise TypeError(
                f"cache must be a function that makes an empty cache for each window, got {cache!r}"
            )
        if step < 1:
            raise ValueError(f"step={step} must be at least 1 token")
        self.model, self.step = model, step
        self.cache: Callable[[], Cache] = cache
        self.config = model.config

    def forward(self, ids: Int[Tensor, "batch tokens"]) -> Float[Tensor, "batch tokens vocabulary"]:
        """Map token ids to the logits of the token that follows each."""
        cache = self.cache()
        return torch.cat([self.model(part, cache) for part in ids.split(self.step, dim=1)], dim=1)
