"""What an evaluation found: each measure, its standard error and its means per window.

A result keeps the samples of its windows, so that two models can be compared window by window.

Source: transformers' "Perplexity of fixed-length models"; llama.cpp's perplexity tool (KL, top-1).
`evaluate.py` makes these; `standard_error.py` has the formulas.
"""

import math
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from qcourse.models.standard_error import Estimate, Samples, exp_or_inf


class _WindowResult:
    """What ``Perplexity`` and ``Agreement`` derive from their nll and their samples."""

    nll: float
    samples: Samples | None

    @property
    def perplexity(self) -> float:
        """exp(nll), the number of equally likely tokens with the same nll; may be infinite."""
        return exp_or_inf(self.nll)

    @property
    def nll_error(self) -> float:
        """The standard error of nll; NaN for one window."""
        return self._error("nll")

    @property
    def perplexity_error(self) -> float:
        """perplexity * nll_error, by the delta method."""
        return self.perplexity * self.nll_error

    @property
    def tokens_per_window(self) -> Float[Tensor, " windows"]:
        """The tokens that each window predicts: the weights of its means."""
        return torch.empty(0) if self.samples is None else self.samples.weights

    @property
    def nll_per_window(self) -> Float[Tensor, " windows"]:
        """The mean nll of each window."""
        return self._means("nll")

    def _error(self, of: str) -> float:
        return math.nan if self.samples is None else self.samples.estimate(of).error

    def _means(self, of: str) -> Tensor:
        return torch.empty(0) if self.samples is None else self.samples.means(of)


@dataclass(frozen=True)
class Perplexity(_WindowResult):
    """Result of ``perplexity``. Other windows give other numbers."""

    nll: float  # mean of -log p, in nats per token
    tokens: int  # predicted tokens: all but the first
    context: int
    stride: int
    samples: Samples | None = field(default=None, repr=False, compare=False)

    def bits_per_byte(self, size_bytes: int) -> float:
        """Return nll * tokens / (ln 2 * size_bytes), for size_bytes >= 1 bytes of UTF-8 text.

        >>> Perplexity(nll=math.log(2), tokens=8, context=4, stride=4).bits_per_byte(4)
        2.0
        """
        return self.nll * bits_per_byte_of_nat(self.tokens, size_bytes)


@dataclass(frozen=True)
class Agreement(_WindowResult):
    """Result of ``agreement``: how close a model's predictions are to a reference's."""

    kl: float  # mean of KL(reference || model), in nats per token
    top1: float  # share of tokens with the same most likely prediction, 0 to 1
    tokens: int
    nll: float  # the model's own, as ``perplexity`` with stride = context finds it
    samples: Samples | None = field(default=None, repr=False, compare=False)

    @property
    def kl_error(self) -> float:
        """The standard error of kl; NaN for one window."""
        return self._error("kl")

    @property
    def top1_error(self) -> float:
        """The standard error of top1; NaN for one window."""
        return self._error("top1")

    @property
    def kl_per_window(self) -> Float[Tensor, " windows"]:
        """The mean KL divergence of each window."""
        return self._means("kl")

    @property
    def top1_per_window(self) -> Float[Tensor, " windows"]:
        """The share of equal top-1 tokens in each window."""
        return self._means("top1")


@dataclass(frozen=True)
class Evaluation:
    """Result of ``evaluate``: each measure with its standard error; None if it was not asked for.

    Printed, it is a table with one measure per line.
    """

    perplexity: Estimate
    nll: Estimate  # nats per token
    bits_per_byte: Estimate | None
    kl: Estimate | None  # nats per token
    top1: Estimate | None
    samples: Samples = field(repr=False, compare=False)

    def __str__(self) -> str:
        rows = {
            "perplexity": self.perplexity,
            "bits per byte": self.bits_per_byte,
            "KL divergence": self.kl,
            "same top-1": self.top1,
        }
        return "\n".join(f"{name:13}  {each}" for name, each in rows.items() if each is not None)


def bits_per_byte_of_nat(tokens: int, size_bytes: int) -> float:
    """Return tokens / (ln 2 * size_bytes), the bits per byte that one nat per token makes.

    >>> round(bits_per_byte_of_nat(10, 40), 4)
    0.3607
    """
    if size_bytes < 1:
        raise ValueError(f"size_bytes must be at least 1, got {size_bytes}")
    return tokens / math.log(2) / size_bytes
