"""Hadamard matrices: entries +1 and -1, orthogonal rows, H H^T = n I.

x H / sqrt(n) spreads each channel equally over all channels and keeps the norm of x. Sizes: 1, 2,
q + 1 for prime powers q = 3 mod 4, 2 (q + 1) for q = 1 mod 4, and products of these. Below 200 only
92, 116, 156, 172, 184 and 188 are missing; 11,008, a common width, is 32 x (7^3 + 1).
Source: Sylvester (1867), products; Paley, "On orthogonal matrices" (1933), q + 1 and 2 (q + 1).
`rotation.py` applies these matrices and learns other rotations.
"""

import math
from functools import cache, lru_cache
from itertools import count, product

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from qcourse.numerics.chunks import wide
from qcourse.numerics.validation import check_floating

# Largest block made of factors 2. At n = 4096, two products with 64 x 64 matrices (128 n
# multiplications) take less time than twelve passes of sums (12 n): x is read twice.
BLOCK = 64


def hadamard(n: int) -> Float[Tensor, "n n"]:
    """Return H of +1 and -1 in float32 with H H^T = n I. In general H is not symmetric.

    Raises TypeError unless n is an int, ValueError if there is no construction for n.

    >>> hadamard(4).int().tolist()
    [[1, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]]
    """
    h = torch.ones(1, 1)
    for block in _blocks(n):
        h = torch.kron(h, _matrix(block))
    return h


def hadamard_transform(x: Shaped[Tensor, "..."], *, inverse: bool = False) -> Shaped[Tensor, "..."]:
    """Return x H / sqrt(n) along the last axis, or x H^T / sqrt(n) for the inverse, in x's dtype.

    Raises TypeError unless x holds floats, ValueError for a last axis without a construction.

    >>> hadamard_transform(torch.tensor([8.0, 0.0, 0.0, 0.0])).tolist()
    [4.0, 4.0, 4.0, 4.0]
    """
    check_floating(x, "x")
    if x.ndim == 0:
        raise ValueError("x is a single number; it must have an axis of channels")
    y = x.to(wide(x.dtype))  # 16-bit sums would overflow

    # H = H_1 (x) H_2 (x) ...: view the channels as (others, block, done) and multiply each block
    # along its own axis, from the last to the first.
    done = 1
    for block in reversed(_blocks(x.shape[-1])):
        h = _matrix(block).to(y) / math.sqrt(block)
        left = h if inverse else h.T  # (x H)^T = H^T x^T
        if done == 1:
            rows = y.reshape(-1, block)  # (others, block)
            y = rows @ left.T
        else:
            middle = y.reshape(-1, block, done)  # (others, block, done)
            y = left @ middle
        done *= block
    return y.reshape(x.shape).to(x.dtype)


def check_size(n: int) -> None:
    """Raise TypeError or ValueError, as ``hadamard`` does, for an n without a construction."""
    _blocks(n)


def _blocks(n: int) -> tuple[int, ...]:
    """Return block sizes whose product is n: neighboring factors, merged up to BLOCK."""
    if type(n) is not int:
        raise TypeError(f"n={n!r} must be a whole number (a Python int)")
    factors = _factors(n) if n > 0 else None
    if factors is None:
        below, above = _nearest_sizes(n)
        raise ValueError(
            f"n={n} has no Hadamard matrix here: sizes are 1, 2, q + 1 for a prime power"
            " q = 3 modulo 4, 2 (q + 1) for q = 1 modulo 4, and products of these;"
            f" the nearest are {below} and {above}"
        )
    blocks: list[int] = []
    for factor in reversed(factors):
        if blocks and blocks[0] * factor <= BLOCK:
            blocks[0] *= factor
        else:
            blocks.insert(0, factor)
    return tuple(blocks)


def _nearest_sizes(n: int) -> tuple[int, int]:
    start = max(n, 1)
    below = next(m for m in range(start, 0, -1) if _factors(m) is not None)
    above = next(m for m in count(start) if _factors(m) is not None)
    return below, above


@cache
def _factors(n: int) -> tuple[int, ...] | None:
    """Return twos, then the smallest Paley sizes, whose product is n; None if there are none."""
    if n & (n - 1) == 0:
        return (2,) * (n.bit_length() - 1)
    for base in range(12, n + 1, 4):
        if n % base == 0 and _paley_field(base) is not None:
            rest = _factors(n // base)
            if rest is not None:
                return (*rest, base)
    return None


@lru_cache(maxsize=64)
def _matrix(n: int) -> Float[Tensor, "n n"]:
    """Return the Hadamard matrix of one block."""
    factors = _factors(n)
    assert factors is not None
    h = torch.ones(1, 1)
    for factor in factors:
        h = torch.kron(h, _sylvester() if factor == 2 else _paley(factor))
    return h


def _sylvester() -> Float[Tensor, "2 2"]:
    return torch.tensor([[1.0, 1.0], [1.0, -1.0]])


def _paley_field(n: int) -> tuple[int, int, int] | None:
    """Return (kind, p, k) of the field of q = p^k elements behind size n, or None."""
    # Kind 1: n = q + 1 with q = 3 mod 4. Kind 2: n = 2 (q + 1) with q = 1 mod 4.
    for kind, q, remainder in ((1, n - 1, 3), (2, n // 2 - 1, 1)):
        # q is a prime power if its smallest prime factor p gives q = p^k.
        divisors = range(3, math.isqrt(q) + 1, 2)
        p = next((d for d in divisors if q % d == 0), q)
        k = round(math.log(q, p))
        if q % 4 == remainder and p**k == q:
            return kind, p, k
    return None


def _paley(n: int) -> Float[Tensor, "n n"]:
    """Return Paley's matrix of size n: I + S (kind 1), or a 2 x 2 block per entry of S (kind 2)."""
    field = _paley_field(n)
    assert field is not None
    kind, p, k = field
    q = p**k

    # chi(a - b) for all elements a and b; subtraction in the field is digit by digit modulo p.
    chi, digits = _quadratic_character(p, k)
    powers = p ** torch.arange(k)
    differences = (digits[:, None] - digits[None]) % p @ powers  # (q, q)

    # S: a border of ones around chi(a - b). It is antisymmetric for kind 1, symmetric for kind 2.
    s = torch.zeros(q + 1, q + 1)
    s[0, 1:] = 1.0
    s[1:, 0] = -1.0 if kind == 1 else 1.0
    s[1:, 1:] = chi[differences]
    if kind == 1:
        return s + torch.eye(n)

    # The diagonal of S is 0, so its 2 x 2 blocks come from the second product.
    diagonal_block = torch.tensor([[1.0, -1.0], [-1.0, -1.0]])
    return torch.kron(s, _sylvester()) + torch.kron(torch.eye(n // 2), diagonal_block)


def _quadratic_character(p: int, k: int) -> tuple[Float[Tensor, " q"], Int[Tensor, "q k"]]:
    """Return chi (0 for 0, 1 for squares, -1 otherwise) and the base-p digits of all elements."""
    # An element is a polynomial in t of degree below k with coefficients modulo p.
    q = p**k
    for c in product(range(p), repeat=k):
        powers = _powers_of_t(c, p)
        # If the powers of t are all nonzero elements, the even powers are the squares.
        if len(powers) == q - 1:
            chi = torch.zeros(q)
            chi[powers[0::2]] = 1.0
            chi[powers[1::2]] = -1.0
            numbers = torch.arange(q)
            digits = torch.stack([numbers // p**i % p for i in range(k)], dim=1)
            return chi, digits
    raise AssertionError("every finite field has a primitive element")


def _powers_of_t(c: tuple[int, ...], p: int) -> list[int]:
    """Return 1, t, t^2, ... as base-p numbers until one is 0 or repeats, with t^k = sum c_i t^i."""
    element = (1, *(0,) * (len(c) - 1))
    powers: dict[int, None] = {}  # a set that keeps the order
    while True:
        number = sum(digit * p**i for i, digit in enumerate(element))
        if number == 0 or number in powers:
            return list(powers)
        powers[number] = None

        # Multiply by t: shift the digits up, and replace t^k by c.
        top = element[-1]
        shifted = (0, *element[:-1])
        element = tuple((low + top * digit) % p for low, digit in zip(shifted, c, strict=True))
