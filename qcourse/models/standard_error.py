"""The standard error of a mean over windows or questions, and of the difference of two models.

Tokens of one window depend on each other, so the window is the unit: the error is that of a mean of
window totals, which may have different sizes. Two models that read the same windows share most of
their noise. The error of their paired difference is therefore far below the error of each mean.

Source: Miller 2024, "Adding error bars to evals": clustered errors (2.2), paired differences (4.2).
llama.cpp's perplexity tool prints +/- too, but treats all tokens as independent.
`evaluate.py` and `multiple_choice.py` measure the samples.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from jaxtyping import Float
from torch import Tensor

ERRORS = 2.0  # a distance of two standard errors covers 95% of a normal distribution


@dataclass(frozen=True)
class Estimate:
    """A mean and its standard error, which is NaN for a single sample.

    >>> print(Estimate(13.0712, 0.4107))
    13.07 ± 0.41
    >>> f"{Estimate(13.0712, 0.4107):.1f}"
    '13.1 ± 0.4'
    >>> f"{Estimate(0.715, 0.032):+.1%}"
    '+71.5% ± 3.2%'
    """

    mean: float
    error: float

    def exceeds_noise(self, errors: float = ERRORS) -> bool:
        """Return |mean| > errors * error; False if the error is unknown.

        >>> Estimate(0.5, 0.2).exceeds_noise(), Estimate(0.5, 0.3).exceeds_noise()
        (True, False)
        """
        return abs(self.mean) > errors * self.error

    def scaled(self, factor: float) -> "Estimate":
        """Return mean and error times factor >= 0."""
        return Estimate(self.mean * factor, self.error * factor)

    def exponential(self) -> "Estimate":
        """Return exp(mean) with the error exp(mean) * error (delta method).

        >>> print(Estimate(math.log(20), 0.05).exponential())
        20.0 ± 1.0
        """
        mean = exp_or_inf(self.mean)
        return Estimate(mean, mean * self.error)

    def __str__(self) -> str:
        if not (math.isfinite(self.error) and self.error > 0):
            return f"{self.mean:.4g} ± {self.error:.2g}"
        # Two significant digits of the error, and as many decimals of the mean.
        rounded = float(f"{self.error:.1e}")
        magnitude = math.floor(math.log10(rounded))
        decimals = max(0, 1 - magnitude)
        return format(self, f",.{decimals}f")

    def __format__(self, spec: str) -> str:
        # A sign, as in "+.1f", is the mean's: the error has none.
        unsigned = spec.lstrip("+")
        return f"{self.mean:{spec}} ± {self.error:{unsigned}}" if spec else str(self)


@dataclass(frozen=True, eq=False)
class Samples:
    """What an evaluation measured: one total per measure and window (or question).

    key names the windows or questions: only results with one key can be paired. weights are the
    predicted tokens of each window, or ones.
    """

    key: str
    weights: Float[Tensor, " samples"]
    totals: Mapping[str, Float[Tensor, " samples"]]

    def estimate(self, of: str) -> Estimate:
        """Return the mean of a measure and its error, as ``ratio_estimate``."""
        return ratio_estimate(self.totals[of], self.weights)

    def means(self, of: str) -> Float[Tensor, " samples"]:
        """Return the mean of a measure in each window."""
        return self.totals[of] / self.weights


@runtime_checkable
class Measured(Protocol):
    """A result that keeps its samples, such as ``Perplexity`` or ``Accuracy``."""

    @property
    def samples(self) -> Samples | None: ...


def ratio_estimate(
    totals: Float[Tensor, " samples"], weights: Float[Tensor, " samples"]
) -> Estimate:
    """Return m = sum t / sum n, with the error sqrt(K / (K - 1) sum (t_i - n_i m)^2) / sum n.

    For K windows of one length this is the sample standard deviation of their means / sqrt(K).

    Args:
        totals: t, the sum of a measure over the n tokens of each window.
        weights: n, in tokens.

    >>> import torch
    >>> print(ratio_estimate(torch.tensor([1.0, 2.0, 3.0]), torch.ones(3)))
    2.00 ± 0.58
    """
    t = totals.double()
    n = weights.double()
    size = float(n.sum())
    mean = float(t.sum()) / size
    count = len(t)
    if count < 2:
        return Estimate(mean, math.nan)

    # What each window moves the total away from its expectation.
    residuals = t - n * mean
    variance = count / (count - 1) * float(residuals.square().sum())
    return Estimate(mean, math.sqrt(variance) / size)


def paired_difference(a: Measured, b: Measured, of: str | None = None) -> Estimate:
    """Return mean(a) - mean(b) and its error, from the differences on each window or question.

    Args:
        of: "nll", "kl", "top1", "accuracy" or "margin"; by default what both measure first, which
            is the nll or the accuracy.

    Raises:
        ValueError: a and b come from other windows or questions, or did not measure it.

    >>> import torch
    >>> one = torch.ones(3)
    >>> a = Samples("text", one, {"nll": torch.tensor([1.0, 2.0, 3.0])})
    >>> b = Samples("text", one, {"nll": torch.tensor([1.1, 2.0, 3.2])})
    >>> from types import SimpleNamespace as Result
    >>> print(paired_difference(Result(samples=a), Result(samples=b)))
    -0.100 ± 0.058
    """
    left = _samples(a, "a")
    right = _samples(b, "b")
    if left.key != right.key:
        raise ValueError(
            "a and b must come from the same windows or questions to be paired, got"
            f" {len(left.weights)} and {len(right.weights)} that differ; evaluate both models on"
            " the same tokens with the same context and stride"
        )
    name = of or next(iter(left.totals))
    shared = [each for each in left.totals if each in right.totals]
    if name not in shared:
        raise ValueError(f"of must be a measure of both, one of {shared}, got {name!r}")
    difference = left.totals[name] - right.totals[name]
    return ratio_estimate(difference, left.weights)


def perplexity_change(a: Measured, b: Measured) -> Estimate:
    """Return 100 (perplexity(a) / perplexity(b) - 1) in percent, with its paired error.

    The ratio is exp(d) for the paired difference d of the nll; its error is exp(d) * error(d).
    Raises ValueError as ``paired_difference``.
    """
    ratio = paired_difference(a, b, "nll").exponential()
    return Estimate(100 * (ratio.mean - 1), 100 * ratio.error)


def exp_or_inf(x: float) -> float:
    """Return exp(x), infinity where it overflows."""
    try:
        return math.exp(x)
    except OverflowError:
        return math.inf


def _samples(result: Measured, name: str) -> Samples:
    if result.samples is None:
        raise ValueError(
            f"{name} must keep its samples, as perplexity, agreement, evaluate and accuracy"
            f" return it, got {result!r}"
        )
    return result.samples
