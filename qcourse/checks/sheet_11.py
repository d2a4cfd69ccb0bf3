"""Sheet 11, an INT4 kernel: cases, references, tolerances, points and known mistakes.

A kernel is judged by its outputs, so the cases are those where wrong kernels differ: two blocks and
more, inputs that are not a multiple of a block, odd numbers of outputs, several group sizes, zero
points of which few are 8. Outputs do not show a load or a store past the end of a tensor; that is
an error where the sheet runs kernels (`lab/tiny_triton.py`).
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Generator, Tensor

from qcourse.checks.common import f64, make_cases, uniform, variants, whole
from qcourse.checks.exercise import Case, Exercise, Mistake, Sheet

BLOCK = 128

# of each k of a row: the index of its word, and of its nibble in the word
Places = tuple[np.ndarray, np.ndarray]
Order = Callable[[np.ndarray, int], Places]


def _codes(generator: Generator, *shape: int) -> Tensor:
    return whole(generator, 0, 15, *shape).to(torch.uint8)


def _zero_points(generator: Generator, *shape: int) -> Tensor:
    """Return zero points from 0 to 15; the first is 0."""
    found = whole(generator, 0, 15, *shape)
    found.view(-1)[0] = 0
    return found.to(torch.uint8)


# 11.1 ---------------------------------------------------------------------------------------------


def _pack_cases(generator: Generator) -> list[Case]:
    # four codes of the first word, one per byte
    first_word = torch.zeros(1, BLOCK, dtype=torch.uint8)
    first_word[0, [0, 1, 32, 33]] = torch.tensor([1, 2, 3, 4], dtype=torch.uint8)

    # a code in the highest nibble, which makes the int32 negative
    last_code = torch.zeros(2, BLOCK, dtype=torch.uint8)
    last_code[1, -1] = 9

    # one block, two and three
    shapes = ((1, BLOCK), (2, 2 * BLOCK), (3, 3 * BLOCK))
    drawn = [_codes(generator, *shape) for shape in shapes]
    return make_cases([first_word, last_code], drawn)


def _packed(codes: Any, order: Order) -> np.ndarray:
    """Return unsigned words with the codes in the places that `order` gives."""
    rows, inputs = codes.shape
    words = np.zeros((rows, inputs // 8), np.int64)
    word, nibble = order(np.arange(inputs), inputs)
    shifted = np.asarray(codes, np.int64) << 4 * nibble
    np.bitwise_or.at(words.T, word, shifted.T)
    return words


def _as_int32(words: np.ndarray) -> np.ndarray:
    return words.astype(np.uint32).view(np.int32)


def _plane_order(k: np.ndarray, inputs: int, block: int = BLOCK) -> Places:
    # k = 32 i + 2 j + h lies in word j, nibble i + 4 h of its block
    plane = block // 4
    word = k // block * (block // 8) + k % plane // 2
    nibble = k % block // plane + 4 * (k % 2)
    return word, nibble


def _with(order: Order) -> Callable[[Any], np.ndarray]:
    """Return a function that packs in this order."""

    def pack(codes: Any) -> np.ndarray:
        return _as_int32(_packed(codes, order))

    return pack


# Known mistakes.


def _storage_order(k: np.ndarray, inputs: int) -> Places:
    return k // 8, k % 8


def _order_in_bytes(k: np.ndarray, inputs: int) -> Places:
    word, _ = _plane_order(k, inputs)
    plane = k % BLOCK // 32
    return word, 2 * plane + k % 2


def _order_from_the_top(k: np.ndarray, inputs: int) -> Places:
    word, nibble = _plane_order(k, inputs)
    return word, 7 - nibble


def _planes_of_the_row(k: np.ndarray, inputs: int) -> Places:
    return _plane_order(k, inputs, block=inputs)


def _unsigned_words(codes: Any) -> np.ndarray:
    return _packed(codes, _plane_order)


PACK = Exercise(
    id="11.1",
    title="Pack in planes",
    function="pack_planes",
    points=1,
    cases=_pack_cases,
    reference=_with(_plane_order),
    mistakes=(
        Mistake(
            "eight codes in a row in one word",
            _with(_storage_order),
            "That is the order of storage. Mask one of your words with 0x000f000f: which two codes"
            " are left?",
        ),
        Mistake(
            "neighbors in one byte, not in the two halves of the word",
            _with(_order_in_bytes),
            "How many bits apart are nibble i and nibble i + 4? How many bits apart are h = 0 and"
            " h = 1 in yours?",
        ),
        Mistake(
            "the nibbles counted from the top",
            _with(_order_from_the_top),
            "Is nibble 0 the one that & 15 leaves, or the first one in the hex number?",
        ),
        Mistake(
            "planes of the whole row, not of a block",
            _with(_planes_of_the_row),
            "With 256 inputs, in which of the 32 words is code 32? The first block has words 0 to"
            " 15.",
        ),
        Mistake(
            "words that are no int32",
            _unsigned_words,
            "If the highest nibble is 8 or more, which int32 has these bits? Is it a positive"
            " number?",
        ),
    ),
)


# 11.2 ---------------------------------------------------------------------------------------------


def _decode_cases(generator: Generator) -> list[Case]:
    # the first planes of two words, and the last with another zero point
    word = torch.tensor([0x76543210, -0x5432F6E5], dtype=torch.int32)
    by_hand = [(word, 0, 8), (word, 1, 8), (word, 3, 2)]

    # each plane, with the smallest zero point, the largest, and two between
    low = int(whole(generator, 1, 7))
    high = int(whole(generator, 9, 14))
    drawn = []
    for plane, zero_point in enumerate((0, low, 15, high)):
        words = whole(generator, 0, 2**32 - 1, 16)
        drawn.append((_as_tensor(words), plane, zero_point))
    return make_cases(by_hand, drawn)


def _as_tensor(words: Tensor) -> Tensor:
    return torch.from_numpy(_as_int32(words.numpy()).copy())


def _halves(words: Any, plane: int, mask: int = 0x000F000F) -> np.ndarray:
    """Return the masked nibbles of a plane, one in each half of the word, as int64."""
    unsigned = np.asarray(words, np.int32).view(np.uint32).astype(np.int64)
    return unsigned >> 4 * plane & mask


def _values(halves: np.ndarray) -> np.ndarray:
    return np.stack([halves & 0xFFFF, halves >> 16], axis=-1)


def _decoded(
    words: Any, plane: int, zero_point: int, mask: int = 0x000F000F
) -> tuple[np.ndarray, np.ndarray]:
    # 0x6400 is 1024 in float16, and a code in its lowest bits adds the code
    halves = _halves(words, plane, mask)
    registers = _as_int32(halves | 0x64006400)
    return registers, f64(_values(halves) - zero_point)


# Known mistakes.


def _always_8(words: Any, plane: int, zero_point: int) -> tuple[np.ndarray, np.ndarray]:
    return _decoded(words, plane, 8)


def _without_zero_point(words: Any, plane: int, zero_point: int) -> tuple[np.ndarray, np.ndarray]:
    return _decoded(words, plane, 0)


def _masked_first(dtype: type) -> Callable[..., tuple[np.ndarray, np.ndarray]]:
    """Return a wrong decoder in this dtype; its values are not small integers, so fp16 rounds."""

    def decode(words: Any, plane: int, zero_point: int) -> tuple[np.ndarray, np.ndarray]:
        registers = _as_int32(_halves(words, 0) >> 4 * plane | 0x64006400)
        values: np.ndarray = registers.view(np.float16).reshape(-1, 2).astype(dtype)
        return registers, values - dtype(1024 + zero_point)

    return decode


def _lower_half(words: Any, plane: int, zero_point: int) -> tuple[np.ndarray, np.ndarray]:
    return _decoded(words, plane, zero_point, mask=0x0000000F)


def _upper_half_first(words: Any, plane: int, zero_point: int) -> tuple[np.ndarray, np.ndarray]:
    registers, values = _decoded(words, plane, zero_point)
    return registers, values[..., ::-1].copy()


MAGIC = Exercise(
    id="11.2",
    title="The magic number",
    function="decode_plane",
    points=2,
    cases=_decode_cases,
    reference=_decoded,
    mistakes=(
        Mistake(
            "8 whatever the zero point",
            _always_8,
            "1032 is 1024 + 8: which code stands for 0 here?",
        ),
        Mistake(
            "1024 is taken off, the zero point is not",
            _without_zero_point,
            "Code and zero point both count from 0 to 15: what does a code equal to the zero point"
            " stand for?",
        ),
        *variants(
            "masked before it is shifted",
            "& 0x000F000F keeps plane 0: what is left of plane 1 after it?",
            _masked_first(np.float16),
            _masked_first(np.float64),
        ),
        Mistake(
            "one half only",
            _lower_half,
            "A word holds two codes of each plane, one in each half: which bits does your mask keep"
            " of the upper half?",
        ),
        Mistake(
            "the upper half first",
            _upper_half_first,
            "Code 2 j of a plane is in the lower half of word j: which of the two has to come"
            " first?",
        ),
    ),
)


# 11.3 ---------------------------------------------------------------------------------------------


def _group_case(generator: Generator, rows: int, groups: int, size: int) -> tuple[Tensor, ...]:
    x = uniform(generator, -2, 2, groups * size)
    scale = uniform(generator, 0.01, 0.1, rows, groups)
    zero_point = _zero_points(generator, rows, groups)
    codes = _codes(generator, rows, groups * size)
    return x, codes, zero_point, scale


def _group_cases(generator: Generator) -> list[Case]:
    # two rows, two groups of two, each with its own zero point
    x = torch.tensor([1.0, 2.0, -1.0, 0.5])
    codes = torch.tensor([[9, 8, 3, 15], [1, 0, 7, 4]], dtype=torch.uint8)
    zero_point = torch.tensor([[8, 7], [3, 5]], dtype=torch.uint8)
    scale = torch.tensor([[0.5, 0.25], [1.0, 2.0]])

    # rows, groups and group sizes: common ones, then one group, then one row
    sizes = ((3, 2, 8), (5, 3, 32), (4, 4, 64), (3, 1, 7), (1, 3, 5))
    drawn = [_group_case(generator, *each) for each in sizes]
    return make_cases([(x, codes, zero_point, scale)], drawn)


def _by_groups(x: Any, codes: Any, zero_point: Any, scale: Any) -> tuple[np.ndarray, np.ndarray]:
    # scale times (sum of (code - zero point) x), group by group
    rows, groups = np.shape(scale)
    numbers = f64(codes).reshape(rows, groups, -1) - f64(zero_point)[..., None]
    products = numbers * f64(x).reshape(groups, -1)
    sums = products.sum(axis=2)
    return sums, (sums * f64(scale)).sum(axis=1)


# Known mistakes.


def _by_groups_in_bytes(
    x: Any, codes: Any, zero_point: Any, scale: Any
) -> tuple[np.ndarray, np.ndarray]:
    group_size = np.shape(codes)[1] // np.shape(scale)[1]
    repeated = np.repeat(np.asarray(zero_point), group_size, axis=1)
    # a difference of uint8 is taken modulo 256
    differences = np.asarray(codes) - repeated
    return _by_groups(x, differences, np.zeros(np.shape(scale)), scale)


def _groups_with_8(x: Any, codes: Any, zero_point: Any, scale: Any) -> tuple:
    return _by_groups(x, codes, np.full(np.shape(scale), 8), scale)


def _groups_with_0(x: Any, codes: Any, zero_point: Any, scale: Any) -> tuple:
    return _by_groups(x, codes, np.zeros(np.shape(scale)), scale)


def _scales_of_first_row(x: Any, codes: Any, zero_point: Any, scale: Any) -> tuple:
    sums, _ = _by_groups(x, codes, zero_point, scale)
    return sums, sums @ f64(scale)[0]


def _by_strides(x: Any, codes: Any, zero_point: Any, scale: Any) -> tuple[np.ndarray, np.ndarray]:
    groups = np.shape(scale)[1]
    order = np.argsort(np.arange(len(x)) % groups, kind="stable")
    return _by_groups(f64(x)[order], f64(codes)[:, order], zero_point, scale)


GROUPS = Exercise(
    id="11.3",
    title="The scale leaves the sum",
    function="dot_by_groups",
    points=2,
    cases=_group_cases,
    reference=_by_groups,
    tolerance=1e-4,
    mistakes=(
        Mistake(
            "bytes wrap below 0",
            _by_groups_in_bytes,
            "Both are uint8. What is torch.tensor([3], dtype=torch.uint8) - 8?",
        ),
        Mistake(
            "8 for every zero point",
            _groups_with_8,
            "Each group of each row has its own zero point: where does yours come from?",
        ),
        Mistake(
            "no zero point",
            _groups_with_0,
            "If all codes are equal to the zero point, what is the dot product? What is it in"
            " yours?",
        ),
        Mistake(
            "one row's scales for all",
            _scales_of_first_row,
            "Two rows with the same codes and different scales: do they get the same answer?",
        ),
        Mistake(
            "every so many-th input in one group",
            _by_strides,
            "The inputs of a group are adjacent. With 6 inputs in 2 groups, which are in the"
            " first?",
        ),
    ),
)


# 11.4 ---------------------------------------------------------------------------------------------


def _split_case(
    generator: Generator, tokens: int, outputs: int, inputs: int, splits: int
) -> tuple[Tensor, Tensor, int]:
    x = torch.randn(tokens, inputs, generator=generator)
    w = torch.randn(outputs, inputs, generator=generator)
    return x, w, splits


def _split_cases(generator: Generator) -> list[Case]:
    # three blocks, whose sums are 1, 2 and 3
    x = torch.ones(1, 3 * BLOCK)
    w = torch.arange(1.0, 4.0).repeat_interleave(BLOCK)[None] / BLOCK
    by_hand = [(x, w, 3), (x, w, 2)]

    # blocks that the splits divide, blocks that they do not, and incomplete last blocks
    drawn = []
    for tokens, outputs, inputs, splits in (
        (2, 3, 4 * BLOCK, 2),
        (1, 5, 5 * BLOCK, 3),
        (3, 2, 600, 4),
        (2, 2, 200, 8),
        (1, 3, 6 * BLOCK + 40, 3),
    ):
        drawn.append(_split_case(generator, tokens, outputs, inputs, splits))
    return make_cases(by_hand, drawn)


def _product(x: Any, w: Any, part: Any) -> np.ndarray:
    """Return x w^T over a part of the inputs."""
    return f64(x)[:, part] @ f64(w)[:, part].T


def _partials(
    x: Any, w: Any, splits: int, *, inputs: int | None = None, empty: bool = False
) -> np.ndarray:
    """Return the sums of each part.

    Args:
        inputs: only the first so many; None for all.
        empty: also return parts without any input.
    """
    inputs = inputs or np.shape(x)[1]
    blocks = -(-inputs // BLOCK)
    size = -(-blocks // splits) * BLOCK
    end = size * splits if empty else inputs
    sums = []
    for start in range(0, end, size):
        part = slice(start, min(start + size, inputs))
        sums.append(_product(x, w, part))
    return np.stack(sums)


def _added(partials: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return partials, partials.sum(axis=0)


def _split(x: Any, w: Any, splits: int) -> tuple[np.ndarray, np.ndarray]:
    return _added(_partials(x, w, splits))


# Known mistakes.


def _rounded_down(x: Any, w: Any, splits: int) -> tuple[np.ndarray, np.ndarray]:
    blocks = -(-np.shape(x)[1] // BLOCK)
    size = max(1, blocks // splits) * BLOCK
    parts = min(splits, blocks)
    sums = [_product(x, w, slice(i * size, (i + 1) * size)) for i in range(parts)]
    return _added(np.stack(sums))


def _with_empty_parts(x: Any, w: Any, splits: int) -> tuple[np.ndarray, np.ndarray]:
    return _added(_partials(x, w, splits, empty=True))


def _whole_blocks_only(x: Any, w: Any, splits: int) -> tuple[np.ndarray, np.ndarray]:
    whole_blocks = np.shape(x)[1] // BLOCK * BLOCK
    return _added(_partials(x, w, splits, inputs=max(BLOCK, whole_blocks)))


def _last_part_only(x: Any, w: Any, splits: int) -> tuple[np.ndarray, np.ndarray]:
    partials = _partials(x, w, splits)
    return partials, partials[-1]


def _dealt_out(x: Any, w: Any, splits: int) -> tuple[np.ndarray, np.ndarray]:
    inputs = np.shape(x)[1]
    blocks = -(-inputs // BLOCK)
    blocks_per_part = -(-blocks // splits)
    parts = -(-blocks // blocks_per_part)
    part = np.arange(inputs) // BLOCK % parts
    sums = [_product(x, w, part == i) for i in range(parts)]
    return _added(np.stack(sums))


SPLIT = Exercise(
    id="11.4",
    title="Split K",
    function="split_sums",
    points=2,
    cases=_split_cases,
    reference=_split,
    tolerance=1e-4,
    mistakes=(
        Mistake(
            "blocks are lost: rounded down",
            _rounded_down,
            "Five blocks for three programs: how many blocks is 5 // 3 for each, and which program"
            " has the last two?",
        ),
        Mistake(
            "programs without any work",
            _with_empty_parts,
            "Five blocks, four programs, two blocks each: how many programs have something to do?",
        ),
        Mistake(
            "the last, incomplete block is left out",
            _whole_blocks_only,
            "How many blocks are 200 inputs: 200 // 128? What becomes of the last 72?",
        ),
        Mistake(
            "blocks dealt out in turn",
            _dealt_out,
            "The blocks of a program are adjacent in memory: which two of four does program 0"
            " have?",
        ),
        Mistake(
            "the last program's sums for all",
            _last_part_only,
            "Where are the sums added? If each program overwrites y, which sums are left in it?",
        ),
    ),
)


# 11.5 ---------------------------------------------------------------------------------------------


def _matvec_case(
    generator: Generator, rows: int, inputs: int, group_size: int
) -> tuple[Tensor, ...]:
    x = torch.randn(inputs, generator=generator)
    packed = whole(generator, 0, 255, rows, -(-inputs // 2)).to(torch.uint8)
    scale = uniform(generator, 0.01, 0.1, rows, inputs // group_size)
    return x, packed, scale, _zero_points(generator, *scale.shape)


def _matvec_cases(generator: Generator) -> list[Case]:
    # one row, one group
    by_hand = (
        torch.tensor([1.0, 2.0, -1.0, 0.5]),
        torch.tensor([[0x89, 0xF3]], dtype=torch.uint8),
        torch.tensor([[0.5]]),
        torch.tensor([[7]], dtype=torch.uint8),
    )

    # Sizes are small, because an interpreter takes milliseconds for each block of a kernel.
    # first several blocks of rows and of inputs
    sizes = [(3, 64, 32), (33, 20, 10), (2, 160, 80)]
    # then odd groups, where the codes of a byte may belong to two groups
    sizes += [(4, 105, 35), (3, 75, 15), (1, 45, 45)]
    drawn = [_matvec_case(generator, *each) for each in sizes]
    return make_cases([by_hand], drawn)


def _matvec(
    x: Any, packed: Any, scale: Any, zero_point: Any, *, order: tuple[int, int] = (0, 4)
) -> np.ndarray:
    """Return the product; codes of even and of odd k begin at the bits `order` of their byte."""
    # (rows, bytes, 2)
    nibbles = np.asarray(packed, np.int64)[:, :, None] >> np.array(order) & 15
    # an odd number of inputs leaves the last nibble unused
    codes = nibbles.reshape(len(packed), -1)[:, : len(x)]
    _, y = _by_groups(x, codes, zero_point, scale)
    return y


# Known mistakes.


def _high_nibble_first(*args: Any) -> np.ndarray:
    return _matvec(*args, order=(4, 0))


def _zero_point_8(x: Any, packed: Any, scale: Any, zero_point: Any) -> np.ndarray:
    return _matvec(x, packed, scale, np.full(np.shape(scale), 8))


def _scales_of_row_0(x: Any, packed: Any, scale: Any, zero_point: Any) -> np.ndarray:
    first_row = np.repeat(f64(scale)[:1], len(scale), 0)
    return _matvec(x, packed, first_row, zero_point)


def _scales_of_group_0(x: Any, packed: Any, scale: Any, zero_point: Any) -> np.ndarray:
    first_group = np.repeat(f64(scale)[:, :1], np.shape(scale)[1], 1)
    return _matvec(x, packed, first_group, zero_point)


def _whole_blocks(block: int) -> Callable[..., np.ndarray]:
    """Return a product that ignores the inputs after the last complete block."""

    def matvec(x: Any, packed: Any, scale: Any, zero_point: Any) -> np.ndarray:
        seen = np.arange(len(x)) < len(x) // block * block
        return _matvec(np.where(seen, f64(x), 0), packed, scale, zero_point)

    return matvec


MATVEC = Exercise(
    id="11.5",
    title="A kernel of your own",
    function="int4_matvec",
    points=4,
    cases=_matvec_cases,
    reference=_matvec,
    tolerance=1e-4,
    mistakes=(
        Mistake(
            "the high nibble first",
            _high_nibble_first,
            "In which half of its byte is code 0? What does byte & 15 give?",
        ),
        Mistake(
            "8 for every zero point",
            _zero_point_8,
            "Each group of each row has its own zero point: do you load it at the same position as"
            " its scale?",
        ),
        Mistake(
            "one row's scales for all",
            _scales_of_row_0,
            "The scales of row n begin n times the number of groups behind those of row 0: do"
            " yours?",
        ),
        Mistake(
            "one group's scale for the whole row",
            _scales_of_group_0,
            "k runs through several groups: does the position from which you load the scale change"
            " with it?",
        ),
        *variants(
            "the last, incomplete block is left out",
            "77 inputs in blocks of 32: where does your loop end, and what tells the kernel which"
            " inputs exist?",
            _whole_blocks(16),
            _whole_blocks(32),
            _whole_blocks(64),
            _whole_blocks(128),
        ),
    ),
)


SHEET = Sheet("11", "An INT4 kernel", (PACK, MAGIC, GROUPS, SPLIT, MATVEC))
