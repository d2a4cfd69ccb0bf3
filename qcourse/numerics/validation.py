"""What every quantizer refuses: one place for the rules and their words.

The idea: a NaN in, a plausible number out is the worst thing a quantizer can do, so bad input stops at the door with a
message that names the argument, its value and the rule.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from qcourse.numerics.chunks import range_of_rows
from qcourse.numerics.quantized import Parameters, Quantizer


def check_floating(x: Tensor, name: str = "x") -> None:
    """Raise TypeError unless x is a tensor of 16-, 32- or 64-bit floats, ValueError where it is empty.

    >>> check_floating(torch.arange(3))
    Traceback (most recent call last):
    TypeError: x has dtype torch.int64; quantization takes floats of 16, 32 or 64 bits (use x.float())
    """
    if not isinstance(x, Tensor):
        raise TypeError(
            f"{name} is a {type(x).__name__}; quantization takes a torch.Tensor (use torch.as_tensor)"
        )
    if x.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        raise TypeError(
            f"{name} has dtype {x.dtype}; quantization takes floats of 16, 32 or 64 bits (use {name}.float())"
        )
    if x.numel() == 0:
        raise ValueError(
            f"{name} is empty (shape {tuple(x.shape)}); a range needs at least one value"
        )


def check_finite(x: Tensor, low: Tensor, high: Tensor, name: str = "x") -> None:
    """Raise ValueError where x has NaN or infinity, judged by its smallest and largest values (NaN reaches both)."""
    if not (torch.isfinite(low).all() and torch.isfinite(high).all()):
        bad = (~torch.isfinite(x)).reshape(-1)
        raise ValueError(
            f"{name} has {int(bad.sum())} NaN or infinite values of {x.numel()}, the first at flat index "
            f"{int(bad.int().argmax())}; quantization takes finite values"
        )


def check_matrix(x: Tensor, name: str, axes: str = "(out, in)") -> None:
    """Raise TypeError unless x holds floats, ValueError unless it is a matrix of finite ones.

    >>> check_matrix(torch.ones(3), "w")
    Traceback (most recent call last):
    ValueError: w of shape (3,) must be a matrix (out, in)
    """
    check_floating(x, name)
    if x.ndim != 2:
        raise ValueError(f"{name} of shape {tuple(x.shape)} must be a matrix {axes}")
    check_finite(x, *range_of_rows(x.detach()), name)


def check_quantizer(quantizer: object, name: str = "quantizer") -> None:
    """Raise TypeError unless it is a quantizer, a value and not a class of them.

    >>> check_quantizer("int8")
    Traceback (most recent call last):
    TypeError: quantizer='int8' must be a quantizer such as IntQuantizer(4, granularity=PerGroup(128))
    """
    if isinstance(quantizer, type) or not isinstance(quantizer, Quantizer):
        raise TypeError(
            f"{name}={quantizer!r} must be a quantizer such as IntQuantizer(4, granularity=PerGroup(128))"
        )


@contextmanager
def in_layer(name: str) -> Iterator[None]:
    """Within, a ValueError says of which layer it speaks.

    >>> with in_layer("model.up"):
    ...     raise ValueError("w is empty")
    Traceback (most recent call last):
    ValueError: layer 'model.up': w is empty
    """
    try:
        yield
    except ValueError as error:
        raise ValueError(f"layer {name!r}: {error}") from error


def check_scale(scale: Tensor) -> None:
    """Raise ValueError unless each scale is positive and finite.

    >>> check_scale(torch.tensor([1.0, -2.0]))
    Traceback (most recent call last):
    ValueError: scale=-2 must be positive and finite (1 of 2 scales is not)
    """
    scale = (
        scale.float() if scale.element_size() == 1 else scale
    )  # torch cannot compare floats of 8 bits
    wrong = ~(torch.isfinite(scale) & (scale > 0))
    if wrong.any():
        count = int(wrong.sum())
        raise ValueError(
            f"scale={float(scale[wrong][0]):.3g} must be positive and finite "
            f"({count} of {wrong.numel()} scales {'is' if count == 1 else 'are'} not)"
        )


def check_stored_scale(stored: Tensor, exact: Tensor) -> None:
    """Raise ValueError where storage moved a scale by more than 1/256 of itself, half a step at the code 127.

    Rounding moves a normal float16 by at most 1/2049 and a bfloat16 by 1/257: more means that it under- or overflowed.
    """
    wrong = ~((stored.double() - exact).abs() <= exact / 256)
    if wrong.any():
        raise ValueError(
            f"scale={float(exact[wrong][0]):.3g} cannot be held in scale_dtype={stored.dtype}, which makes it "
            f"{float(stored[wrong][0]):.3g}; use a wider scale_dtype ({int(wrong.sum())} of {wrong.numel()} scales)"
        )


def check_parameters(
    parameters: Parameters, shape: tuple[int, ...], lowest: int, highest: int
) -> None:
    """Raise ValueError unless scales and zero points have the shape and are such; zero points in [lowest, highest]."""
    scale, zero_point = parameters.scale, parameters.zero_point
    if scale.shape != shape or zero_point.shape != shape:
        raise ValueError(
            f"scale of shape {tuple(scale.shape)} and zero_point of shape {tuple(zero_point.shape)} must both have "
            f"the shape {shape} that the granularity gives"
        )
    check_scale(scale)
    if zero_point.dtype == torch.bool or zero_point.dtype.is_floating_point:
        raise ValueError(
            f"zero_point has dtype {zero_point.dtype}; a zero point is a code, an integer"
        )
    wrong = (zero_point < lowest) | (zero_point > highest)
    if wrong.any():
        only = " when symmetric" if lowest == highest else ""
        raise ValueError(
            f"zero_point={int(zero_point[wrong][0])} must be in [{lowest}, {highest}]{only}"
        )


def check_token_ids(ids: Tensor, name: str, *, least: int) -> None:
    """Raise TypeError unless ids are integers, ValueError unless they are one row of at least so many.

    >>> check_token_ids(torch.zeros(3), "tokens", least=2)
    Traceback (most recent call last):
    TypeError: tokens must be integers, the ids of tokens, got torch.float32
    """
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise TypeError(f"{name} must be integers, the ids of tokens, got {ids.dtype}")
    if ids.ndim != 1 or len(ids) < least:
        raise ValueError(
            f"{name} must be one row of at least {least}, got the shape {tuple(ids.shape)}"
        )
