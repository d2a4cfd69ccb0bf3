"""The error of a mean equals hand computations, a bootstrap and its own definition: coverage."""

import math
from dataclasses import dataclass
from statistics import stdev

import pytest
import torch
from torch import Tensor

from qcourse.models.standard_error import (
    Estimate,
    Samples,
    paired_difference,
    perplexity_change,
    ratio_estimate,
)


@dataclass(frozen=True)
class Result:
    samples: Samples | None


def result(totals: Tensor, weights: Tensor | None = None, key: str = "text") -> Result:
    weights = torch.ones(len(totals)) if weights is None else weights
    return Result(Samples(key, weights, {"nll": totals}))


def test_windows_of_one_length_have_the_textbook_error() -> None:
    means = [2.0, 3.5, 3.0, 4.5]
    found = ratio_estimate(8 * torch.tensor(means), torch.full((4,), 8.0))
    assert found.mean == 3.25
    assert found.error == pytest.approx(stdev(means) / math.sqrt(4))


def test_a_shorter_window_counts_by_its_tokens() -> None:
    # totals 8, 12, 5 of 4, 4, 2 tokens: m = 25 / 10; residuals 8 - 10, 12 - 10, 5 - 5.
    found = ratio_estimate(torch.tensor([8.0, 12.0, 5.0]), torch.tensor([4.0, 4.0, 2.0]))
    assert found.mean == 2.5
    assert found.error == pytest.approx(math.sqrt(3 / 2 * (4 + 4 + 0)) / 10)


def test_one_window_has_no_error() -> None:
    found = ratio_estimate(torch.tensor([8.0]), torch.tensor([4.0]))
    assert found.mean == 2
    assert math.isnan(found.error)
    assert not found.exceeds_noise()
    assert str(found) == "2 ± nan"


def test_a_bootstrap_over_windows_agrees() -> None:
    generator = torch.Generator().manual_seed(0)
    count = 60
    weights = torch.randint(20, 64, (count,), generator=generator).double()
    totals = weights * (3 + torch.randn(count, generator=generator).double())
    drawn = torch.randint(count, (20_000, count), generator=generator)
    means = totals[drawn].sum(1) / weights[drawn].sum(1)
    # A bootstrap of 20,000 has a noise of 0.5%; it lacks the factor K / (K - 1), here 0.8%.
    assert ratio_estimate(totals, weights).error == pytest.approx(float(means.std()), rel=0.04)


def test_two_errors_cover_95_percent() -> None:
    generator = torch.Generator().manual_seed(1)
    runs = 2000
    count = 32
    weights = torch.full((count,), 100.0)
    weights[-1] = 40
    covered = 0
    for _ in range(runs):
        # A window's tokens share a shift, so errors over tokens would be far too small.
        noise = torch.randn(count, generator=generator)
        found = ratio_estimate(weights * (3 + noise), weights)
        covered += abs(found.mean - 3) < 2 * found.error
    # t with 31 degrees of freedom: 94.6% within 2. Three standard deviations of a share: 1.5%.
    assert 0.93 < covered / runs < 0.965


def test_the_paired_error_is_that_of_the_differences() -> None:
    generator = torch.Generator().manual_seed(2)
    text = torch.randn(16, generator=generator).double()
    a = result(3 + text)
    b = result(3.1 + text + 0.05 * torch.randn(16, generator=generator).double())
    found = paired_difference(a, b)
    differences = a.samples.totals["nll"] - b.samples.totals["nll"]  # type: ignore[union-attr]
    assert found.mean == pytest.approx(float(differences.mean()))
    assert found.error == pytest.approx(stdev(differences.tolist()) / 4)

    errors = [each.samples.estimate("nll").error for each in (a, b)]  # type: ignore[union-attr]
    assert found.error < math.hypot(*errors) / 10
    assert found.exceeds_noise()
    assert paired_difference(b, a).mean == -found.mean
    assert paired_difference(a, a) == Estimate(0.0, 0.0)


def test_a_change_of_perplexity_is_a_ratio_with_its_paired_error() -> None:
    a = result(torch.tensor([1.1, 2.3, 3.2]))
    b = result(torch.tensor([1.0, 2.0, 3.0]))
    found = perplexity_change(a, b)
    assert found.mean == pytest.approx(100 * (math.exp(2.2) / math.exp(2.0) - 1))
    assert found.error == pytest.approx(
        100 * math.exp(0.2) * stdev([0.1, 0.3, 0.2]) / math.sqrt(3), rel=1e-5
    )


def test_what_cannot_be_paired_is_refused() -> None:
    a = result(torch.ones(3))
    with pytest.raises(ValueError, match=r"the same windows or questions.* got 3 and 3 that"):
        paired_difference(a, result(torch.ones(3), key="another text"))
    with pytest.raises(ValueError, match=r"one of \['nll'\], got 'kl'"):
        paired_difference(a, a, "kl")
    with pytest.raises(ValueError, match="b must keep its samples"):
        paired_difference(a, Result(None))


@pytest.mark.parametrize(
    ("mean", "error", "text"),
    [
        (13.0712, 0.4107, "13.07 ± 0.41"),
        (0.00301, 0.000123, "0.00301 ± 0.00012"),
        (1_124_321.0, 310_400.0, "1,124,321 ± 310,400"),
        (20.0, 1.2, "20.0 ± 1.2"),
        (1.0, 0.0, "1 ± 0"),
        (math.inf, math.nan, "inf ± nan"),
    ],
)
def test_the_error_decides_the_digits(mean: float, error: float, text: str) -> None:
    assert str(Estimate(mean, error)) == text


def test_an_exponential_that_overflows_is_infinite() -> None:
    assert Estimate(2000.0, 1.0).exponential().mean == math.inf
