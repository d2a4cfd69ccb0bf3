"""Pruned weights as they are stored: the values that stay, and where in their run of M they stood.

The idea: of every M neighbours N are kept, so the values of a row are N / M of its length, and each needs a position of
log2 M bits. That is what pruning really saves: 2:4 of 16-bit weights takes (2 x 16 + 2 x 2) / 4 = 9 bits a weight, not
8; and of 4-bit weights 3 bits, not 2. A dense code of 3 bits takes as many, and keeps all weights.

Source: Mishra et al., "Accelerating sparse deep neural networks" (2021), section 3, for the format of 2:4.

How it differs from ``sparsity.py``: there weights are chosen; here those chosen are written down.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Shaped, UInt8
from torch import Tensor

from qcourse.methods.sparsity import NM
from qcourse.numerics.packing import pack, unpack


@dataclass(frozen=True, eq=False)
class Compressed:
    """An N:M weight without its zeros; ``compress`` makes it.

    Args:
        values: (out, in keep / m), in the order of the inputs.
        positions: packed, ceil(log2 m) bits each: where in its run each value stood.
        pattern: N:M.
        shape: (out, in).
    """

    values: Shaped[Tensor, "out kept"]
    positions: UInt8[Tensor, " bytes"]
    pattern: NM
    shape: tuple[int, int]

    @property
    def nbytes(self) -> int:
        """Bytes of values and positions."""
        return self.values.nbytes + self.positions.nbytes

    def where(self) -> UInt8[Tensor, "out kept"]:
        """The position of each value in its run."""
        bits = position_bits(self.pattern.m)
        if not bits:
            return torch.zeros_like(self.values, dtype=torch.uint8)
        return unpack(self.positions, bits, self.values.numel(), signed=False).reshape(
            self.values.shape
        )

    def decompress(self) -> Shaped[Tensor, "out in"]:
        """The weight (out, in), zeros put back."""
        runs = self.values.reshape(-1, self.pattern.keep)
        dense = runs.new_zeros(len(runs), self.pattern.m)
        return dense.scatter_(1, self.where().reshape(runs.shape).long(), runs).reshape(self.shape)


def compress_sparse(
    weight: Shaped[Tensor, "..."], mask: Shaped[Tensor, "..."], pattern: NM
) -> Compressed:
    """Write down the values where mask is True, run by run, and their positions.

    Args:
        weight: (out, in), floats or codes.
        mask: (out, in), True for exactly ``pattern.keep`` of every ``pattern.m`` neighbours.

    Raises:
        ValueError: weight is no matrix; mask is not boolean, has another shape, or another number in a run; a weight
            that the mask leaves out is not 0.

    >>> w = torch.tensor([[0.0, -1.25, 0.0, 0.5]])
    >>> small = compress_sparse(w, w != 0, NM(2, 4))
    >>> small.values.tolist(), small.where().tolist(), small.nbytes  # two floats, and two positions in half a byte
    ([[-1.25, 0.5]], [[1, 3]], 9)
    """
    if weight.ndim != 2 or mask.shape != weight.shape or mask.dtype != torch.bool:
        raise ValueError(
            f"mask of shape {tuple(mask.shape)} and {mask.dtype} must be boolean and of weight's shape, a matrix;"
            f" weight has {tuple(weight.shape)}"
        )
    if weight.shape[1] % pattern.m:
        raise ValueError(f"m={pattern.m} does not divide the {weight.shape[1]} inputs of weight")
    runs = mask.reshape(-1, pattern.m)
    counts = runs.sum(dim=1)
    if bool((counts != pattern.keep).any()):
        found = sorted(set(counts.tolist()))
        raise ValueError(
            f"mask keeps {found} of {pattern.m} in some run; {pattern.keep}:{pattern.m} keeps {pattern.keep}"
        )
    if bool(weight.masked_select(~mask).any()):
        raise ValueError("weight is not 0 everywhere that mask leaves out: pass the pruned weight")
    where = runs.nonzero()[:, 1].to(torch.uint8)
    values = weight[mask].reshape(len(weight), -1)  # (out, kept)
    bits = position_bits(pattern.m)
    positions = pack(where, bits) if bits else where.new_zeros(0)
    return Compressed(values, positions, pattern, (weight.shape[0], weight.shape[1]))


def position_bits(m: int) -> int:
    """Bits of a position in a run of m: ceil(log2 m)."""
    return (m - 1).bit_length()


def semi_structured(weight: Float[Tensor, "out in"]) -> Tensor:
    """A 2:4 weight as torch's sparse tensor cores take it: F.linear(x, it) then skips the zeros.

    Args:
        weight: (out, in) in float16 or bfloat16 on an NVIDIA GPU of compute capability 8.0 or more.

    Raises:
        RuntimeError: there is no such GPU.
        ValueError: a run of four has more than two weights that are not 0.
    """
    if (
        not weight.is_cuda
        or torch.version.hip is not None
        or torch.cuda.get_device_capability(weight.device) < (8, 0)
    ):
        raise RuntimeError(
            f"weight is on {weight.device}; 2:4 products need an NVIDIA GPU of compute capability 8.0"
        )
    if bool(((weight != 0).reshape(-1, 4).sum(dim=1) > 2).any()):
        raise ValueError(
            "weight has a run of four with more than two weights that are not 0: prune it by NM(2, 4)"
        )
    return torch.sparse.to_sparse_semi_structured(weight)
