"""The ways to multiply by a weight on a GPU that `int4_kernel.py` compares."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from _gpu import GROUP_SIZE, int4_weight
from torch import Tensor

from qcourse import PerGroup, quantize
from qcourse.kernels.int4_matmul import int4_matmul
from qcourse.kernels.int4_weight import Int4Weight
from qcourse.kernels.triton_int4_configs import BATCHES
from qcourse.kernels.triton_int4_launch import decode, int4_mm

LADDER = (1, 16)  # the batches that the slower versions are timed at
FP16 = torch.float16
BF16 = torch.bfloat16
FP8 = torch.float8_e4m3fn


@dataclass(frozen=True)
class Contender:
    """One way to multiply by a weight.

    Args:
        weight_nbytes: bytes of the weight, scales included.
        make: returns the tensors of one copy of a random weight.
        call: x and such tensors to the product.
        dtype: of x.
        batches: the batches that it is timed at.
    """

    weight_nbytes: int
    make: Callable[[], tuple]
    call: Callable[..., object]
    dtype: torch.dtype = FP16
    batches: tuple[int, ...] = BATCHES

    def nbytes(self, M: int, N: int, K: int) -> int:
        """The bytes that a call reads and writes."""
        x_nbytes = M * K * self.dtype.itemsize
        y_nbytes = M * N * 2
        return self.weight_nbytes + x_nbytes + y_nbytes


def contenders(N: int, K: int) -> dict[str, Contender]:
    """Return all contenders of this GPU and this torch, by name."""
    codes_nbytes = N * K // 2
    groups = N * K // GROUP_SIZE
    our_nbytes = codes_nbytes + 2 * groups
    tinygemm_nbytes = codes_nbytes + 4 * groups
    ours = partial(int4_weight, N, K)
    found = {
        "F.linear fp16": Contender(2 * N * K, partial(dense_weight, N, K, FP16), F.linear),
        "F.linear bf16": Contender(2 * N * K, partial(dense_weight, N, K, BF16), F.linear, BF16),
        "naive": Contender(our_nbytes, ours, partial(our_call, version="naive"), batches=LADDER),
        "planes": Contender(our_nbytes, ours, partial(our_call, version="planes"), batches=LADDER),
        "tuned fp16": Contender(our_nbytes, ours, our_call),
        "tuned bf16": Contender(our_nbytes, ours, our_call, BF16),
        "int4_matmul": Contender(our_nbytes, partial(whole_weight, N, K), int4_matmul),
        "decode and dense": Contender(our_nbytes, ours, decode_and_multiply),
        "tinygemm": Contender(tinygemm_nbytes, partial(tinygemm, N, K), tinygemm_call, BF16),
        "FP8": Contender(N * K, partial(fp8_weight, N, K), fp8_call, FP8),
    }
    if find_spec("gemlite"):
        layer = partial(gemlite_layer, N, K)
        found["gemlite"] = Contender(our_nbytes, layer, gemlite_call)
    return found


def dense_weight(N: int, K: int, dtype: torch.dtype) -> tuple[Tensor]:
    """Return a random weight in floats."""
    return (torch.randn(N, K, device="cuda", dtype=dtype).mul_(0.02),)


def our_call(x: Tensor, words: Tensor, scale: Tensor, version: str = "tuned") -> Tensor:
    """Return our product."""
    return int4_mm(x, words, scale, group_size=GROUP_SIZE, version=version)


def decode_and_multiply(x: Tensor, words: Tensor, scale: Tensor) -> Tensor:
    """Write w_hat out, then multiply it as floats."""
    w_hat = decode(words, scale, group_size=GROUP_SIZE, inputs=x.shape[1], dtype=x.dtype)
    return F.linear(x, w_hat)


def whole_weight(N: int, K: int) -> tuple[Int4Weight]:
    """Return a weight as int4_matmul takes it."""
    (w,) = dense_weight(N, K, FP16)
    q = quantize(w, 4, granularity=PerGroup(GROUP_SIZE), scale_dtype=FP16)
    return (Int4Weight.from_quantized(q),)


def tinygemm(N: int, K: int) -> tuple[Tensor, Tensor]:
    """Return torch's packed weight (even columns in the high nibble), its scales and zeros."""
    codes = torch.randint(0, 256, (N, K // 2), dtype=torch.uint8, device="cuda")
    packed = torch.ops.aten._convert_weight_to_int4pack(codes, 8)
    scales_and_zeros = torch.rand(K // GROUP_SIZE, N, 2, device="cuda", dtype=BF16)
    return packed, scales_and_zeros.mul_(0.01)


def tinygemm_call(x: Tensor, packed: Tensor, scales_and_zeros: Tensor) -> Tensor:
    """Return torch's own INT4 product."""
    return torch.ops.aten._weight_int4pack_mm(x, packed, GROUP_SIZE, scales_and_zeros)


def fp8_weight(N: int, K: int) -> tuple[Tensor, Tensor]:
    """Return an FP8 weight, and the scale 1."""
    return torch.ones(N, K, device="cuda").to(FP8), torch.ones((), device="cuda")


def fp8_call(x: Tensor, w: Tensor, one: Tensor) -> Tensor:
    """Return torch's FP8 product, scaled by 1."""
    return torch._scaled_mm(x, w.T, scale_a=one, scale_b=one, out_dtype=BF16)


def gemlite_layer(N: int, K: int) -> tuple[Callable]:
    """Return gemlite's layer, with random codes."""
    from gemlite.core import DType, GemLiteLinearTriton

    layer = GemLiteLinearTriton(
        4, GROUP_SIZE, K, N, input_dtype=DType.FP16, output_dtype=DType.FP16
    )
    codes = torch.randint(0, 16, (N, K), dtype=torch.uint8, device="cuda")
    scale = torch.rand(N, K // GROUP_SIZE, device="cuda").mul_(0.01).half()
    layer.pack(codes, scale, torch.full_like(scale, 8), None)
    return (layer,)


def gemlite_call(x: Tensor, layer: Callable) -> Tensor:
    """Return gemlite's product."""
    return layer(x)
