"""Storage of N:M pruned weights: the values that stay, and their positions in each run of M.

Each value needs a position of log2 M bits. So 2:4 of 16-bit weights takes (2 x 16 + 2 x 2) / 4 = 9
bits per weight, not 8. With 4-bit weights it takes 3 bits, like a dense 3-bit code.
Source: Mishra et al., "Accelerating sparse deep neural networks" (2021), section 3.
`sparsity.py` chooses which weights stay.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Shaped, UInt8
from torch import Tensor

from qcourse.methods.sparsity import NM
from qcourse.numerics.packing import pack, unpack


@dataclass(frozen=True, eq=False)
class Compressed:
    """An N:M weight without its zeros, from ``compress_sparse``."""

    values: Shaped[Tensor, "out kept"]  # in the order of the inputs
    positions: UInt8[Tensor, " bytes"]  # packed, ceil(log2 m) bits each
    pattern: NM
    shape: tuple[int, int]  # (out, in)

    @property
    def nbytes(self) -> int:
        """Bytes of values and positions."""
        return self.values.nbytes + self.positions.nbytes

    def where(self) -> UInt8[Tensor, "out kept"]:
        """Return the position of each value in its run."""
        bits = position_bits(self.pattern.m)
        if not bits:
            return torch.zeros_like(self.values, dtype=torch.uint8)
        flat = unpack(self.positions, bits, self.values.numel(), signed=False)
        return flat.reshape(self.values.shape)

    def decompress(self) -> Shaped[Tensor, "out in"]:
        """Return the weight (out, in) with its zeros."""
        values = self.values.reshape(-1, self.pattern.keep)  # (runs, keep)
        where = self.where().reshape(values.shape).long()
        dense = values.new_zeros(len(values), self.pattern.m)  # (runs, m)
        return dense.scatter_(1, where, values).reshape(self.shape)


def compress_sparse(
    weight: Shaped[Tensor, "..."], mask: Shaped[Tensor, "..."], pattern: NM
) -> Compressed:
    """Return the values of weight (floats or codes) where mask is True, and their positions.

    Raises ValueError unless mask fits weight and pattern, and weight is 0 outside of it.

    >>> w = torch.tensor([[0.0, -1.25, 0.0, 0.5]])
    >>> small = compress_sparse(w, w != 0, NM(2, 4))
    >>> small.values.tolist(), small.where().tolist(), small.nbytes
    ([[-1.25, 0.5]], [[1, 3]], 9)
    """
    _check_mask(weight, mask, pattern)
    runs = mask.reshape(-1, pattern.m)
    where = runs.nonzero()[:, 1].to(torch.uint8)
    values = weight[mask].reshape(len(weight), -1)  # (out, kept)
    bits = position_bits(pattern.m)
    positions = pack(where, bits) if bits else where.new_zeros(0)
    rows, inputs = weight.shape
    return Compressed(values, positions, pattern, (rows, inputs))


def _check_mask(weight: Tensor, mask: Tensor, pattern: NM) -> None:
    shape = tuple(weight.shape)
    mask_shape = tuple(mask.shape)
    if weight.ndim != 2 or mask_shape != shape or mask.dtype != torch.bool:
        raise ValueError(
            f"mask of shape {mask_shape} and {mask.dtype} must be boolean and of weight's"
            f" shape, a matrix; weight has {shape}"
        )
    keep = pattern.keep
    m = pattern.m
    if shape[1] % m:
        raise ValueError(f"m={m} does not divide the {shape[1]} inputs of weight")
    counts = mask.reshape(-1, m).sum(dim=1)
    if bool((counts != keep).any()):
        found = sorted(set(counts.tolist()))
        raise ValueError(f"mask keeps {found} of {m} in some run; {keep}:{m} keeps {keep}")
    left_out = weight.masked_select(~mask)
    if bool(left_out.any()):
        raise ValueError("weight is not 0 everywhere that mask leaves out: pass the pruned weight")


def position_bits(m: int) -> int:
    """Return ceil(log2 m), the bits of a position in a run of m."""
    return (m - 1).bit_length()


def semi_structured(weight: Float[Tensor, "out in"]) -> Tensor:
    """Return a 2:4 weight, float16 or bfloat16, for torch's sparse tensor cores and `F.linear`.

    Raises RuntimeError without an NVIDIA GPU of compute capability 8.0, ValueError unless 2:4.
    """
    has_nvidia = weight.is_cuda and torch.version.hip is None
    if not has_nvidia or torch.cuda.get_device_capability(weight.device) < (8, 0):
        raise RuntimeError(
            f"weight is on {weight.device}; 2:4 products need an NVIDIA GPU of compute"
            " capability 8.0"
        )
    nonzero = (weight != 0).reshape(-1, 4).sum(dim=1)
    if bool((nonzero > 2).any()):
        raise ValueError(
            "weight has a run of four with more than two weights that are not 0:"
            " prune it by NM(2, 4)"
        )
    return torch.sparse.to_sparse_semi_structured(weight)
