"""A weight in 4 bits, packed for the kernel that multiplies by it, with its scales.

The idea: the codes are stored once, in the order that the kernel of their device reads, and never
as floats. Every layout gives the same codes back, so a weight can move to another device and be
packed again there. Codes and zero points are stored as 0..15: a signed code c is stored as c + 8
and its zero point 0 as 8. A weight whose zero points are all 8 stores none.

Source: the modules of the packings, ``int4_planes.py`` and ``int4_cpu.py``.

How it differs from ``layers/quantized_linear.py``: that takes codes of any width and decodes
before each product; this takes 4 bits, in the order of a kernel that decodes as it multiplies.
"""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Shaped, UInt8
from torch import Tensor

from qcourse.kernels.int4_layouts import LAYOUTS, default_layout
from qcourse.numerics.affine import IntQuantizer
from qcourse.numerics.granularity import PerChannel, PerGroup
from qcourse.numerics.quantized import Parameters, QuantizedTensor

BITS = 4
OFFSET = 1 << BITS - 1  # a signed code is stored this much higher
GROUPS = (32, 64, 128)
ROWS = 64  # every layout packs rows in blocks that divide this


@dataclass(frozen=True, eq=False)
class Int4Weight:
    """Weights (out, in) of 4 bits; made by ``Int4Weight.from_quantized``."""

    packed: Shaped[Tensor, "..."]  # the codes, in the order of the layout
    scale: Float[Tensor, "out groups"]  # in the dtype it was given in
    zero_point: UInt8[Tensor, "out groups"] | None  # in 0..15; None where all are 8
    extras: tuple[Tensor, ...]  # what the kernel of the layout reads besides the codes
    quantizer: IntQuantizer  # made the codes
    shape: tuple[int, int]  # (out, in)
    layout: str  # "cpu", or "planes" for a GPU and for Triton's interpreter

    @classmethod
    def from_quantized(cls, q: QuantizedTensor, *, layout: str | None = None) -> "Int4Weight":
        """Pack the codes of q on their device; no code is rounded again.

        Args:
            q: 4-bit integer codes of a matrix (out, in), one scale per 32, 64 or 128 inputs or per
                row.
            layout: "cpu" or "planes"; None takes the default of q's device.

        Raises:
            TypeError: q is not a QuantizedTensor of integers.
            ValueError: other bits, granularity or shape; a layout that is unknown or unavailable.

        >>> from qcourse import PerGroup, quantize
        >>> int4 = IntQuantizer(4, granularity=PerGroup(128), scale_dtype=torch.float16)
        >>> q = int4(torch.randn(64, 256))
        >>> w4 = Int4Weight.from_quantized(q)
        >>> torch.equal(w4.quantized().codes, q.codes), w4.shape, w4.group_size
        (True, (64, 256), 128)
        """
        quantizer = _checked_quantizer(q)
        rows = len(q.codes)
        scale = q.scale.reshape(rows, -1)  # (out, groups)
        zero_point = _stored(q.zero_point, quantizer).reshape(rows, -1)
        # The kernels subtract 8 where a weight has no zero points.
        only_eights = bool((zero_point == OFFSET).all())
        codes = _stored(q.codes, quantizer)
        zeros = None if only_eights else zero_point
        return cls.from_codes(codes, scale, zeros, quantizer, layout=layout)

    @classmethod
    def from_codes(
        cls,
        codes: UInt8[Tensor, "out in"],
        scale: Float[Tensor, "out groups"],
        zero_point: UInt8[Tensor, "out groups"] | None,
        quantizer: IntQuantizer,
        *,
        layout: str | None = None,
    ) -> "Int4Weight":
        """Pack codes that are already stored as 0..15; ValueError for a layout without a kernel."""
        device = codes.device
        name = layout or default_layout(device)
        if name not in LAYOUTS:
            raise ValueError(f"layout={name!r} must be one of {', '.join(LAYOUTS)}")
        order = LAYOUTS[name]
        reason = order.unavailable_reason(device)
        if reason:
            raise ValueError(f"layout={name!r} is not available: {reason}")
        outputs, inputs = codes.shape
        group_size = inputs // scale.shape[1]
        extras = order.extras(scale, zero_point, group_size, inputs)
        packed = order.pack(codes)
        return cls(packed, scale, zero_point, extras, quantizer, (outputs, inputs), name)

    def repacked(self, layout: str) -> "Int4Weight":
        """Return the same weight in another layout; ValueError if it is unknown or unavailable."""
        if layout == self.layout:
            return self
        codes = self.codes()
        return self.from_codes(codes, self.scale, self.zero_point, self.quantizer, layout=layout)

    def to(self, device: torch.device | str) -> "Int4Weight":
        """Return the same weight on another device, in the default layout of that device."""
        device = torch.device(device)
        if device == self.packed.device:
            return self
        codes = self.codes().to(device)
        scale = self.scale.to(device)
        zero_point = None if self.zero_point is None else self.zero_point.to(device)
        return self.from_codes(codes, scale, zero_point, self.quantizer)

    @property
    def group_size(self) -> int:
        """The number of inputs that share a scale."""
        return self.shape[1] // self.scale.shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors that the weight holds, padding included."""
        total = self.packed.nbytes + self.scale.nbytes
        total += sum(extra.nbytes for extra in self.extras)
        return total if self.zero_point is None else total + self.zero_point.nbytes

    def codes(self) -> UInt8[Tensor, "out in"]:
        """Return all codes as stored, 0 to 15."""
        outputs, inputs = self.shape
        padded = LAYOUTS[self.layout].unpack(self.packed, inputs)
        return padded[:outputs]

    def quantized(self) -> QuantizedTensor:
        """Return the codes, scales and zero points that ``from_quantized`` was given."""
        codes = self.codes()
        zero_point = self.zero_point
        if zero_point is None:
            zero_point = torch.full_like(self.scale, OFFSET, dtype=torch.uint8)
        if self.quantizer.symmetric:
            codes = codes.to(torch.int8) - OFFSET
            zero_point = zero_point.to(torch.int8) - OFFSET
        shape = self.quantizer.granularity.scale_shape(codes.shape)
        parameters = Parameters(self.scale.reshape(shape), zero_point.reshape(shape))
        return QuantizedTensor(codes, parameters, self.quantizer)

    def decoded(self, start: int, stop: int, dtype: torch.dtype) -> Float[Tensor, "rows in"]:
        """Return (code - zero_point) scale for the rows from start (a multiple of 64) to stop."""
        outputs, inputs = self.shape
        stop = min(stop, outputs)
        # A layout can only be read in whole blocks of rows.
        blocks = self.packed[start : stop + -stop % ROWS]
        padded = LAYOUTS[self.layout].unpack(blocks, inputs)
        codes = padded[: stop - start]
        groups = codes.reshape(len(codes), -1, self.group_size)  # (rows, groups, inputs per group)
        scale = self.scale[start:stop, :, None].to(dtype)
        zero_point: int | Tensor = OFFSET
        if self.zero_point is not None:
            zero_point = self.zero_point[start:stop, :, None].to(dtype)
        w_hat = groups.to(dtype).sub_(zero_point).mul_(scale)
        return w_hat.reshape(codes.shape)


def _stored(codes: Tensor, quantizer: IntQuantizer) -> Tensor:
    """Codes or zero points as stored: uint8 in 0..15."""
    if not quantizer.symmetric:
        return codes.to(torch.uint8)
    # Bytes wrap modulo 256: the signed code -8 reads as 248, and 248 + 8 is 0.
    return codes.to(torch.int8).view(torch.uint8) + OFFSET


def check_int4_quantizer(quantizer: object, width: int) -> None:
    """Raise TypeError or ValueError unless the kernels take its codes, in rows of width codes."""
    if not isinstance(quantizer, IntQuantizer):
        raise TypeError(
            f"q must hold integer codes, as IntQuantizer(4)(w) gives; got {quantizer!r:.200}"
        )
    if quantizer.bits != BITS:
        raise ValueError(f"q has {quantizer.bits} bits; an INT4 weight has 4")
    group_sizes = (*GROUPS, width)
    allowed = [PerChannel(0), *(PerGroup(size) for size in group_sizes)]
    if quantizer.granularity not in allowed:
        raise ValueError(
            f"granularity={quantizer.granularity!r} must be PerGroup of"
            f" {', '.join(map(str, GROUPS))} or the whole row, or PerChannel(0)"
        )


def _checked_quantizer(q: QuantizedTensor) -> IntQuantizer:
    """The quantizer of q; raises where q is not a 4-bit matrix that the kernels take."""
    if not isinstance(q, QuantizedTensor):
        raise TypeError(f"q must hold integer codes, as IntQuantizer(4)(w) gives; got {q!r:.200}")
    if q.codes.ndim != 2:
        raise ValueError(f"q of shape {tuple(q.shape)} must be a matrix (out, in)")
    check_int4_quantizer(q.quantizer, q.shape[1])
    quantizer: Any = q.quantizer
    smallest, largest = (int(code) for code in torch.aminmax(q.codes))
    qmin = quantizer.qmin
    qmax = quantizer.qmax
    if smallest < qmin or largest > qmax:
        raise ValueError(f"q has codes from {smallest} to {largest}; {qmin} to {qmax} are 4 bits")
    return quantizer
