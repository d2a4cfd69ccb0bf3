"""Hadamard matrices: +1 and -1 only, rows at right angles to each other, H H^T = n I.

The idea: x H / sqrt(n) sends each channel to every other one in equal parts and keeps the length of x. And where n is a
product, H is a Kronecker product, so that the transform takes one small product for each factor. With factors of 2
alone that is n log2(n) sums and differences for a row of n, in place of n^2 multiplications. Here those factors are
taken together, up to 64 at a time: 64 n multiplications for each block of 64, so 128 n at n = 4096. That is more
arithmetic than 12 n and less time, for x is read twice, not twelve times, and products of matrices are fast.

There are such matrices of 1, 2 and, as far as anybody knows, every multiple of 4. Here: 1, 2, q + 1 for each prime
power q = 3 modulo 4, 2 (q + 1) for each q = 1 modulo 4, and every product of such sizes. That covers the widths of
common models (11,008 is 32 x 344, and 343 is 7^3). Below 200 it misses 92, 116, 156, 172, 184 and 188.

Source: Sylvester (1867) for 2 and products; Paley, "On orthogonal matrices" (1933), for q + 1 and 2 (q + 1).

How it differs from ``rotation.py``: here the matrix; there what is done with it, and rotations that are learned.
"""

import math
from functools import cache, lru_cache
from itertools import count, product

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from qcourse.numerics.chunks import wide
from qcourse.numerics.validation import check_floating

BLOCK = 64  # factors of 2 are taken together up to this size: one product of matrices instead of six passes over x


def hadamard(n: int) -> Float[Tensor, "n n"]:
    """A matrix H of +1 and -1 with H H^T = n I.

    Args:
        n: 1, 2, q + 1 or 2 (q + 1) for prime powers q as above, or a product of these.

    Returns:
        H in float32; the same at each call. Not symmetric in general: its inverse is H^T / n.

    Raises:
        TypeError: n is no int.
        ValueError: there is no construction for n; the message names the nearest sizes that have one.

    >>> hadamard(4).int().tolist()
    [[1, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]]
    >>> h = hadamard(12)
    >>> torch.equal(h @ h.T, 12 * torch.eye(12))
    True
    """
    h = torch.ones(1, 1)
    for block in _blocks(n):
        h = torch.kron(h, _matrix(block))
    return h


def hadamard_transform(x: Shaped[Tensor, "..."], *, inverse: bool = False) -> Shaped[Tensor, "..."]:
    """x H / sqrt(n) along the last axis, one block of H after another: b n multiplications for a block of b.

    Args:
        x: floats (..., n).
        inverse: multiply by H^T instead, which undoes it.

    Returns:
        Of x's shape and dtype, computed in float32 at least. The length of each row is kept, NaN spreads over its row.

    Raises:
        TypeError: x is no floating-point tensor.
        ValueError: x is empty or a single number; there is no construction for its last axis.

    >>> hadamard_transform(torch.tensor([8.0, 0.0, 0.0, 0.0])).tolist()
    [4.0, 4.0, 4.0, 4.0]
    """
    check_floating(x, "x")
    if x.ndim == 0:
        raise ValueError("x is a single number; it must have an axis of channels")
    y, done = x.to(wide(x.dtype)), 1
    for block in reversed(_blocks(x.shape[-1])):
        h = _matrix(block).to(y) / math.sqrt(block)
        h = h if inverse else h.T  # from the left, where x H would have it on the right
        y = (
            (y.reshape(-1, block) @ h.T) if done == 1 else h @ y.reshape(-1, block, done)
        )  # (others, block, done)
        done *= block
    return y.reshape(x.shape).to(x.dtype)


def check_size(n: int) -> None:
    """Raise as ``hadamard`` does where n has no construction.

    >>> check_size(92)
    Traceback (most recent call last):
    ValueError: n=92 has no Hadamard matrix here: sizes are 1, 2, q + 1 for a prime power q = 3 modulo 4, 2 (q + 1) \
for q = 1 modulo 4, and products of these; the nearest are 88 and 96
    """
    _blocks(n)


def _blocks(n: int) -> tuple[int, ...]:
    """Sizes whose product is n: the factors of n, neighbours taken together up to BLOCK."""
    if type(n) is not int:
        raise TypeError(f"n={n!r} must be a whole number (a Python int)")
    factors = _factors(n) if n > 0 else None
    if factors is None:
        ways = range(max(n, 1), 0, -1), count(max(n, 1))
        near = [next(m for m in way if _factors(m) is not None) for way in ways]
        raise ValueError(
            f"n={n} has no Hadamard matrix here: sizes are 1, 2, q + 1 for a prime power q = 3 modulo 4, 2 (q + 1) for"
            f" q = 1 modulo 4, and products of these; the nearest are {near[0]} and {near[1]}"
        )
    blocks: list[int] = []
    for factor in reversed(factors):
        if blocks and blocks[0] * factor <= BLOCK:
            blocks[0] *= factor
        else:
            blocks.insert(0, factor)
    return tuple(blocks)


@cache
def _factors(n: int) -> tuple[int, ...] | None:
    """Twos, then the smallest bases, whose product is n; None where there are none."""
    if n & (n - 1) == 0:
        return (2,) * (n.bit_length() - 1)
    for base in range(12, n + 1, 4):
        if n % base == 0 and _paley_field(base) is not None:
            rest = _factors(n // base)
            if rest is not None:
                return (*rest, base)
    return None


def _paley_field(n: int) -> tuple[int, int, int] | None:
    """(kind, p, k) for n = q + 1 with q = p^k = 3 modulo 4 (kind 1), or n = 2 (q + 1) with q = 1 modulo 4 (kind 2)."""
    for kind, q, rest in ((1, n - 1, 3), (2, n // 2 - 1, 1)):
        p = next((d for d in range(3, math.isqrt(q) + 1, 2) if q % d == 0), q)
        k = round(math.log(q, p))
        if q % 4 == rest and p**k == q:
            return kind, p, k
    return None


@lru_cache(maxsize=64)
def _matrix(n: int) -> Float[Tensor, "n n"]:
    """The Hadamard matrix of a block."""
    factors = _factors(n)
    assert factors is not None
    h = torch.ones(1, 1)
    for factor in factors:
        h = torch.kron(
            h, torch.tensor([[1.0, 1.0], [1.0, -1.0]]) if factor == 2 else _paley(factor)
        )
    return h


def _paley(n: int) -> Float[Tensor, "n n"]:
    """Paley's matrices: with S the squares' pattern chi(a - b) bordered by ones, I + S, or S twice, put together."""
    field = _paley_field(n)
    assert field is not None
    kind, p, k = field
    chi, digits = _squares(p, k)
    powers = p ** torch.arange(k)
    differences = (digits[:, None] - digits[None]) % p @ powers  # (q, q): a - b as a number
    s = torch.zeros(p**k + 1, p**k + 1)
    s[0, 1:], s[1:, 0], s[1:, 1:] = 1.0, -1.0 if kind == 1 else 1.0, chi[differences]
    if kind == 1:
        return s + torch.eye(n)
    return torch.kron(s, torch.tensor([[1.0, 1.0], [1.0, -1.0]])) + torch.kron(
        torch.eye(n // 2), torch.tensor([[1.0, -1.0], [-1.0, -1.0]])
    )


def _squares(p: int, k: int) -> tuple[Float[Tensor, " q"], Int[Tensor, "q k"]]:
    """chi of each element of the field of p^k: 0 for 0, +1 for a square, -1 for the rest; and the elements' digits.

    An element is a polynomial of degree below k over the numbers modulo p. Multiplying 1 by t again and again, with
    t^k = c, meets every element but 0 once if c is well chosen: the squares at every second step.
    """
    q = p**k
    for c in product(range(p), repeat=k):
        chi, element = torch.zeros(q), (1, *(0,) * (k - 1))
        for step in range(q - 1):
            number = sum(digit * p**i for i, digit in enumerate(element))
            if chi[number] or not number:
                break  # met before: c is not well chosen
            chi[number] = 1 - 2 * (step % 2)
            top = element[-1]
            element = tuple(
                (low + top * digit) % p for low, digit in zip((0, *element[:-1]), c, strict=True)
            )
        else:
            numbers = torch.arange(q)
            return chi, torch.stack([numbers // p**i % p for i in range(k)], dim=1)
    raise AssertionError("every finite field has a primitive element")
