"""A weight in 4 bits, packed for the one who multiplies: codes in a backend's order, with their scales.

The idea: codes are stored once, in the order in which the kernel of their device reads them, and nowhere as floats.
From either order the same codes come back, bit by bit, so a weight can move to another device and be packed anew there.

Codes are kept as 0..15 with the zero point on the same footing: a signed code c is stored as c + 8 and its zero point 0
as 8. A weight whose zero points are all 8 keeps none.

Source: the packings' own modules.

How it differs from ``layers/quantized_linear.py``: there codes of any bits in one dense stream, decoded before each
product; here 4 bits alone, in the order of a product that decodes as it goes.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Shaped, UInt8
from torch import Tensor

from qcourse.kernels import int4_cpu
from qcourse.kernels.int4_planes import pack_planes, prepare, unpack_planes
from qcourse.numerics.affine import IntQuantizer
from qcourse.numerics.granularity import PerChannel, PerGroup
from qcourse.numerics.quantized import Parameters, QuantizedTensor

BITS = 4
OFFSET = 1 << BITS - 1  # of a signed code
GROUPS = (32, 64, 128)


@dataclass(frozen=True)
class PackedLayout:
    """An order of codes: how to write it and read it, and what its kernel wants beside the codes, made once.

    Args:
        pack: codes (N, K), uint8 in 0..15, to the packed tensor.
        unpack: packed rows and K to codes, with rows of padding at the end if the layout has any.
        extras: scale (N, K/G), zero_point (N, K/G) or None, G and K to the tensors that the kernel takes.
    """

    pack: Callable[[Tensor], Tensor]
    unpack: Callable[[Tensor, int], Tensor]
    extras: Callable[[Tensor, Tensor | None, int, int], tuple[Tensor, ...]]


def _planes_extras(
    scale: Tensor, zero_point: Tensor | None, group_size: int, inputs: int
) -> tuple[Tensor, ...]:
    rows = prepare(scale, zero_point, group_size=group_size)
    return tuple(each for each in rows if each is not None)


CODES = "codes"  # not packed: one code a byte, on the way from one layout to another
LAYOUTS = {
    CODES: PackedLayout(lambda codes: codes, lambda packed, inputs: packed, lambda *_: ()),
    "planes": PackedLayout(pack_planes, unpack_planes, _planes_extras),
    "cpu": PackedLayout(
        int4_cpu.pack_blocks,
        int4_cpu.unpack_blocks,
        lambda *args: (int4_cpu.scale_and_zero(*args),),
    ),
}


@dataclass(frozen=True, eq=False)
class Int4Weight:
    """Weights (out, in) of 4 bits; ``Int4Weight.from_quantized`` makes it.

    Args:
        packed: the codes, in the order of the layout.
        scale: (out, in / group_size), in the dtype it came in.
        zero_point: as scale, uint8 in 0..15; None where all are 8.
        extras: what the layout's kernel wants beside the codes.
        quantizer: that made the codes.
        shape: (out, in).
        layout: "planes" (a GPU, the interpreter) or "cpu".
    """

    packed: Shaped[Tensor, "..."]
    scale: Float[Tensor, "out groups"]
    zero_point: UInt8[Tensor, "out groups"] | None
    extras: tuple[Tensor, ...]
    quantizer: IntQuantizer
    shape: tuple[int, int]
    layout: str

    @classmethod
    def from_quantized(cls, q: QuantizedTensor, *, layout: str | None = None) -> "Int4Weight":
        """Pack the codes that q holds, on its device; none is rounded again.

        Args:
            q: 4-bit integers, symmetric or not, of a matrix (out, in), a scale for 32, 64 or 128 inputs or for a row.
            layout: "planes" or "cpu"; None takes that of q's device.

        Raises:
            TypeError: q is no QuantizedTensor of integers.
            ValueError: other bits, another granularity or shape; a layout that is unknown or that this machine lacks.

        >>> from qcourse import PerGroup, quantize
        >>> q = quantize(torch.randn(64, 256), 4, granularity=PerGroup(128), scale_dtype=torch.float16)
        >>> w4 = Int4Weight.from_quantized(q)
        >>> torch.equal(w4.quantized().codes, q.codes), w4.shape, w4.group_size
        (True, (64, 256), 128)
        """
        quantizer = _checked(q)
        rows, inputs = q.shape
        offset = OFFSET if quantizer.symmetric else 0
        codes, zero = (
            (values.to(torch.int16) + offset).byte() for values in (q.codes, q.zero_point)
        )
        zero_point = None if bool((zero == OFFSET).all()) else zero.reshape(rows, -1)
        packed = cls(
            codes, q.scale.reshape(rows, -1), zero_point, (), quantizer, (rows, inputs), CODES
        )
        return packed.repacked(layout or default_layout(codes.device))

    def repacked(self, layout: str) -> "Int4Weight":
        """The same weight in another layout; ValueError for one that is unknown or that this machine lacks."""
        if layout not in LAYOUTS:
            raise ValueError(f"layout={layout!r} must be one of {', '.join(LAYOUTS)}")
        if layout == "cpu" and (reason := int4_cpu.unavailable_reason()):
            raise ValueError(f"layout='cpu' cannot be had: {reason}")
        if layout == "cpu" and self.packed.device.type != "cpu":
            raise ValueError(
                f"layout='cpu' cannot be had on {self.packed.device}: Int4Weight.to('cpu')"
            )
        if layout == self.layout:
            return self
        order = LAYOUTS[layout]
        extras = order.extras(self.scale, self.zero_point, self.group_size, self.shape[1])
        return replace(self, packed=order.pack(self.codes()), extras=extras, layout=layout)

    def to(self, device: torch.device | str) -> "Int4Weight":
        """The same weight on another device, in that device's layout."""
        device = torch.device(device)
        if device == self.packed.device:
            return self
        zero_point = None if self.zero_point is None else self.zero_point.to(device)
        codes, scale = self.codes().to(device), self.scale.to(device)
        plain = Int4Weight(codes, scale, zero_point, (), self.quantizer, self.shape, CODES)
        return plain.repacked(default_layout(device))

    @property
    def group_size(self) -> int:
        """How many inputs share a scale."""
        return self.shape[1] // self.scale.shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes of all that the weight holds, padding and what the kernel wants beside the codes included."""
        held = (
            self.packed,
            self.scale,
            *self.extras,
            *([] if self.zero_point is None else [self.zero_point]),
        )
        return sum(each.nbytes for each in held)

    def codes(self) -> UInt8[Tensor, "out in"]:
        """All codes as they are kept, 0 to 15."""
        return LAYOUTS[self.layout].unpack(self.packed, self.shape[1])[: self.shape[0]]

    def quantized(self) -> QuantizedTensor:
        """The codes, scales and zero points that ``from_quantized`` was given."""
        zero = (
            torch.full_like(self.scale, OFFSET, dtype=torch.uint8)
            if self.zero_point is None
            else self.zero_point
        )
        codes = self.codes()
        if self.quantizer.symmetric:
            codes, zero = codes.to(torch.int8) - OFFSET, zero.to(torch.int8) - OFFSET
        scale_shape = self.quantizer.granularity.scale_shape(codes.shape)
        parameters = Parameters(self.scale.reshape(scale_shape), zero.reshape(scale_shape))
        return QuantizedTensor(codes, parameters, self.quantizer)

    def decoded(self, start: int, stop: int, dtype: torch.dtype) -> Float[Tensor, "rows in"]:
        """The floats of the outputs from start up to stop, (code - zero_point) scale; start a multiple of 64."""
        rows = slice(start, min(stop, self.shape[0]))
        codes = LAYOUTS[self.layout].unpack(self.packed[start:stop], self.shape[1])[
            : rows.stop - start
        ]
        zero = OFFSET if self.zero_point is None else self.zero_point[rows, :, None].to(dtype)
        groups = codes.reshape(len(codes), -1, self.group_size)  # (rows, groups, inputs of a group)
        w_hat = groups.to(dtype).sub_(zero).mul_(self.scale[rows, :, None].to(dtype))
        return w_hat.reshape(codes.shape)


def default_layout(device: torch.device) -> str:
    """What a weight on this device is packed as, unless one asks for another."""
    return "cpu" if device.type == "cpu" and not int4_cpu.unavailable_reason() else "planes"


def _checked(q: QuantizedTensor) -> IntQuantizer:
    if not isinstance(q, QuantizedTensor) or not isinstance(q.quantizer, IntQuantizer):
        got = q.quantizer if isinstance(q, QuantizedTensor) else q
        raise TypeError(
            f"q must hold integer codes, such as IntQuantizer(4)(w) gives; got {got!r:.200}"
        )
    if q.bits != BITS:
        raise ValueError(f"q has {q.bits} bits; an INT4 weight has 4")
    if q.codes.ndim != 2:
        raise ValueError(f"q of shape {tuple(q.shape)} must be a matrix (out, in)")
    known = [PerGroup(size) for size in GROUPS]
    if q.granularity not in (*known, PerChannel(0), PerGroup(q.shape[1])):
        raise ValueError(
            f"granularity={q.granularity!r} must be PerGroup of {', '.join(map(str, GROUPS))} or the whole row, or"
            " PerChannel(0)"
        )
    low, high = int(q.codes.min()), int(q.codes.max())
    if low < q.quantizer.qmin or high > q.quantizer.qmax:
        raise ValueError(
            f"q has codes from {low} to {high}; {q.quantizer.qmin} to {q.quantizer.qmax} are 4 bits"
        )
    return q.quantizer
