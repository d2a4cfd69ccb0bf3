"""The number formats of ggml's tensors: how many values and bytes a block has.

A GGUF file names the type of each tensor by a number. Blocks of a type all have one size, so the
size of a tensor follows from its shape. `ggml_blocks.py` decodes the types that the course uses.

Source: ggml_type in ggml.h and the blocks in ggml-common.h, of the public repository of llama.cpp.
"""

from typing import NamedTuple


class GGMLType(NamedTuple):
    """A type of ggml: its name, the values per block, and the bytes per block."""

    name: str
    block_size: int
    block_nbytes: int

    @property
    def bits_per_weight(self) -> float:
        """8 block_nbytes / block_size.

        >>> TYPES[3].name, TYPES[3].bits_per_weight
        ('Q4_1', 5.0)
        """
        return 8 * self.block_nbytes / self.block_size


# By the number that stands in the file. Numbers that are missing were withdrawn.
TYPES = {
    0: GGMLType("F32", 1, 4),
    1: GGMLType("F16", 1, 2),
    2: GGMLType("Q4_0", 32, 18),
    3: GGMLType("Q4_1", 32, 20),
    6: GGMLType("Q5_0", 32, 22),
    7: GGMLType("Q5_1", 32, 24),
    8: GGMLType("Q8_0", 32, 34),
    9: GGMLType("Q8_1", 32, 40),
    10: GGMLType("Q2_K", 256, 84),
    11: GGMLType("Q3_K", 256, 110),
    12: GGMLType("Q4_K", 256, 144),
    13: GGMLType("Q5_K", 256, 176),
    14: GGMLType("Q6_K", 256, 210),
    15: GGMLType("Q8_K", 256, 292),
    16: GGMLType("IQ2_XXS", 256, 66),
    17: GGMLType("IQ2_XS", 256, 74),
    18: GGMLType("IQ3_XXS", 256, 98),
    19: GGMLType("IQ1_S", 256, 50),
    20: GGMLType("IQ4_NL", 32, 18),
    21: GGMLType("IQ3_S", 256, 110),
    22: GGMLType("IQ2_S", 256, 82),
    23: GGMLType("IQ4_XS", 256, 136),
    24: GGMLType("I8", 1, 1),
    25: GGMLType("I16", 1, 2),
    26: GGMLType("I32", 1, 4),
    27: GGMLType("I64", 1, 8),
    28: GGMLType("F64", 1, 8),
    29: GGMLType("IQ1_M", 256, 56),
    30: GGMLType("BF16", 1, 2),
    34: GGMLType("TQ1_0", 256, 54),
    35: GGMLType("TQ2_0", 256, 66),
    39: GGMLType("MXFP4", 32, 17),
    40: GGMLType("NVFP4", 64, 36),
    41: GGMLType("Q1_0", 128, 18),
}
