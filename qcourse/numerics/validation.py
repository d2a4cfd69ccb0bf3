"""What every quantizer refuses: one place for the rules and their words.

The idea: a NaN in, a plausible number out is the worst thing a quantizer can do, so bad input stops at the door with a
message that names the argument, its value and the rule.
"""

import torch
from torch import Tensor


def check_floating(x: Tensor, name: str = "x") -> None:
    """Raise TypeError unless x is a floating-point tensor, ValueError where it is empty.

    >>> check_floating(torch.arange(3))
    Traceback (most recent call last):
    TypeError: x has dtype torch.int64; quantization takes floating-point values (use x.float())
    """
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} is a {type(x).__name__}; quantization takes a torch.Tensor (use torch.as_tensor)")
    if not x.dtype.is_floating_point:
        raise TypeError(f"{name} has dtype {x.dtype}; quantization takes floating-point values (use {name}.float())")
    if x.numel() == 0:
        raise ValueError(f"{name} is empty (shape {tuple(x.shape)}); a range needs at least one value")


def check_finite(x: Tensor, low: Tensor, high: Tensor, name: str = "x") -> None:
    """Raise ValueError where x has NaN or infinity, judged by its smallest and largest values (NaN reaches both)."""
    if not (torch.isfinite(low).all() and torch.isfinite(high).all()):
        bad = (~torch.isfinite(x)).reshape(-1)
        raise ValueError(
            f"{name} has {int(bad.sum())} NaN or infinite values of {x.numel()}, the first at flat index "
            f"{int(bad.int().argmax())}; quantization takes finite values"
        )


def check_stored_scale(stored: Tensor, exact: Tensor) -> None:
    """Raise ValueError where storage moved a scale by more than 1/512 of itself, half a step at the largest 8-bit code.

    Rounding moves a normal float16 by at most 1/2048 and a bfloat16 by 1/512: more means that it under- or overflowed.
    """
    wrong = ~((stored.double() - exact).abs() <= exact / 512)
    if wrong.any():
        raise ValueError(
            f"scale={float(exact[wrong][0]):.3g} cannot be held in scale_dtype={stored.dtype}, which makes it "
            f"{float(stored[wrong][0]):.3g}; use a wider scale_dtype ({int(wrong.sum())} of {wrong.numel()} scales)"
        )
