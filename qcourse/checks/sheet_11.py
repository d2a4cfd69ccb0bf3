"""Sheet 11, an INT4 kernel: cases, references, tolerances, points and known mistakes.

A kernel is judged by its outputs, so the cases are those that tell wrong kernels: two blocks and more, inputs that are
no multiple of a block, odd numbers of outputs, several group sizes, zero points of which few are 8. What outputs do not
tell, a load or a store past the end of a tensor, is an error where the sheet runs kernels (`lab/tiny_triton.py`).
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Generator, Tensor

from qcourse.checks.common import f64, make_cases, uniform, whole
from qcourse.checks.exercise import Case, Exercise, Mistake, Sheet

BLOCK = 128


def _codes(generator: Generator, *shape: int) -> Tensor:
    return whole(generator, 0, 15, *shape).to(torch.uint8)


def _zero_points(generator: Generator, *shape: int) -> Tensor:
    """Zero points from 0 to 15, the first of them 0."""
    found = whole(generator, 0, 15, *shape)
    found.view(-1)[0] = 0
    return found.to(torch.uint8)


# 11.1 -------------------------------------------------------------------------------------------------------------


def _pack_cases(generator: Generator) -> list[Case]:
    by_hand = torch.zeros(1, BLOCK, dtype=torch.uint8)
    by_hand[0, [0, 1, 32, 33]] = torch.tensor([1, 2, 3, 4], dtype=torch.uint8)
    top = torch.zeros(2, BLOCK, dtype=torch.uint8)
    top[1, -1] = 9
    drawn = [_codes(generator, *shape) for shape in ((1, BLOCK), (2, 2 * BLOCK), (3, 3 * BLOCK))]
    return make_cases([by_hand, top], drawn)


def _packed(
    codes: Any, order: Callable[[np.ndarray, int], tuple[np.ndarray, np.ndarray]]
) -> np.ndarray:
    """Words, unsigned, where `order` says of each k in which word of the row and which nibble its code lies."""
    rows, inputs = codes.shape
    words = np.zeros((rows, inputs // 8), np.int64)
    word, nibble = order(np.arange(inputs), inputs)
    shifted = np.asarray(codes, np.int64) << 4 * nibble
    np.bitwise_or.at(words.T, word, shifted.T)
    return words


def _as_int32(words: np.ndarray) -> np.ndarray:
    return words.astype(np.uint32).view(np.int32)


def _plane_order(k: np.ndarray, inputs: int, block: int = BLOCK) -> tuple[np.ndarray, np.ndarray]:
    plane = block // 4
    return k // block * (block // 8) + k % plane // 2, k % block // plane + 4 * (k % 2)


def _with(
    order: Callable[[np.ndarray, int], tuple[np.ndarray, np.ndarray]],
) -> Callable[[Any], np.ndarray]:
    return lambda codes: _as_int32(_packed(codes, order))


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
            _with(lambda k, inputs: (k // 8, k % 8)),
            "That is the order of storage. Mask one of your words with 0x000f000f: which two codes are left?",
        ),
        Mistake(
            "neighbours in one byte, not in the two halves of the word",
            _with(lambda k, inputs: (_plane_order(k, inputs)[0], 2 * (k % BLOCK // 32) + k % 2)),
            "How many bits apart are nibble i and nibble i + 4, and how many are h = 0 and h = 1 in yours?",
        ),
        Mistake(
            "the nibbles counted from the top",
            _with(lambda k, inputs: (_plane_order(k, inputs)[0], 7 - _plane_order(k, inputs)[1])),
            "Is nibble 0 the one that & 15 leaves, or the first that you read in the hex number?",
        ),
        Mistake(
            "planes of the whole row, not of a block",
            _with(lambda k, inputs: _plane_order(k, inputs, block=inputs)),
            "With 256 inputs, in which of the 32 words is code 32? The first block has words 0 to 15.",
        ),
        Mistake(
            "words that are no int32",
            lambda codes: _packed(codes, _plane_order),
            "When the highest nibble is 8 or more, what int32 has these bits: is it a positive number?",
        ),
    ),
)


# 11.2 -------------------------------------------------------------------------------------------------------------


def _decode_cases(generator: Generator) -> list[Case]:
    word = torch.tensor([0x76543210, -0x5432F6E5], dtype=torch.int32)
    by_hand = [(word, 0, 8), (word, 1, 8), (word, 3, 2)]
    zero_points = (0, int(whole(generator, 1, 7)), 15, int(whole(generator, 9, 14)))
    drawn = [
        (_as_tensor(whole(generator, 0, 2**32 - 1, 16)), plane, zero_point)
        for plane, zero_point in enumerate(zero_points)
    ]
    return make_cases(by_hand, drawn)


def _as_tensor(words: Tensor) -> Tensor:
    return torch.from_numpy(_as_int32(words.numpy()).copy())


def _halves(words: Any, plane: int, mask: int = 0x000F000F) -> np.ndarray:
    """The masked nibbles of a plane in their halves, as int64."""
    return np.asarray(words, np.int32).view(np.uint32).astype(np.int64) >> 4 * plane & mask


def _values(halves: np.ndarray) -> np.ndarray:
    return np.stack([halves & 0xFFFF, halves >> 16], axis=-1)


def _decoded(
    words: Any, plane: int, zero_point: int, mask: int = 0x000F000F
) -> tuple[np.ndarray, np.ndarray]:
    halves = _halves(words, plane, mask)
    return _as_int32(halves | 0x64006400), f64(_values(halves) - zero_point)


def _masked_first(dtype: type) -> Callable[..., tuple[np.ndarray, np.ndarray]]:
    """The values in that dtype: they are no small whole numbers any more, so fp16 rounds them."""

    def decode(words: Any, plane: int, zero_point: int) -> tuple[np.ndarray, np.ndarray]:
        registers = _as_int32(_halves(words, 0) >> 4 * plane | 0x64006400)
        return registers, registers.view(np.float16).reshape(-1, 2).astype(dtype) - dtype(
            1024 + zero_point
        )

    return decode


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
            lambda words, plane, zero_point: _decoded(words, plane, 8),
            "1032 is 1024 + 8: which code stands for 0 here?",
        ),
        Mistake(
            "1024 is taken off, the zero point is not",
            lambda words, plane, zero_point: _decoded(words, plane, 0),
            "Code and zero point are both counted from 0 to 15: what does a code equal to the zero point stand for?",
        ),
        *(
            Mistake(
                "masked before it is shifted",
                _masked_first(dtype),
                "& 0x000F000F keeps plane 0: what is left of plane 1 after it?",
            )
            for dtype in (np.float16, np.float64)
        ),
        Mistake(
            "one half only",
            lambda words, plane, zero_point: _decoded(words, plane, zero_point, mask=0x0000000F),
            "A word holds two codes of each plane, one in each half: which bits does your mask keep of the upper half?",
        ),
        Mistake(
            "the upper half first",
            lambda words, plane, zero_point: (
                _decoded(words, plane, zero_point)[0],
                _decoded(words, plane, zero_point)[1][..., ::-1].copy(),
            ),
            "Code 2 j of a plane is in the lower half of word j: which of the two has to come first?",
        ),
    ),
)


# 11.3 -------------------------------------------------------------------------------------------------------------


def _group_case(generator: Generator, rows: int, groups: int, size: int) -> tuple[Tensor, ...]:
    x = uniform(generator, -2, 2, groups * size)
    scale = uniform(generator, 0.01, 0.1, rows, groups)
    zero_point = _zero_points(generator, rows, groups)
    return x, _codes(generator, rows, groups * size), zero_point, scale


def _group_cases(generator: Generator) -> list[Case]:
    x = torch.tensor([1.0, 2.0, -1.0, 0.5])
    codes = torch.tensor([[9, 8, 3, 15], [1, 0, 7, 4]], dtype=torch.uint8)
    zero_point = torch.tensor([[8, 7], [3, 5]], dtype=torch.uint8)
    scale = torch.tensor([[0.5, 0.25], [1.0, 2.0]])
    drawn = [
        _group_case(generator, *sizes)
        for sizes in ((3, 2, 8), (5, 3, 32), (4, 4, 64), (3, 1, 7), (1, 3, 5))
    ]
    return make_cases([(x, codes, zero_point, scale)], drawn)


def _by_groups(x: Any, codes: Any, zero_point: Any, scale: Any) -> tuple[np.ndarray, np.ndarray]:
    rows, groups = np.shape(scale)
    numbers = f64(codes).reshape(rows, groups, -1) - f64(zero_point)[..., None]
    sums = (numbers * f64(x).reshape(groups, -1)).sum(axis=2)
    return sums, (sums * f64(scale)).sum(axis=1)


def _by_groups_in_bytes(
    x: Any, codes: Any, zero_point: Any, scale: Any
) -> tuple[np.ndarray, np.ndarray]:
    repeated = np.repeat(np.asarray(zero_point), np.shape(codes)[1] // np.shape(scale)[1], axis=1)
    return _by_groups(
        x, np.asarray(codes) - repeated, np.zeros(np.shape(scale)), scale
    )  # uint8, modulo 256


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
            lambda x, codes, zero_point, scale: _by_groups(
                x, codes, np.full(np.shape(scale), 8), scale
            ),
            "Each group of each row has a zero point of its own: where does yours come from?",
        ),
        Mistake(
            "no zero point",
            lambda x, codes, zero_point, scale: _by_groups(
                x, codes, np.zeros(np.shape(scale)), scale
            ),
            "If all codes are equal to the zero point, what is the dot product? What is it in yours?",
        ),
        Mistake(
            "one row's scales for all",
            lambda x, codes, zero_point, scale: (
                _by_groups(x, codes, zero_point, scale)[0],
                _by_groups(x, codes, zero_point, scale)[0] @ f64(scale)[0],
            ),
            "Two rows with the same codes and other scales: do they get the same answer?",
        ),
        Mistake(
            "every so many-th input in one group",
            _by_strides,
            "A group is so many inputs in a row. With 6 inputs in 2 groups, which are in the first?",
        ),
    ),
)


# 11.4 -------------------------------------------------------------------------------------------------------------


def _split_case(
    generator: Generator, tokens: int, outputs: int, inputs: int, splits: int
) -> tuple[Tensor, Tensor, int]:
    x, w = (torch.randn(rows, inputs, generator=generator) for rows in (tokens, outputs))
    return x, w, splits


def _split_cases(generator: Generator) -> list[Case]:
    x = torch.ones(1, 3 * BLOCK)
    w = torch.arange(1.0, 4.0).repeat_interleave(BLOCK)[None] / BLOCK
    sizes = [
        (2, 3, 4 * BLOCK, 2),
        (1, 5, 5 * BLOCK, 3),
        (3, 2, 600, 4),
        (2, 2, 200, 8),
        (1, 3, 6 * BLOCK + 40, 3),
    ]
    return make_cases([(x, w, 3), (x, w, 2)], (_split_case(generator, *each) for each in sizes))


def _partials(
    x: Any, w: Any, splits: int, *, inputs: int | None = None, empty: bool = False
) -> np.ndarray:
    """The sums of each part; of the first `inputs` alone, with parts that are empty where those count too."""
    inputs = inputs or np.shape(x)[1]
    blocks = -(-inputs // BLOCK)
    size = -(-blocks // splits) * BLOCK
    starts = range(0, size * splits if empty else inputs, size)
    return np.stack([f64(x)[:, start : min(start + size, inputs)] @ f64(w)[:, start : min(start + size, inputs)].T
                     for start in starts])  # fmt: skip


def _added(partials: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return partials, partials.sum(axis=0)


def _rounded_down(x: Any, w: Any, splits: int) -> tuple[np.ndarray, np.ndarray]:
    blocks = -(-np.shape(x)[1] // BLOCK)
    size = max(1, blocks // splits) * BLOCK
    starts = range(0, min(splits, blocks) * size, size)
    return _added(
        np.stack(
            [
                f64(x)[:, start : start + size] @ f64(w)[:, start : start + size].T
                for start in starts
            ]
        )
    )


def _dealt_out(x: Any, w: Any, splits: int) -> tuple[np.ndarray, np.ndarray]:
    inputs = np.shape(x)[1]
    blocks = -(-inputs // BLOCK)
    parts = -(-blocks // -(-blocks // splits))
    part = np.arange(inputs) // BLOCK % parts
    return _added(np.stack([f64(x)[:, part == i] @ f64(w)[:, part == i].T for i in range(parts)]))


SPLIT = Exercise(
    id="11.4",
    title="Split K",
    function="split_sums",
    points=2,
    cases=_split_cases,
    reference=lambda x, w, splits: _added(_partials(x, w, splits)),
    tolerance=1e-4,
    mistakes=(
        Mistake(
            "blocks are lost: rounded down",
            _rounded_down,
            "Five blocks for three programs: how many blocks is 5 // 3 for each, and who has the last two?",
        ),
        Mistake(
            "programs without any work",
            lambda x, w, splits: _added(_partials(x, w, splits, empty=True)),
            "Five blocks, four programs, two blocks each: how many programs have something to do?",
        ),
        Mistake(
            "the last, incomplete block is left out",
            lambda x, w, splits: _added(
                _partials(x, w, splits, inputs=max(BLOCK, np.shape(x)[1] // BLOCK * BLOCK))
            ),
            "How many blocks are 200 inputs: 200 // 128? What becomes of the last 72?",
        ),
        Mistake(
            "blocks dealt out in turn",
            _dealt_out,
            "A program reads its blocks one behind the other in memory: which two does program 0 have of four?",
        ),
        Mistake(
            "the last program's sums for all",
            lambda x, w, splits: (_partials(x, w, splits), _partials(x, w, splits)[-1]),
            "Who adds up? If each program overwrites y, whose sums are left in it?",
        ),
    ),
)


# 11.5 -------------------------------------------------------------------------------------------------------------


def _matvec_case(
    generator: Generator, rows: int, inputs: int, group_size: int
) -> tuple[Tensor, ...]:
    x = torch.randn(inputs, generator=generator)
    packed = whole(generator, 0, 255, rows, -(-inputs // 2)).to(torch.uint8)
    scale = uniform(generator, 0.01, 0.1, rows, inputs // group_size)
    return x, packed, scale, _zero_points(generator, *scale.shape)


def _matvec_cases(generator: Generator) -> list[Case]:
    by_hand = (
        torch.tensor([1.0, 2.0, -1.0, 0.5]),
        torch.tensor([[0x89, 0xF3]], dtype=torch.uint8),
        torch.tensor([[0.5]]),
        torch.tensor([[7]], dtype=torch.uint8),
    )
    even_groups = [(3, 64, 32), (33, 20, 10), (2, 160, 80)]  # several blocks of rows, and of inputs
    odd_groups = [
        (4, 105, 35),
        (3, 75, 15),
        (1, 45, 45),
    ]  # the codes of a byte may belong to two groups
    sizes = [
        *even_groups,
        *odd_groups,
    ]  # small: an interpreter takes milliseconds for each block of a kernel
    return make_cases([by_hand], (_matvec_case(generator, *each) for each in sizes))


def _matvec(
    x: Any, packed: Any, scale: Any, zero_point: Any, *, order: tuple[int, int] = (0, 4)
) -> np.ndarray:
    """By groups; the codes of even and of odd k begin at these bits of their byte."""
    nibbles = np.asarray(packed, np.int64)[:, :, None] >> np.array(order) & 15  # (rows, bytes, 2)
    return _by_groups(x, nibbles.reshape(len(packed), -1)[:, : len(x)], zero_point, scale)[1]


def _whole_blocks(block: int) -> Callable[..., np.ndarray]:
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
            lambda *args: _matvec(*args, order=(4, 0)),
            "In which half of its byte is code 0? What does byte & 15 give?",
        ),
        Mistake(
            "8 for every zero point",
            lambda x, packed, scale, zero_point: _matvec(
                x, packed, scale, np.full(np.shape(scale), 8)
            ),
            "Each group of each row has a zero point of its own: is yours loaded at the same place as its scale?",
        ),
        Mistake(
            "one row's scales for all",
            lambda x, packed, scale, zero_point: _matvec(
                x, packed, np.repeat(f64(scale)[:1], len(scale), 0), zero_point
            ),
            "The scales of row n begin n times the number of groups behind those of row 0: do yours?",
        ),
        Mistake(
            "one group's scale for the whole row",
            lambda x, packed, scale, zero_point: _matvec(
                x, packed, np.repeat(f64(scale)[:, :1], np.shape(scale)[1], 1), zero_point
            ),
            "k runs through several groups: does the place from which you load the scale change with it?",
        ),
        *(
            Mistake(
                "the last, incomplete block is left out",
                _whole_blocks(block),
                "77 inputs in blocks of 32: where does your loop end, and what has to say which inputs there are?",
            )
            for block in (16, 32, 64, 128)
        ),
    ),
)


SHEET = Sheet("11", "An INT4 kernel", (PACK, MAGIC, GROUPS, SPLIT, MATVEC))
