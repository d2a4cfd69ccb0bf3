"""The checks of arguments that several modules share, and their messages.

The idea: NaN in and a plausible number out is the worst a quantizer can do. So bad input raises an
error that names the argument, its value and the rule.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from qcourse.numerics.quantized import Parameters, Quantizer

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_floating(x: Tensor, name: str = "x") -> None:
    """Raise TypeError unless x is a tensor of 16-, 32- or 64-bit floats, ValueError if empty."""
    if not isinstance(x, Tensor):
        kind = type(x).__name__
        raise TypeError(
            f"{name} is a {kind}; quantization takes a torch.Tensor (use torch.as_tensor)"
        )
    if x.dtype not in _FLOATS:
        raise TypeError(
            f"{name} has dtype {x.dtype};"
            f" quantization takes floats of 16, 32 or 64 bits (use {name}.float())"
        )
    if x.numel() == 0:
        shape = tuple(x.shape)
        raise ValueError(f"{name} is empty (shape {shape}); a range needs at least one value")


def check_finite(x: Tensor, name: str = "x", *, ends: Sequence[Tensor] | None = None) -> None:
    """Raise ValueError if x has NaN or infinity; `ends` are its extremes, if they are known."""
    # NaN passes through minimum and maximum, so the ends tell about all values.
    if ends is None:
        ends = torch.aminmax(x.detach())
    if all(torch.isfinite(end).all() for end in ends):
        return
    bad = ~torch.isfinite(x).reshape(-1)
    count = int(bad.sum())
    first = int(bad.int().argmax())
    raise ValueError(
        f"{name} has {count} NaN or infinite values of {x.numel()},"
        f" the first at flat index {first}; quantization takes finite values"
    )


def check_matrix(x: Tensor, name: str, axes: str = "(out, in)") -> None:
    """Raise TypeError unless x holds floats, ValueError unless it is a finite matrix."""
    check_floating(x, name)
    if x.ndim != 2:
        raise ValueError(f"{name} of shape {tuple(x.shape)} must be a matrix {axes}")
    check_finite(x, name)


def check_quantizer(quantizer: object, name: str = "quantizer") -> None:
    """Raise TypeError unless it is a quantizer: a value, not a class."""
    if isinstance(quantizer, type) or not isinstance(quantizer, Quantizer):
        raise TypeError(
            f"{name}={quantizer!r} must be a quantizer"
            " such as IntQuantizer(4, granularity=PerGroup(128))"
        )


@contextmanager
def in_layer(name: str) -> Iterator[None]:
    """Put the layer's name in front of the message of a ValueError.

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
    """Raise ValueError unless each scale is positive and finite."""
    # torch cannot compare floats of 8 bits.
    if scale.element_size() == 1:
        scale = scale.float()
    right = torch.isfinite(scale) & (scale > 0)
    wrong = ~right
    if wrong.any():
        first = float(scale[wrong][0])
        count = int(wrong.sum())
        verb = "is" if count == 1 else "are"
        raise ValueError(
            f"scale={first:.3g} must be positive and finite"
            f" ({count} of {wrong.numel()} scales {verb} not)"
        )


def check_stored_scale(stored: Tensor, exact: Tensor) -> None:
    """Raise ValueError if storage moved a scale by more than 1/256 of itself."""
    # 1/256 is half a step at the code 127. Rounding moves a normal float16 by 1/2049 at most and a
    # bfloat16 by 1/257, so more means overflow or underflow.
    error = (stored.double() - exact).abs()
    wrong = ~(error <= exact.abs() / 256)
    if wrong.any():
        first_exact = float(exact[wrong][0])
        first_stored = float(stored[wrong][0])
        count = int(wrong.sum())
        raise ValueError(
            f"scale={first_exact:.3g} cannot be held in scale_dtype={stored.dtype}, which makes it"
            f" {first_stored:.3g}; use a wider scale_dtype ({count} of {wrong.numel()} scales)"
        )


def check_parameters(
    parameters: Parameters, shape: tuple[int, ...], lowest: int, highest: int
) -> None:
    """Raise ValueError unless both have the shape and zero points are in [lowest, highest]."""
    scale = parameters.scale
    zero_point = parameters.zero_point
    if scale.shape != shape or zero_point.shape != shape:
        raise ValueError(
            f"scale of shape {tuple(scale.shape)} and zero_point of shape"
            f" {tuple(zero_point.shape)} must both have the shape {shape} that the granularity"
            " gives"
        )
    check_scale(scale)
    if zero_point.dtype == torch.bool or zero_point.dtype.is_floating_point:
        raise ValueError(
            f"zero_point has dtype {zero_point.dtype}; a zero point is a code, an integer"
        )
    wrong = (zero_point < lowest) | (zero_point > highest)
    if wrong.any():
        first = int(zero_point[wrong][0])
        only = " when symmetric" if lowest == highest else ""
        raise ValueError(f"zero_point={first} must be in [{lowest}, {highest}]{only}")


def check_token_ids(ids: Tensor, name: str, *, least: int) -> None:
    """Raise TypeError unless ids are integers, ValueError unless one row of `least` or more."""
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise TypeError(f"{name} must be integers, the ids of tokens, got {ids.dtype}")
    if ids.ndim != 1 or len(ids) < least:
        shape = tuple(ids.shape)
        raise ValueError(f"{name} must be one row of at least {least}, got the shape {shape}")
