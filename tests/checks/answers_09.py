"""Sheet 09, low-bit floats: right answers in other styles, and mistakes as people write them."""

import math
from fractions import Fraction

import numpy as np
import torch
from torch import Tensor

from qcourse.numerics.granularity import PerGroup
from qcourse.numerics.microscaling import NVFP4Quantizer, mx
from qcourse.numerics.minifloat import E2M1, E4M3, FloatFormat, decode
from qcourse.numerics.minifloat_encoding import encode

# Right answers.


def limits_of_package(e: int, m: int, bias: int, specials: str) -> tuple[float, float]:
    # more bits than the package has
    if (e, m) == (5, 10):
        half = torch.finfo(torch.float16)
        return half.max, half.tiny * half.eps
    format = FloatFormat("any", e, m, bias, specials)
    return format.max, format.smallest


def block_of_package(x: Tensor) -> tuple[Tensor, Tensor]:
    q = mx(E2M1)(torch.nn.functional.pad(x, (0, 32 - len(x))))
    return q.scale.float().log2()[0], q.dequantize()[: len(x)]


def scales_of_package(x: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    fitted = NVFP4Quantizer(granularity=PerGroup(block_size)).fit(x)
    return fitted.tensor_scale, fitted.scale


def decode_text(code: int) -> float:
    bits = f"{code:08b}"
    if bits[1:] == "1111111":
        return math.nan
    e = int(bits[1:5], 2)
    m = int(bits[5:], 2)
    return (-1) ** int(bits[0]) * math.ldexp(m + 8 * (e > 0), max(e, 1) - 10)


def encode_by_search(x: Tensor) -> list[int]:
    """Return the nearest of all 127 numbers, in fractions; an odd code is a little farther away."""
    numbers = [Fraction(decode_text(code)) for code in range(127)]
    tie = Fraction(1, 2**60)

    def nearest(value: float) -> int:
        size = abs(Fraction(value))
        distances = [abs(size - number) + code % 2 * tie for code, number in enumerate(numbers)]
        return distances.index(min(distances))

    codes = [nearest(value) + 128 * (value < 0) for value in x.flatten().tolist()]
    return np.array(codes).reshape(x.shape).tolist()


def encode_fields(x: Tensor) -> np.ndarray:
    """Exponent and mantissa apart, with the carry by hand."""
    codes = np.zeros(x.shape, np.uint8)
    for place, value in np.ndenumerate(x.numpy()):
        fraction, e = math.frexp(abs(value))
        field = e + 6
        m = round((2 * fraction - 1) * 8)
        # subnormal
        if field < 1 or value == 0:
            field = 0
            m = round(abs(float(value)) * 2**9)
        # carry
        if m == 8:
            field += 1
            m = 0
        codes[place] = min(field << 3 | m, 126) | 128 * bool(value < 0)
    return codes


def limits_listed(e: int, m: int, bias: int, specials: str) -> list[float]:
    numbers = []
    for field in range(2**e):
        power = 2.0 ** (max(field, 1) - bias)
        numbers += [power * (bool(field) + part / 2**m) for part in range(2**m)]
    end = {"none": len(numbers), "nan": -1, "ieee": -(2**m)}[specials]
    return [max(numbers[:end]), numbers[1]]


def limits_by_formula(e: int, m: int, bias: int, specials: str) -> tuple[float, Tensor]:
    power = 2.0 ** (2**e - 1 - bias - (specials == "ieee"))
    mantissa = 2 - 2.0**-m * (1 + (specials == "nan"))
    return power * mantissa, torch.tensor(2.0) ** (1 - bias - m)


def block_loop(x: Tensor) -> tuple[int, list[float]]:
    exponent = math.frexp(max(abs(value) for value in x.tolist()))[1] - 3
    # min keeps the first of equals, so a tie goes to the even level
    evens_first = (0, 1, 2, 4, 0.5, 1.5, 3, 6)
    rounded = []
    for value in x.tolist():
        steps = abs(value) / 2**exponent
        level = min(evens_first, key=lambda level, steps=steps: abs(steps - level))
        rounded.append(math.copysign(level, value) * 2**exponent)
    return exponent, rounded


def block_argmin(x: Tensor) -> tuple[Tensor, Tensor]:
    exponent = torch.frexp(x.abs().max()).exponent - 3
    levels = torch.tensor([0, 1, 2, 4, 0.5, 1.5, 3, 6])
    distances = (x.abs()[:, None] / 2.0**exponent - levels).abs()
    return exponent, x.sign() * levels[distances.argmin(dim=1)] * 2.0**exponent


def scales_loop(x: Tensor, block_size: int) -> tuple[float, np.ndarray]:
    x = np.abs(x.numpy().astype(np.float64))
    rows, groups = len(x), x.shape[1] // block_size
    scales = np.zeros((rows, groups))
    numbers = np.array([decode_text(code) for code in range(127)])
    for row in range(rows):
        for group in range(groups):
            block = x[row, group * block_size : (group + 1) * block_size]
            wanted = block.max() * 448 / x.max()
            scales[row, group] = numbers[np.abs(numbers - wanted).argmin()]
    return x.max() / 2688, scales


def scales_unfold(x: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    amax = x.unfold(1, block_size, block_size).abs().amax(-1)
    scales = amax * 448 / amax.max()
    step = 2 ** torch.floor(torch.log2(scales)) / 8
    return amax.max() / 6 / 448, torch.round(scales / step) * step


THE_PACKAGE = {
    "09.1": lambda code: decode(torch.tensor([code]), E4M3)[0],
    "09.2": lambda x: encode(x, E4M3),
    "09.3": limits_of_package,
    "09.4": block_of_package,
    "09.5": scales_of_package,
}
THE_LESSON = {"09.1": "e4m3"}
OTHER_STYLES = {
    "09.1": (
        decode_text,
        lambda code: torch.tensor([code], dtype=torch.uint8).view(torch.float8_e4m3fn).float()[0],
    ),
    "09.2": (
        encode_by_search,
        encode_fields,
        lambda x: x.clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8),
    ),
    "09.3": (
        limits_listed,
        limits_by_formula,
    ),
    "09.4": (block_loop, block_argmin),
    "09.5": (scales_loop, scales_unfold),
}


# Mistakes.


def decode_by(bias: int, *, subnormal: bool = True, infinity: bool = False) -> object:
    def decode(code: int) -> float:
        sign = code // 128
        e = code // 8 % 16
        m = code % 8
        if e == 15 and (m == 7 or infinity):
            return math.nan if m else (-1) ** sign * math.inf
        if e == 0 and subnormal:
            return (-1) ** sign * 2.0 ** (1 - bias) * m / 8
        return (-1) ** sign * 2.0 ** (e - bias) * (1 + m / 8)

    return decode


def decode_unmasked(code: int) -> float:
    e = code >> 3
    m = code & 7
    if e == 15 and m == 7:
        return math.nan
    size = 2.0 ** (e - 7) * (1 + m / 8) if e else 2.0**-6 * m / 8
    return -size if code & 0x80 else size


def decode_signed(code: int) -> float:
    if code & 0x7F == 0x7F:
        return math.nan
    number = torch.tensor(code, dtype=torch.uint8).view(torch.int8).int()
    return float(number.sign()) * decode_text(int(number.abs()) & 0x7F)


def encode_by_log2(x: Tensor, *, top: float = 126, rounded: object = torch.round) -> Tensor:
    size = x.abs()
    e = torch.floor(torch.log2(size)).clamp(min=-6)
    return (rounded(size / 2**e * 8) + 8 * (e + 6)).clamp(max=top).int()


def encode_wrapped(x: Tensor) -> Tensor:
    codes = encode_by_log2(x, top=1000) + 128 * (x < 0)
    return codes.to(torch.uint8)


def encode_negative(x: Tensor) -> Tensor:
    codes = encode_by_log2(x)
    return torch.where(x < 0, -codes, codes).to(torch.int8).view(torch.uint8)


def encode_in_fields(x: Tensor) -> Tensor:
    """The field of the mantissa is masked, and loses its carry."""
    size = x.abs()
    e = torch.floor(torch.log2(size)).clamp(min=-6)
    m = torch.where(size < 2**-6, size * 2**9, (size / 2**e - 1) * 8).round().int() & 0b111
    field = (e.int() + 7) * (size >= 2**-6)
    return torch.clamp(field << 3 | m, max=126) | (x < 0).int() << 7


def encode_flushed(x: Tensor) -> Tensor:
    codes = encode_by_log2(x) + 128 * (x < 0)
    return torch.where(x.abs() < 2**-6, 128 * (x < 0), codes)


def limits_by(top: object) -> object:
    def limits(e: int, m: int, bias: int, specials: str) -> tuple[float, float]:
        return top(2**e - 1, 2**m, bias, specials), 2.0 ** (1 - bias) / 2**m

    return limits


def block_by(
    exponent: object, *, levels: tuple[float, ...] = (0, 1, 2, 4, 0.5, 1.5, 3, 6)
) -> object:
    def block(x: Tensor) -> tuple[Tensor, Tensor]:
        power = exponent(x.abs().max())
        grid = torch.tensor(levels, dtype=torch.float32)
        distances = (x.abs()[:, None] / 2**power - grid).abs()
        nearest = grid[distances.argmin(dim=1)]
        return power, x.sign() * nearest * 2**power

    return block


def floored(amax: Tensor) -> Tensor:
    return amax.log2().floor() - 2


def scales_by(tensor_scale: object, rounded: object) -> object:
    def scales(x: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
        amax = x.abs().reshape(x.shape[0], -1, block_size).amax(2)
        return tensor_scale(amax.max()), rounded(amax / 6 / tensor_scale(amax.max()))

    return scales


def to_e4m3(scales: Tensor) -> Tensor:
    return scales.clamp(max=448).to(torch.float8_e4m3fn)


def scales_apart(x: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    return x.abs().max() / 2688, to_e4m3(x.abs().unflatten(1, (-1, block_size)).amax(-1) / 6)


MISTAKES = [
    ("09.1", "another bias than 7", decode_by(8)),
    ("09.1", "another bias than 7", decode_by(0)),
    ("09.1", "no subnormal numbers", decode_by(7, subnormal=False)),
    ("09.1", "the topmost exponent as infinity", decode_by(7, infinity=True)),
    ("09.1", "the fields are read from the wrong bits", decode_unmasked),
    ("09.1", "the sign as two's complement", decode_signed),
    ("09.2", "", encode_by_log2),
    ("09.2", "nothing is saturated", encode_wrapped),
    (
        "09.2",
        "",
        lambda x: encode_by_log2(x, top=127) + 128 * (x < 0),
    ),
    (
        "09.2",
        "cut off, not rounded",
        lambda x: encode_by_log2(x, rounded=torch.floor) + 128 * (x < 0),
    ),
    (
        "09.2",
        "ties do not go to the even code",
        lambda x: encode_by_log2(x, rounded=lambda steps: (steps + 0.5).floor()) + 128 * (x < 0),
    ),
    ("09.2", "", encode_negative),
    ("09.2", "a mantissa that is rounded up to 8 is lost", encode_in_fields),
    ("09.2", "no subnormal numbers", encode_flushed),
    (
        "09.3",
        "one NaN costs a whole exponent",
        limits_by(
            lambda e, steps, bias, specials: (
                2.0 ** (e - (specials != "none") - bias) * (2 - 1 / steps)
            )
        ),
    ),
    (
        "09.3",
        "codes that stand for no number are counted",
        limits_by(lambda e, steps, bias, specials: 2.0 ** (e - bias) * (2 - 1 / steps)),
    ),
    (
        "09.3",
        "a smallest number with a full mantissa",
        lambda *fields: (limits_listed(*fields)[0], 2.0 ** (1 - fields[2])),
    ),
    (
        "09.3",
        "",
        lambda e, m, _, specials: limits_listed(e, m, 2 ** (e - 1) - 1, specials),
    ),
    ("09.4", "the exponent is not rounded down", block_by(lambda amax: amax.log2().ceil() - 2)),
    ("09.4", "the exponent is not rounded down", block_by(lambda amax: amax.log2().round() - 2)),
    (
        "09.4",
        "measured against 6, not against its power of two",
        block_by(lambda amax: (amax / 6).log2().floor()),
    ),
    (
        "09.4",
        "measured against 6, not against its power of two",
        block_by(lambda amax: (amax / 6).log2().ceil()),
    ),
    ("09.4", "the format's own exponent is forgotten", block_by(lambda amax: amax.log2().floor())),
    ("09.4", "", block_by(floored, levels=(0, 1, 2, 4, 0.5, 1.5, 3, 6, 8))),
    ("09.4", "", block_by(floored, levels=(0, 2, 4, 6, 1, 3, 5))),
    (
        "09.4",
        "ties do not go to the even code",
        block_by(floored, levels=(0, 0.5, 1, 1.5, 2, 3, 4, 6)),
    ),
    (
        "09.5",
        "one of the two ends, 6 and 448, is left out",
        scales_by(lambda amax: amax / 448, to_e4m3),
    ),
    (
        "09.5",
        "one of the two ends, 6 and 448, is left out",
        scales_by(lambda amax: amax / 6, to_e4m3),
    ),
    (
        "09.5",
        "the scales of blocks are not rounded",
        scales_by(lambda amax: amax / 2688, lambda scales: scales),
    ),
    (
        "09.5",
        "the scales of blocks are powers of two",
        scales_by(lambda amax: amax / 2688, lambda scales: scales.log2().floor().exp2()),
    ),
    ("09.5", "the scales of blocks know nothing of the tensor's", scales_apart),
]
