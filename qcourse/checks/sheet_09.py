"""Sheet 09, low-bit floats: cases, references, tolerances, points and known mistakes.

The references look numbers up in a list of all magnitudes that a format has; most mistakes are the formulas that people
write instead, with one thing wrong. The magnitudes are exact in float32 and float64 alike, and a power of two as a
scale moves none of them, so ties may be asked for, and are. In 09.5 scales are no powers of two: there no scale of a
block lies near to half-way between two numbers of E4M3. In 09.4 no largest value lies so little below a power of two
that a logarithm in float32 would take it for that.
"""

from collections.abc import Callable
from math import frexp, ldexp
from typing import Any

import numpy as np
import torch
from torch import Generator, Tensor

from qcourse.checks.common import f64, make_cases, pick, uniform, until_told, whole
from qcourse.checks.exercise import Case, Exercise, Mistake, Sheet

SIGN = 0b1_0000_000
NAN = 0b0_1111_111
# Steps of 2^-9 up to 2^-5, then eight steps in each power of two; the code of the last would be that of NaN.
E4M3 = np.concatenate(
    [np.arange(16) * 2.0**-9, *(np.arange(8, 16) * 2.0 ** (e - 3) for e in range(-5, 9))]
)[:NAN]
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])


def _nearest(magnitudes: np.ndarray, size: np.ndarray) -> np.ndarray:
    """The places of the magnitudes nearest to size; half-way between two, the even place."""
    halves = (magnitudes[1:] + magnitudes[:-1]) / 2
    below, above = np.searchsorted(halves, size, "left"), np.searchsorted(halves, size, "right")
    return np.where(
        below % 2, above, below
    )  # these differ at a tie alone, and then one of them is odd


# 09.1 -------------------------------------------------------------------------------------------------------------


def _decode_cases(generator: Generator) -> list[Case]:
    by_hand = (
        *(0b0_0111_000, 0b1_1000_100, 0b0_1010_101, 0b0_0000_000),
        *(0b0_0000_001, 0b1_0000_110, 0b0_0001_000),  # subnormal, and the first that is not
        *(0b0_1111_000, 0b1_1111_110, NAN, SIGN | NAN),
    )
    drawn = [
        pick(generator, 0, SIGN) | int(whole(generator, low, high))
        for low, high in (
            (8, 0b0_0110_111),
            (0b0_1000_001, 0b0_1110_111),
            (2, 7),
            (0b0_1111_001, 0b0_1111_101),
        )
        for _ in range(2)
    ]
    return make_cases(by_hand, drawn)


def _decoded(code: int) -> float:
    size = np.append(E4M3, np.nan)[code % SIGN]
    return -size if code >= SIGN else size


def _fields(code: int) -> tuple[int, int, int]:
    return code >> 7, code >> 3 & 0b1111, code & 0b111


def _number(
    sign: int, e: int, m: int, *, bias: int = 7, subnormal: float | None = 2.0**-9
) -> float:
    """What the fields stand for by the formula, without NaN; subnormal is the step where e = 0, None for none."""
    size = subnormal * m if e == 0 and subnormal is not None else 2.0 ** (e - bias) * (1 + m / 8)
    return -size if sign else size


def _by_formula(number: Callable[..., float] = _number, **wrong: Any) -> Callable[[int], float]:
    """The formula on the right fields, with something wrong in it."""
    return lambda code: np.nan if code % SIGN == NAN else number(*_fields(code), **wrong)


def _misread(
    fields: Callable[[int], tuple[int, int, int]], *, nan_first: bool
) -> Callable[[int], float]:
    """The formula on wrong fields; whether a code is NaN is seen from all its bits, or from these fields."""

    def decode(code: int) -> float:
        sign, e, m = fields(code)
        nan = code % SIGN == NAN if nan_first else (e, m) == (0b1111, 0b111)
        return np.nan if nan else _number(sign, e, m)

    return decode


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
        *(
            Mistake(
                "another bias than 7",
                _by_formula(bias=bias, subnormal=subnormal),
                "The exponent field of the number 1 is 0111. Which exponent does 1 have, and what is taken off?",
            )
            for bias in (0, 8)
            for subnormal in (2.0**-9, 2.0 ** (-2 - bias))
        ),
        *(
            Mistake(
                "no subnormal numbers",
                _by_formula(subnormal=subnormal),
                "How does your function make 0? And what lies between 0 and the first number with an exponent of 1?",
            )
            for subnormal in (None, 0)
        ),
        Mistake(
            "the topmost exponent as infinity",
            _by_formula(_with_infinity),
            "What did E4M3 give up, so as to have numbers beyond 240?",
        ),
        *(
            Mistake(
                "the fields are read from the wrong bits",
                _misread(fields, nan_first=nan_first),
                "Write the code with f'{code:08b}': which bits belong to the exponent, and are yours these?",
            )
            for fields in (
                lambda code: (code >> 7, code >> 3, code & 0b111),
                lambda code: (code >> 7, code >> 4, code & 0b111),
                lambda code: (code >> 7, code >> 4 & 0b111, code & 0b111),
                lambda code: (code >> 7, code >> 4 & 0b111, code & 0b1111),
                lambda code: (code >> 7, code & 0b1111, code >> 4 & 0b111),
            )
            for nan_first in (True, False)
        ),
        *(
            Mistake(
                "the sign as two's complement",
                _misread(
                    lambda code: _fields(code if code < SIGN else SIGN + 256 - code),
                    nan_first=nan_first,
                ),
                "Codes 1 and 129 differ in one bit. Do their numbers differ in more than the sign?",
            )
            for nan_first in (True, False)
        ),
    ),
)


# 09.2 -------------------------------------------------------------------------------------------------------------


def _sizes(generator: Generator) -> Tensor:
    """Numbers of both signs over all powers of two that E4M3 has, and some beyond either end, (3, 6)."""
    size = torch.exp2(uniform(generator, -11, 12, 3, 6))
    return size * (2 * whole(generator, 0, 1, 3, 6) - 1)


def _ties(generator: Generator) -> Tensor:
    """Numbers half-way between two, (8,)."""
    codes = whole(generator, 0, len(E4M3) - 2, 8)
    return torch.tensor(
        [(E4M3[code] + E4M3[code + 1]) / 2 for code in codes.tolist()], dtype=torch.float32
    )


def _encode_cases(generator: Generator) -> list[Case]:
    by_hand = [
        [1.0, -3.0, 0.0, 3.3, -0.3],
        [1.0625, 1.1875, -1.9375, 13.5, 304.0],  # ties, one of them between two powers of two
        [15.9, -1.97, 0.0156, 0.12],  # rounded up into the next power of two
        [
            0.01,
            -0.002,
            0.0009765625,
            0.0029296875,
            -0.00001,
            0.014,
        ],  # below the smallest normal number
        [448.0, 460.0, -470.0, 1000.0, -100000.0],
    ]
    drawn = until_told(ENCODE, lambda: [*(_sizes(generator) for _ in range(3)), _ties(generator)])
    return make_cases(by_hand, drawn)


def _encoded(x: Any) -> np.ndarray:
    return _nearest(E4M3, np.abs(f64(x))) + SIGN * (f64(x) < 0)


def _sign_bit(codes: np.ndarray, negative: np.ndarray) -> np.ndarray:
    return codes + SIGN * negative


def _steps(x: Any, lowest: int = -6) -> tuple[np.ndarray, np.ndarray]:
    """The exponent of each x, at least the lowest, and x in the steps that are there."""
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
    """The lesson's formula, with another rounding, another last code or another sign."""

    def encode(x: Any) -> np.ndarray:
        exponent, steps = _steps(x)
        codes = np.minimum(rounded(steps) + 8 * (exponent + 6), last).astype(np.int64)
        return signed(codes, f64(x) < 0)

    return encode


def _without_carry(mantissa: Callable[[np.ndarray], np.ndarray]) -> Callable[[Any], np.ndarray]:
    """The mantissa is rounded by itself, and must fit its three bits; the exponent stays."""

    def encode(x: Any) -> np.ndarray:
        exponent, steps = _steps(x)
        normal = steps >= 8
        m = mantissa(np.rint(steps) - 8 * normal)
        codes = np.minimum(m + 8 * (exponent + 6 + normal), NAN - 1).astype(np.int64)
        return _sign_bit(codes, f64(x) < 0)

    return encode


def _leading_one(x: Any) -> np.ndarray:
    """An exponent of 0 is one like any other; below it there is only 0."""
    exponent, steps = _steps(x, lowest=-7)
    codes = np.clip(np.rint(steps) - 8 + 8 * (exponent + 7), 0, NAN - 1).astype(np.int64)
    return _sign_bit(codes, f64(x) < 0)


def _flushed(x: Any) -> np.ndarray:
    return np.where(np.abs(f64(x)) < 2.0**-6, SIGN * (f64(x) < 0), _encoded(x))


ENCODE = Exercise(
    id="09.2",
    title="The nearest number, as a code",
    function="encode_e4m3",
    points=3,
    cases=_encode_cases,
    reference=_encoded,
    mistakes=(
        *(
            Mistake(
                "ties do not go to the even code",
                _by_steps(rounded),
                "1.0625 lies just between codes 56 and 57: which of them ends in 0?",
            )
            for rounded in (lambda steps: np.floor(steps + 0.5), lambda steps: np.ceil(steps - 0.5))
        ),
        Mistake(
            "cut off, not rounded",
            _by_steps(np.floor),
            "1.97 has 1.875 below and 2 above: which is nearer, and which did you take?",
        ),
        *(
            Mistake(
                "nothing is saturated",
                function,
                "How many powers of two fit into four bits? What becomes of the code of a number beyond them?",
            )
            for function in (
                _by_steps(last=np.inf),
                _by_steps(
                    last=np.inf, signed=lambda codes, negative: codes + SIGN * negative & 0xFF
                ),
                _by_steps(last=np.inf, signed=lambda codes, negative: codes | SIGN * negative),
                _by_steps(
                    last=np.inf, signed=lambda codes, negative: codes & NAN | SIGN * negative
                ),
            )
        ),
        *(
            Mistake(
                "a mantissa that is rounded up to 8 is lost",
                _without_carry(mantissa),
                "1.97 is nearest to 2. What is rounded up beyond the last of eight steps, and who has to hear of it?",
            )
            for mantissa in (lambda m: m % 8, lambda m: np.minimum(m, 7))
        ),
        *(
            Mistake(
                "no subnormal numbers",
                function,
                "Which step do numbers have below the smallest normal one? Try 0.002, and decode what you get.",
            )
            for function in (_leading_one, _flushed)
        ),
    ),
)


# 09.3 -------------------------------------------------------------------------------------------------------------

SPECIALS = "ieee", "nan", "none"
AS_IS = dict(zip(SPECIALS, SPECIALS, strict=True))


def _limits_cases(generator: Generator) -> list[Case]:
    by_hand = [
        (4, 3, 7, "nan"),  # E4M3
        (5, 2, 15, "ieee"),  # E5M2
        (2, 1, 1, "none"),  # E2M1
        (5, 10, 15, "ieee"),  # float16
        (3, 1, 5, "nan"),
    ]
    sizes = ((2, 4), (3, 3), (4, 2), (5, 2), (4, 1))
    biases = [2 ** (e - 1) - 1 + pick(generator, -1, 1, 2, 3) for e, _ in sizes]
    drawn = [
        (e, m, bias, SPECIALS[number % 3])
        for number, ((e, m), bias) in enumerate(zip(sizes, biases, strict=True))
    ]
    return make_cases(by_hand, drawn)


def _limits(
    exponent_bits: int, mantissa_bits: int, bias: int, specials: str
) -> tuple[float, float]:
    steps = 2**mantissa_bits
    left_off = {"ieee": steps, "nan": 1, "none": 0}[specials]
    e, m = divmod(2**exponent_bits * steps - 1 - left_off, steps)
    return ldexp(steps + m, e - bias - mantissa_bits), ldexp(1, 1 - bias - mantissa_bits)


def _read_as(read: dict[str, str]) -> Callable[..., tuple[float, float]]:
    """Some specials taken for others: what each of them is read as."""
    return lambda e, m, bias, specials: _limits(e, m, bias, read[specials])


def _largest_from(factor: Callable[[float], float]) -> Callable[..., tuple[float, float]]:
    """The largest number from the power of two that it is in alone."""

    def limits(e: int, m: int, bias: int, specials: str) -> tuple[float, float]:
        largest, smallest = _limits(e, m, bias, specials)
        return factor(ldexp(0.5, frexp(largest)[1])), smallest

    return limits


def _smallest_times(factor: Callable[[int], float]) -> Callable[..., tuple[float, float]]:
    """A smallest number that is so many times too large."""

    def limits(e: int, m: int, bias: int, specials: str) -> tuple[float, float]:
        largest, smallest = _limits(e, m, bias, specials)
        return largest, smallest * factor(m)

    return limits


LIMITS = Exercise(
    id="09.3",
    title="Both ends of any format",
    function="limits",
    points=2,
    cases=_limits_cases,
    reference=_limits,
    mistakes=(
        *(
            Mistake(
                "one NaN costs a whole exponent",
                function,
                "With 'nan' one code is no number. Which numbers of the topmost exponent are left?",
            )
            for function in (
                _read_as({**AS_IS, "nan": "ieee"}),
                _read_as(dict.fromkeys(SPECIALS, "ieee")),
            )
        ),
        *(
            Mistake(
                "codes that stand for no number are counted",
                function,
                "Is the code of all ones, below the sign, a number in each of the three kinds of formats?",
            )
            for function in (
                _read_as({**AS_IS, "nan": "none"}),
                _read_as({**AS_IS, "ieee": "nan"}),
                _read_as(dict.fromkeys(SPECIALS, "none")),
            )
        ),
        Mistake(
            "a smallest number with a full mantissa",
            _smallest_times(lambda m: 2**m),
            "What lies between 0 and the smallest normal number?",
        ),
        Mistake(
            "subnormal numbers of another exponent",
            _smallest_times(lambda m: 0.5),
            "Which exponent do numbers have where the field is 0: that of field 0, or that of field 1?",
        ),
        *(
            Mistake(
                "the mantissa of the largest number",
                _largest_from(factor),
                "Which mantissa has the largest number, and how much is it worth? Try E2M1, which ends at 6.",
            )
            for factor in (lambda power: power, lambda power: 2 * power)
        ),
    ),
)


# 09.4 -------------------------------------------------------------------------------------------------------------

FREE = 1e-3  # of a power of two: how little below it no largest value may lie


def _block_case(generator: Generator, count: int, low: float, high: float) -> Tensor:
    """A block whose largest value is negative, and from low to high times a power of two."""
    x = torch.randn(count, generator=generator)
    x *= float(uniform(generator, low, high)) * 2.0 ** int(whole(generator, -6, 5)) / x.abs().max()
    return x if x.max() < -x.min() else -x


def _block_cases(generator: Generator) -> list[Case]:
    by_hand = [
        [1.8, -10.0, 4.8, 15.0],
        [0.25, -1.0, 0.375, 0.7],  # a power of two as the largest
        [-0.365, 0.21, 0.01, 0.08],
        [-26.0, 3.0, 10.0, -7.0, 5.0, 14.0],  # ties
    ]
    ranges = ((1.05, 1.4), (1.6, 1.7), (1.8, 2 - FREE), (1.05, 2 - FREE), (1.005, 1.05))
    drawn = [
        _block_case(generator, count, *ends)
        for count, ends in zip((8, 8, 32, 32, 4), ranges, strict=True)
    ]
    return make_cases(by_hand, [*drawn, _tied_block(generator)])


def _tied_block(generator: Generator) -> Tensor:
    """A block of all ties of E2M1, and one value beyond 6, in an order of its own."""
    ties = (torch.from_numpy(E2M1[1:] + E2M1[:-1]) / 2).float()
    signs = 2 * whole(generator, 0, 1, 7) - 1
    steps = torch.cat([ties * signs, uniform(generator, -7.9, -6.4, 1)])
    return steps[torch.randperm(8, generator=generator)] * 2.0 ** int(whole(generator, -6, 5))


def _amax(x: Any) -> float:
    return np.abs(f64(x)).max()


def _power(x: Any) -> float:
    """The power of two that the block's largest value is in, less 2, the one that 6 is in."""
    return float(frexp(_amax(x))[1] - 1 - 2)


def _to_e2m1(x: np.ndarray) -> np.ndarray:
    return np.sign(x) * E2M1[_nearest(E2M1, np.abs(x))]


def _in_block(
    exponent: Callable[[Any], float] = _power,
    rounded: Callable[[np.ndarray], np.ndarray] = _to_e2m1,
    *,
    back: bool = True,
) -> Callable[[Any], tuple[float, np.ndarray]]:
    """The exponent and what comes back, with another rule for either."""

    def block(x: Any) -> tuple[float, np.ndarray]:
        power = exponent(x)
        return power, rounded(f64(x) / 2.0**power) * (2.0**power if back else 1)

    return block


def _by_log2(rounded: Callable[[float], float], top: float) -> Callable[[Any], float]:
    """The exponent from log2 of the largest value and of what it should become."""
    return lambda x: float(rounded(np.log2(_amax(x) / top)))


def _ties_to(side: str) -> Callable[[np.ndarray], np.ndarray]:
    """A tie goes away from 0 ("right") or towards it ("left")."""
    return lambda x: np.sign(x) * E2M1[np.searchsorted((E2M1[1:] + E2M1[:-1]) / 2, np.abs(x), side)]  # type: ignore[call-overload]


BLOCK = Exercise(
    id="09.4",
    title="A block under a power of two",
    function="mx_block",
    points=3,
    cases=_block_cases,
    reference=_in_block(),
    mistakes=(
        *(
            Mistake(
                "the exponent is not rounded down",
                _in_block(_by_log2(rounded, 4)),
                "log2 of the largest value lies between two whole numbers: which of them does the standard take?",
            )
            for rounded in (np.ceil, np.rint)
        ),
        *(
            Mistake(
                "measured against 6, not against its power of two",
                _in_block(_by_log2(rounded, 6)),
                "Two exponents are taken from each other, each of them whole: which one belongs to 6?",
            )
            for rounded in (np.floor, np.ceil, np.rint)
        ),
        Mistake(
            "the format's own exponent is forgotten",
            _in_block(_by_log2(np.floor, 1)),
            "In units of your scale, where does the largest value of the block lie? How much of E2M1 is used?",
        ),
        *(
            Mistake(
                "ties do not go to the even code",
                _in_block(rounded=_ties_to(side)),
                "5 lies just between 4 and 6: which of them has a mantissa of 0?",
            )
            for side in ("right", "left")
        ),
        Mistake(
            "x, not |x|",
            _in_block(lambda x: float(np.frexp(f64(x).max())[1] - 1 - 2)),
            "Which value of the block lies farthest from 0, if that one is negative?",
        ),
    ),
)


# 09.5 -------------------------------------------------------------------------------------------------------------

HALF_WAY = 1e-4  # relative: how near to half-way between two numbers of E4M3 no scale may be


def _scales_case(generator: Generator, rows: int, groups: int, size: int) -> tuple[Tensor, int]:
    """Weights of blocks that are not equally loud, the loudest value negative."""
    while True:
        loud = torch.exp2(uniform(generator, -5, 0, rows, groups, 1)) * 2.0 ** int(
            whole(generator, -6, 3)
        )
        x = (torch.randn(rows, groups, size, generator=generator) * loud).reshape(
            rows, groups * size
        )
        x = -x if x.max() > -x.min() else x
        exact = f64(_blocks(x, size)) * 448 / _amax(x)
        halves = (E4M3[1:] + E4M3[:-1]) / 2
        if (np.abs(exact[..., None] / halves[1:] - 1) > HALF_WAY).all():
            return x, size


def _scales_cases(generator: Generator) -> list[Case]:
    by_hand = [
        ([[1.0, -8.0, 0.5, 0.3]], 2),
        ([[3.0, 0.5, -1.0, 0.25], [-6.0, 2.0, 0.1, -0.2]], 2),
        ([[-1.4, 0.2, 0.7, 0.1, -0.6, 0.4]], 3),
    ]
    drawn = [_scales_case(generator, *shape) for shape in ((2, 3, 4), (4, 4, 4), (3, 4, 16))]
    return make_cases(by_hand, drawn)


def _blocks(x: Any, size: int) -> np.ndarray:
    """amax of each block, (out, in / size)."""
    return np.abs(f64(x)).reshape(len(x), -1, size).max(axis=-1)


def _to_e4m3(x: np.ndarray) -> np.ndarray:
    return np.sign(x) * E4M3[_nearest(E4M3, np.abs(x))]


def _to_power_by(to: Callable[[np.ndarray], np.ndarray]) -> Callable[[np.ndarray], np.ndarray]:
    return lambda scales: 2.0 ** to(np.log2(scales))


def _two_scales(
    top: float = 6 * 448,
    rounded: Callable[[np.ndarray], np.ndarray] = _to_e4m3,
    *,
    blocks: Callable[[Any, int], np.ndarray] = _blocks,
    largest: Callable[[Any], float] = _amax,
) -> Callable[..., tuple[float, np.ndarray]]:
    """The scale of the tensor, amax / top, and those of the blocks in units of it."""

    def scales(x: Any, block_size: int) -> tuple[float, np.ndarray]:
        tensor_scale = largest(x) / top
        return tensor_scale, rounded(blocks(x, block_size) / 6 / tensor_scale)

    return scales


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
        *(
            Mistake(
                "one of the two ends, 6 and 448, is left out",
                _two_scales(top),
                "What is the largest scale that a block gets from you, and what is the largest that E4M3 has?",
            )
            for top in (6, 448, 1)
        ),
        Mistake(
            "the scales of blocks know nothing of the tensor's",
            _scales_alone,
            "A value is code times one scale times the other. What does the product of your two scales come to?",
        ),
        Mistake(
            "the scales of blocks are not rounded",
            _two_scales(rounded=lambda scales: scales),
            "Each of them has to fit in one byte: which numbers does that byte have?",
        ),
        *(
            Mistake(
                "the scales of blocks are powers of two",
                _two_scales(rounded=_to_power_by(to)),
                "That is what MX does. How many bits of mantissa has a scale of NVFP4?",
            )
            for to in (np.floor, np.ceil, np.rint)
        ),
        *(
            Mistake(
                "x, not |x|",
                _two_scales(
                    blocks=lambda x, size: f64(x).reshape(len(x), -1, size).max(axis=-1),
                    largest=largest,
                ),
                "Which value of a block lies farthest from 0, if that one is negative?",
            )
            for largest in (_amax, lambda x: f64(x).max())
        ),
    ),
)


SHEET = Sheet("09", "Low-bit floats", (DECODE, ENCODE, LIMITS, BLOCK, SCALES))
