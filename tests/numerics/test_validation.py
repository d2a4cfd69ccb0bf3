"""The checks themselves, where their words depend on more than one value."""

import pytest
import torch

from qcourse.numerics.validation import (
    check_finite,
    check_floating,
    check_scale,
    check_stored_scale,
)


def test_what_passes() -> None:
    x = torch.tensor([0.0, 1.0])
    check_floating(x)
    check_finite(x)
    check_finite(x, ends=(x.amin(), x.amax()))
    check_scale(torch.tensor([1e-30, 1.0]))
    check_stored_scale(torch.tensor([1.0]), torch.tensor([1.0 + 1 / 257], dtype=torch.float64))


def test_the_name_is_the_callers() -> None:
    with pytest.raises(ValueError, match="hessian is empty"):
        check_floating(torch.empty(0), "hessian")
    with pytest.raises(ValueError, match="hessian has 1 NaN"):
        check_finite(torch.tensor([torch.nan]), "hessian")
    x = torch.tensor([[0.0, -torch.inf]])
    with pytest.raises(ValueError, match=r"x has 1 NaN or infinite values of 2, .* index 1"):
        check_finite(x, ends=(x.amin(dim=1), x.amax(dim=1)))


def test_scales_that_are_wrong_are_counted() -> None:
    with pytest.raises(ValueError, match=r"scale=0 must be .*\(2 of 3 scales are not\)"):
        check_scale(torch.tensor([0.0, 1.0, torch.inf]))
    with pytest.raises(ValueError, match=r"makes it 0; .*\(1 of 2 scales\)"):
        check_stored_scale(
            torch.tensor([0.0, 1.0]), torch.tensor([1e-60, 1.0], dtype=torch.float64)
        )
