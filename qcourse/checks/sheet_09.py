"""Sheet 09, low-bit floats: cases, references, tolerances, points and known mistakes.

The references look numbers up in a list of all magnitudes of a format; most mistakes are formulas
with one thing wrong. The magnitudes are exact in float32 and float64, and a power of two as a scale
keeps them exact, so cases may hold ties, and do. In 09.5 scales are not powers of two: there no
scale of a block lies near half-way between two numbers of E4M3. In 09.4 no largest value lies so
little below a power of two that a logarithm in float32 would round it to that power.
"""

from collections.abc import Callable
from math import frexp, ldexp
from typing import Any

import numpy as np
import torch
from torch import Generator, Tensor

from qcourse.checks.common import f64, make_cases, pick, uniform, until_told, variants, whole
from qcourse.checks.exercise import Case, Exercise, Mistake, Sheet

SIGN = 0b1_0000_000
NAN = 0b0_1111_111


def _e4m3_magnitudes() -> np.ndarray:
    # steps of 2^-9 up to 2^-5, then eight steps in each power of two
    parts = [np.arange(16) * 2.0**-9]
    for exponent in range(-5, 9):
        parts.append(np.arange(8, 16) * 2.0 ** (exponent - 3))
    # the code after the last number is NaN
    return np.concatenate(parts)[:NAN]


E4M3 = _e4m3_magnitudes()
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])


def _nearest(magnitudes: np.ndarray, size: np.ndarray) -> np.ndarray:
    """Return the index of the magnitude nearest to each size; at a tie, the even index."""
    halves = _half_way(magnitudes)
    below = np.searchsorted(halves, size, "left")
    above = np.searchsorted(halves, size, "right")
    # the two differ only at a tie, and then one of them is odd
    return np.where(below % 2, above, below)


def _half_way(magnitudes: np.ndarray) -> np.ndarray:
    return (magnitudes[1:] + magnitudes[:-1]) / 2


# 09.1 ---------------------------------------------------------------------------------------------


def _decode_cases(generator: Generator) -> list[Case]:
    # normal numbers and 0
    by_hand = [0b0_0111_000, 0b1_1000_100, 0b0_1010_101, 0b0_0000_000]
    # subnormal numbers, and the smallest normal one
    by_hand += [0b0_0000_001, 0b1_0000_110, 0b0_0001_000]
    # the highest exponent, and NaN
    by_hand += [0b0_1111_000, 0b1_1111_110, NAN, SIGN | NAN]

    # two codes each: below 1, above 1, subnormal, of the highest exponent
    drawn = []
    for low, high in (
        (8, 0b0_0110_111),
        (0b0_1000_001, 0b0_1110_111),
        (2, 7),
        (0b0_1111_001, 0b0_1111_101),
    ):
        for _ in range(2):
            sign = pick(generator, 0, SIGN)
            drawn.append(sign | int(whole(generator, low, high)))
    return make_cases(by_hand, drawn)


def _decoded(code: int) -> float:
    size = np.append(E4M3, np.nan)[code % SIGN]
    return -size if code >= SIGN else size


# Known mistakes.


def _fields(code: int) -> tuple[int, int, int]:
    """Return sign, exponent and mantissa."""
    return code >> 7, code >> 3 & 0b1111, code & 0b111


def _number(
    sign: int, e: int, m: int, *, bias: int = 7, subnormal: float | None = 2.0**-9
) -> float:
    """Return the number of the fields, without NaN.

    Args:
        subnormal: the step between numbers where e = 0; None for no subnormal numbers.
    """
    size = 2.0 ** (e - bias) * (1 + m / 8)
    if e == 0 and subnormal is not None:
        size = subnormal * m
    return -size if sign else size


def _by_formula(number: Callable[..., float] = _number, **wrong: Any) -> Callable[[int], float]:
    """Return the formula on the right fields, with something wrong in it."""

    def decode(code: int) -> float:
        return np.nan if code % SIGN == NAN else number(*_fields(code), **wrong)

    return decode


def _misread(
    fields: Callable[[int], tuple[int, int, int]],
) -> tuple[Callable[[int], float], Callable[[int], float]]:
    """Return the formula on wrong fields; NaN by all bits of the code, or by these fields."""

    def nan_by_code(code: int) -> float:
        return np.nan if code % SIGN == NAN else _number(*fields(code))

    def nan_by_fields(code: int) -> float:
        sign, e, m = fields(code)
        return np.nan if (e, m) == (0b1111, 0b111) else _number(sign, e, m)

    return nan_by_code, nan_by_fields


def _exponent_unmasked(code: int) -> tuple[int, int, int]:
    return code >> 7, code >> 3, code & 0b111


def _exponent_of_three_bits(code: int) -> tuple[int, int, int]:
    return code >> 7, code >> 4, code & 0b111


def _exponent_one_bit_short(code: int) -> tuple[int, int, int]:
    return code >> 7, code >> 4 & 0b111, code & 0b111


def _fields_of_e3m4(code: int) -> tuple[int, int, int]:
    return code >> 7, code >> 4 & 0b111, code & 0b1111


def _mantissa_first(code: int) -> tuple[int, int, int]:
    return code >> 7, code & 0b1111, code >> 4 & 0b111


def _fields_of_twos_complement(code: int) -> tuple[int, int, int]:
    return _fields(code if code < SIGN else SIGN + 256 - code)


def _with_infinity(sign: int, e: int, m: int) -> float:
    if e < 0b1111:
        return _number(sign, e, m)
    return np.nan if m else (-1) ** sign * np.inf


DECODE = Exercise(
    id="09.1",
    title="What a byte stands for",
    function="decode_e4m3",
    points=1,
    cases=_decode_cases,
    reference=_decoded,
    mistakes=(
        *variants(
            "another bias than 7",
            "The exponent field of the number 1 is 0111. Which exponent does 1 have, and what is"
            " taken off?",
            # the wrong bias for normal numbers only, or for all
            _by_formula(bias=0, subnormal=2.0**-9),
            _by_formula(bias=0, subnormal=2.0**-2),
            _by_formula(bias=8, subnormal=2.0**-9),
            _by_formula(bias=8, subnormal=2.0**-10),
        ),
        *variants(
            "no subnormal numbers",
            "How does your function make 0? And what lies between 0 and the first number with an"
            " exponent of 1?",
            _by_formula(subnormal=None),
            _by_formula(subnormal=0),
        ),
        Mistake(
            "the topmost exponent as infinity",
            _by_formula(_with_infinity),
            "What did E4M3 give up to have numbers beyond 240?",
        ),
        *variants(
            "the fields are read from the wrong bits",
            "Write the code with f'{code:08b}': which bits belong to the exponent, and which ones"
            " do you take?",
            *_misread(_exponent_unmasked),
            *_misread(_exponent_of_three_bits),
            *_misread(_exponent_one_bit_short),
            *_misread(_fields_of_e3m4),
            *_misread(_mantissa_first),
        ),
        *variants(
            "the sign as two's complement",
            "Codes 1 and 129 differ in one bit. Do their numbers differ in more than the sign?",
            *_misread(_fields_of_twos_complement),
        ),
    ),
)


# 09.2 ---------------------------------------------------------------------------------------------


def _sizes(generator: Generator) -> Tensor:
    """Return numbers (3, 6) of both signs over the range of E4M3, and some beyond both ends."""
    size = torch.exp2(uniform(generator, -11, 12, 3, 6))
    signs = 2 * whole(generator, 0, 1, 3, 6) - 1
    return size * signs


def _ties(generator: Generator) -> Tensor:
    """Return eight numbers half-way between two."""
    codes = whole(generator, 0, len(E4M3) - 2, 8)
    return torch.from_numpy(_half_way(E4M3)[codes.numpy()]).float()


def _encode_cases(generator: Generator) -> list[Case]:
    by_hand = [
        # ordinary numbers
        [1.0, -3.0, 0.0, 3.3, -0.3],
        # ties, one of them between two powers of two
        [1.0625, 1.1875, -1.9375, 13.5, 304.0],
        # rounded up into the next power of two
        [15.9, -1.97, 0.0156, 0.12],
        # below the smallest normal number
        [0.01, -0.002, 0.0009765625, 0.0029296875, -0.00001, 0.014],
        # saturated at the largest number
        [448.0, 460.0, -470.0, 1000.0, -100000.0],
    ]

    def draw() -> list[Tensor]:
        sizes = [_sizes(generator) for _ in range(3)]
        return [*sizes, _ties(generator)]

    return make_cases(by_hand, until_told(ENCODE, draw))


def _encoded(x: Any) -> np.ndarray:
    codes = _nearest(E4M3, np.abs(f64(x)))
    return _sign_bit(codes, f64(x) < 0)


def _sign_bit(codes: np.ndarray, negative: np.ndarray) -> np.ndarray:
    return codes + SIGN * negative


# Known mistakes.


def _steps(x: Any, lowest: int = -6) -> tuple[np.ndarray, np.ndarray]:
    """Return the exponent of each x, at least the lowest, and |x| in the steps of that exponent."""
    size = np.abs(f64(x))
    exponent = np.maximum(np.frexp(size)[1] - 1, lowest)
    exponent[size == 0] = lowest
    return exponent, size / 2.0**exponent * 8


def _by_steps(
    rounded: Callable[[np.ndarray], np.ndarray] = np.rint,
    *,
    last: float = NAN - 1,
    signed: Callable[[np.ndarray, np.ndarray], np.ndarray] = _sign_bit,
) -> Callable[[Any], np.ndarray]:
    """Return the lesson's formula, with another rounding, last code or sign."""

    def encode(x: Any) -> np.ndarray:
        exponent, steps = _steps(x)
        codes = rounded(steps) + 8 * (exponent + 6)
        saturated = np.minimum(codes, last).astype(np.int64)
        return signed(saturated, f64(x) < 0)

    return encode


def _without_carry(mantissa: Callable[[np.ndarray], np.ndarray]) -> Callable[[Any], np.ndarray]:
    """Return the formula that rounds the mantissa to three bits and keeps the exponent."""

    def encode(x: Any) -> np.ndarray:
        exponent, steps = _steps(x)
        normal = steps >= 8
        m = mantissa(np.rint(steps) - 8 * normal)
        codes = m + 8 * (exponent + 6 + normal)
        saturated = np.minimum(codes, NAN - 1).astype(np.int64)
        return _sign_bit(saturated, f64(x) < 0)

    return encode


def _half_up(steps: np.ndarray) -> np.ndarray:
    return np.floor(steps + 0.5)


def _half_down(steps: np.ndarray) -> np.ndarray:
    return np.ceil(steps - 0.5)


def _wrapped_to_a_byte(codes: np.ndarray, negative: np.ndarray) -> np.ndarray:
    return codes + SIGN * negative & 0xFF


def _sign_or_code(codes: np.ndarray, negative: np.ndarray) -> np.ndarray:
    return codes | SIGN * negative


def _seven_bits_and_sign(codes: np.ndarray, negative: np.ndarray) -> np.ndarray:
    return codes & NAN | SIGN * negative


def _wrapped_to_three_bits(m: np.ndarray) -> np.ndarray:
    return m % 8


def _at_most_seven(m: np.ndarray) -> np.ndarray:
    return np.minimum(m, 7)


def _leading_one(x: Any) -> np.ndarray:
    """Treat exponent field 0 like the others; smaller numbers become 0."""
    exponent, steps = _steps(x, lowest=-7)
    codes = np.rint(steps) - 8 + 8 * (exponent + 7)
    saturated = np.clip(codes, 0, NAN - 1).astype(np.int64)
    return _sign_bit(saturated, f64(x) < 0)


def _flushed(x: Any) -> np.ndarray:
    subnormal = np.abs(f64(x)) < 2.0**-6
    signed_zero = SIGN * (f64(x) < 0)
    return np.where(subnormal, signed_zero, _encoded(x))


ENCODE = Exercise(
    id="09.2",
    title="The nearest number, as a code",
    function="encode_e4m3",
    points=3,
    cases=_encode_cases,
    reference=_encoded,
    mistakes=(
        *variants(
            "ties do not go to the even code",
            "1.0625 lies just between codes 56 and 57: which of them ends in 0?",
            _by_steps(_half_up),
            _by_steps(_half_down),
        ),
        Mistake(
            "cut off, not rounded",
            _by_steps(np.floor),
            "1.97 has 1.875 below and 2 above: which is nearer, and which did you take?",
        ),
        *variants(
            "nothing is saturated",
            "How many powers of two fit into four bits? What becomes of the code of a number beyond"
            " them?",
            _by_steps(last=np.inf),
            _by_steps(last=np.inf, signed=_wrapped_to_a_byte),
            _by_steps(last=np.inf, signed=_sign_or_code),
            _by_steps(last=np.inf, signed=_seven_bits_and_sign),
        ),
        *variants(
            "a mantissa that is rounded up to 8 is lost",
            "1.97 is nearest to 2. If the mantissa is rounded up beyond the last of its eight"
            " steps, what happens to the exponent?",
            _without_carry(_wrapped_to_three_bits),
            _without_carry(_at_most_seven),
        ),
        *variants(
            "no subnormal numbers",
            "Which step do numbers have below the smallest normal one? Try 0.002, and decode what"
            " you get.",
            _leading_one,
            _flushed,
        ),
    ),
)


# 09.3 ---------------------------------------------------------------------------------------------

SPECIALS = "ieee", "nan", "none"
AS_IS = dict(zip(SPECIALS, SPECIALS, strict=True))


def _limits_cases(generator: Generator) -> list[Case]:
    # E4M3, E5M2, E2M1, float16, and a format with an unusual bias
    by_hand = [
        (4, 3, 7, "nan"),
        (5, 2, 15, "ieee"),
        (2, 1, 1, "none"),
        (5, 10, 15, "ieee"),
        (3, 1, 5, "nan"),
    ]

    # unusual biases, and each kind of special values
    drawn = []
    for number, (e, m) in enumerate(((2, 4), (3, 3), (4, 2), (5, 2), (4, 1))):
        usual_bias = 2 ** (e - 1) - 1
        bias = usual_bias + pick(generator, -1, 1, 2, 3)
        drawn.append((e, m, bias, SPECIALS[number % 3]))
    return make_cases(by_hand, drawn)


def _limits(
    exponent_bits: int, mantissa_bits: int, bias: int, specials: str
) -> tuple[float, float]:
    # "ieee" gives a whole exponent to special values, "nan" one code
    steps = 2**mantissa_bits
    left_off = {"ieee": steps, "nan": 1, "none": 0}[specials]
    last_code = 2**exponent_bits * steps - 1 - left_off

    # (1 + m / steps) 2^(e - bias), and the first subnormal number
    e, m = divmod(last_code, steps)
    largest = ldexp(steps + m, e - bias - mantissa_bits)
    smallest = ldexp(1, 1 - bias - mantissa_bits)
    return largest, smallest


# Known mistakes.


def _read_as(read: dict[str, str]) -> Callable[..., tuple[float, float]]:
    """Return the limits with some kinds of special values taken for others."""

    def limits(e: int, m: int, bias: int, specials: str) -> tuple[float, float]:
        return _limits(e, m, bias, read[specials])

    return limits


def _largest_from(factor: Callable[[float], float]) -> Callable[..., tuple[float, float]]:
    """Return the limits with the largest number computed from its power of two only."""

    def limits(e: int, m: int, bias: int, specials: str) -> tuple[float, float]:
        largest, smallest = _limits(e, m, bias, specials)
        power = ldexp(0.5, frexp(largest)[1])
        return factor(power), smallest

    return limits


def _smallest_times(factor: Callable[[int], float]) -> Callable[..., tuple[float, float]]:
    """Return the limits with a smallest number that is too large by a factor of m."""

    def limits(e: int, m: int, bias: int, specials: str) -> tuple[float, float]:
        largest, smallest = _limits(e, m, bias, specials)
        return largest, smallest * factor(m)

    return limits


def _same(power: float) -> float:
    return power


def _doubled(power: float) -> float:
    return 2 * power


def _full_mantissa(m: int) -> float:
    return 2**m


def _half(m: int) -> float:
    return 0.5


LIMITS = Exercise(
    id="09.3",
    title="Both ends of any format",
    function="limits",
    points=2,
    cases=_limits_cases,
    reference=_limits,
    mistakes=(
        *variants(
            "one NaN costs a whole exponent",
            "With 'nan' one code is no number. Which numbers of the topmost exponent are left?",
            _read_as({**AS_IS, "nan": "ieee"}),
            _read_as(dict.fromkeys(SPECIALS, "ieee")),
        ),
        *variants(
            "codes that stand for no number are counted",
            "Is the code of all ones, below the sign, a number in each of the three kinds of"
            " formats?",
            _read_as({**AS_IS, "nan": "none"}),
            _read_as({**AS_IS, "ieee": "nan"}),
            _read_as(dict.fromkeys(SPECIALS, "none")),
        ),
        Mistake(
            "a smallest number with a full mantissa",
            _smallest_times(_full_mantissa),
            "What lies between 0 and the smallest normal number?",
        ),
        Mistake(
            "subnormal numbers of another exponent",
            _smallest_times(_half),
            "Which exponent do numbers have where the field is 0: that of field 0, or that of"
            " field 1?",
        ),
        *variants(
            "the mantissa of the largest number",
            "Which mantissa has the largest number, and how much is it worth? Try E2M1, which ends"
            " at 6.",
            _largest_from(_same),
            _largest_from(_doubled),
        ),
    ),
)


# 09.4 ---------------------------------------------------------------------------------------------

# no largest value of a block lies within this share below a power of two
FREE = 1e-3


def _block_case(generator: Generator, count: int, low: float, high: float) -> Tensor:
    """Return a block whose largest value is negative, and low to high times a power of two."""
    x = torch.randn(count, generator=generator)
    factor = float(uniform(generator, low, high))
    power = 2.0 ** int(whole(generator, -6, 5))
    x *= factor * power / x.abs().max()
    return x if x.max() < -x.min() else -x


def _block_cases(generator: Generator) -> list[Case]:
    by_hand = [
        [1.8, -10.0, 4.8, 15.0],
        # a power of two as the largest
        [0.25, -1.0, 0.375, 0.7],
        [-0.365, 0.21, 0.01, 0.08],
        # ties
        [-26.0, 3.0, 10.0, -7.0, 5.0, 14.0],
    ]

    # the largest value low, in the middle, high, anywhere, or just above a power of two
    drawn = []
    for count, low, high in (
        (8, 1.05, 1.4),
        (8, 1.6, 1.7),
        (32, 1.8, 2 - FREE),
        (32, 1.05, 2 - FREE),
        (4, 1.005, 1.05),
    ):
        drawn.append(_block_case(generator, count, low, high))
    return make_cases(by_hand, [*drawn, _tied_block(generator)])


def _tied_block(generator: Generator) -> Tensor:
    """Return a shuffled block of all ties of E2M1 and one value beyond 6."""
    ties = torch.from_numpy(_half_way(E2M1)).float()
    signs = 2 * whole(generator, 0, 1, 7) - 1
    largest = uniform(generator, -7.9, -6.4, 1)
    steps = torch.cat([ties * signs, largest])
    order = torch.randperm(8, generator=generator)
    power = 2.0 ** int(whole(generator, -6, 5))
    return steps[order] * power


def _amax(x: Any) -> float:
    return np.abs(f64(x)).max()


def _power(x: Any) -> float:
    """Return the exponent of the block's largest value minus 2, the exponent of 6."""
    exponent = frexp(_amax(x))[1] - 1
    return float(exponent - 2)


def _to_e2m1(x: np.ndarray) -> np.ndarray:
    return np.sign(x) * E2M1[_nearest(E2M1, np.abs(x))]


def _in_block(
    exponent: Callable[[Any], float] = _power,
    rounded: Callable[[np.ndarray], np.ndarray] = _to_e2m1,
) -> Callable[[Any], tuple[float, np.ndarray]]:
    """Return a function for the exponent and the dequantized block, with a rule for each."""

    def block(x: Any) -> tuple[float, np.ndarray]:
        power = exponent(x)
        scale = 2.0**power
        return power, rounded(f64(x) / scale) * scale

    return block


# Known mistakes.


def _by_log2(rounded: Callable[[float], float], top: float) -> Callable[[Any], float]:
    """Return a rule for the exponent: log2 of the largest value in units of `top`, rounded."""

    def exponent(x: Any) -> float:
        return float(rounded(np.log2(_amax(x) / top)))

    return exponent


def _ties_away(x: np.ndarray) -> np.ndarray:
    places = np.searchsorted(_half_way(E2M1), np.abs(x), "right")
    return np.sign(x) * E2M1[places]


def _ties_to_zero(x: np.ndarray) -> np.ndarray:
    places = np.searchsorted(_half_way(E2M1), np.abs(x), "left")
    return np.sign(x) * E2M1[places]


def _power_of_max(x: Any) -> float:
    exponent = np.frexp(f64(x).max())[1] - 1
    return float(exponent - 2)


BLOCK = Exercise(
    id="09.4",
    title="A block under a power of two",
    function="mx_block",
    points=3,
    cases=_block_cases,
    reference=_in_block(),
    mistakes=(
        *variants(
            "the exponent is not rounded down",
            "log2 of the largest value lies between two whole numbers: which of them does the"
            " standard take?",
            _in_block(_by_log2(np.ceil, 4)),
            _in_block(_by_log2(np.rint, 4)),
        ),
        *variants(
            "measured against 6, not against its power of two",
            "The exponent is a difference of two whole exponents: which one belongs to 6?",
            _in_block(_by_log2(np.floor, 6)),
            _in_block(_by_log2(np.ceil, 6)),
            _in_block(_by_log2(np.rint, 6)),
        ),
        Mistake(
            "the format's own exponent is forgotten",
            _in_block(_by_log2(np.floor, 1)),
            "In units of your scale, where does the largest value of the block lie? How much of"
            " E2M1 is used?",
        ),
        *variants(
            "ties do not go to the even code",
            "5 lies just between 4 and 6: which of them has a mantissa of 0?",
            _in_block(rounded=_ties_away),
            _in_block(rounded=_ties_to_zero),
        ),
        Mistake(
            "x, not |x|",
            _in_block(_power_of_max),
            "Which value of the block lies farthest from 0, if that one is negative?",
        ),
    ),
)


# 09.5 ---------------------------------------------------------------------------------------------

# no scale lies within this relative distance of half-way between two numbers of E4M3
HALF_WAY = 1e-4


def _scales_case(generator: Generator, rows: int, groups: int, size: int) -> tuple[Tensor, int]:
    """Return weights whose blocks differ in size, the largest value negative."""
    halves = _half_way(E4M3)[1:]
    while True:
        block_scales = torch.exp2(uniform(generator, -5, 0, rows, groups, 1))
        power = 2.0 ** int(whole(generator, -6, 3))
        x = torch.randn(rows, groups, size, generator=generator) * (block_scales * power)
        x = x.reshape(rows, groups * size)
        if x.max() > -x.min():
            x = -x

        # the scales of the blocks before rounding
        exact = f64(_blocks(x, size)) * 448 / _amax(x)
        distances = np.abs(exact[..., None] / halves - 1)
        if (distances > HALF_WAY).all():
            return x, size


def _scales_cases(generator: Generator) -> list[Case]:
    # one row, two rows, blocks of three
    by_hand = [
        ([[1.0, -8.0, 0.5, 0.3]], 2),
        ([[3.0, 0.5, -1.0, 0.25], [-6.0, 2.0, 0.1, -0.2]], 2),
        ([[-1.4, 0.2, 0.7, 0.1, -0.6, 0.4]], 3),
    ]
    drawn = [_scales_case(generator, *shape) for shape in ((2, 3, 4), (4, 4, 4), (3, 4, 16))]
    return make_cases(by_hand, drawn)


def _blocks(x: Any, size: int) -> np.ndarray:
    """Return amax of each block, (out, in / size)."""
    blocks = np.abs(f64(x)).reshape(len(x), -1, size)
    return blocks.max(axis=-1)


def _to_e4m3(x: np.ndarray) -> np.ndarray:
    return np.sign(x) * E4M3[_nearest(E4M3, np.abs(x))]


def _two_scales(
    top: float = 6 * 448,
    rounded: Callable[[np.ndarray], np.ndarray] = _to_e4m3,
    *,
    blocks: Callable[[Any, int], np.ndarray] = _blocks,
    largest: Callable[[Any], float] = _amax,
) -> Callable[..., tuple[float, np.ndarray]]:
    """Return a function for the tensor's scale, amax / top, and the blocks' scales in its units."""

    def scales(x: Any, block_size: int) -> tuple[float, np.ndarray]:
        tensor_scale = largest(x) / top
        block_scales = blocks(x, block_size) / 6 / tensor_scale
        return tensor_scale, rounded(block_scales)

    return scales


# Known mistakes.


def _not_rounded(scales: np.ndarray) -> np.ndarray:
    return scales


def _power_below(scales: np.ndarray) -> np.ndarray:
    return 2.0 ** np.floor(np.log2(scales))


def _power_above(scales: np.ndarray) -> np.ndarray:
    return 2.0 ** np.ceil(np.log2(scales))


def _nearest_power(scales: np.ndarray) -> np.ndarray:
    return 2.0 ** np.rint(np.log2(scales))


def _max(x: Any) -> float:
    return f64(x).max()


def _blocks_by_max(x: Any, size: int) -> np.ndarray:
    return f64(x).reshape(len(x), -1, size).max(axis=-1)


def _scales_alone(x: Any, block_size: int) -> tuple[float, np.ndarray]:
    return _amax(x) / (6 * 448), _to_e4m3(_blocks(x, block_size) / 6)


SCALES = Exercise(
    id="09.5",
    title="A scale for the scales",
    function="nvfp4_scales",
    points=3,
    cases=_scales_cases,
    reference=_two_scales(),
    mistakes=(
        *variants(
            "one of the two ends, 6 and 448, is left out",
            "What is the largest scale that a block gets from you, and what is the largest that"
            " E4M3 has?",
            _two_scales(6),
            _two_scales(448),
            _two_scales(1),
        ),
        Mistake(
            "the scales of blocks know nothing of the tensor's",
            _scales_alone,
            "A value is its code times one scale times the other. What is the product of your two"
            " scales?",
        ),
        Mistake(
            "the scales of blocks are not rounded",
            _two_scales(rounded=_not_rounded),
            "Each of them has to fit in one byte: which numbers does that byte have?",
        ),
        *variants(
            "the scales of blocks are powers of two",
            "That is what MX does. How many bits of mantissa has a scale of NVFP4?",
            _two_scales(rounded=_power_below),
            _two_scales(rounded=_power_above),
            _two_scales(rounded=_nearest_power),
        ),
        *variants(
            "x, not |x|",
            "Which value of a block lies farthest from 0, if that one is negative?",
            _two_scales(blocks=_blocks_by_max, largest=_amax),
            _two_scales(blocks=_blocks_by_max, largest=_max),
        ),
    ),
)


SHEET = Sheet("09", "Low-bit floats", (DECODE, ENCODE, LIMITS, BLOCK, SCALES))
