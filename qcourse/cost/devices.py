"""Devices by their data sheets, and this machine as measured.

The idea: a prediction needs a device's bandwidth and its peak. Vendors state both; on this machine
they are measured, by the product of a weight with one token and by that of two large matrices.
Source: the vendors' data sheets, dense (without sparsity); McCalpin's STREAM (1995).
How it differs from `roofline.py`: that computes with these numbers.
"""

from collections.abc import Sequence

from qcourse.cost.roofline import Device
from qcourse.machine import least_time_s

SMALL = 256  # the side of the first square product that is measured
SLOW_S = 0.2  # a slower product is not measured on larger matrices
WEIGHT_SIDE = 8192  # of the weight that one token is multiplied with

TERA = 1e12
GIGA = 1e9


def _sheet(name: str, tb_per_s: float, gb: float, **tera_ops: float) -> Device:
    peaks = {dtype: value * TERA for dtype, value in tera_ops.items()}
    return Device(name, tb_per_s * TERA, peaks, gb * GIGA, f"data sheet of the {name}")


_SHEETS = (
    _sheet("NVIDIA V100 SXM2", 0.9, 32, float16=125),
    _sheet("NVIDIA A10", 0.6, 24, float16=125, bfloat16=125, int8=250),
    _sheet("NVIDIA A100 SXM 40 GB", 1.555, 40, float16=312, bfloat16=312, int8=624),
    _sheet("NVIDIA A100 SXM 80 GB", 2.039, 80, float16=312, bfloat16=312, int8=624),
    _sheet("NVIDIA L4", 0.3, 24, float16=121, bfloat16=121, int8=242, float8=242),
    _sheet("NVIDIA H100 SXM", 3.35, 80, float16=989, bfloat16=989, int8=1979, float8=1979),
    _sheet("NVIDIA H200 SXM", 4.8, 141, float16=989, bfloat16=989, int8=1979, float8=1979),
    _sheet("AMD MI300X", 5.3, 192, float16=1307, bfloat16=1307, int8=2615, float8=2615),
)
DEVICES = {device.name: device for device in _SHEETS}


def measure_device(
    *, dtypes: Sequence[str] = ("bfloat16", "float32"), size: int = 2048, repeats: int = 5
) -> Device:
    """Return this machine's CPU as measured with torch, the best of `repeats` runs.

    Bandwidth is that of one token times a weight in the first dtype, as in decoding. Each dtype has
    the peak of a square product of `size`, or of a smaller one if that takes seconds.
    """
    import torch  # here, so that the rest of `cost` needs no torch

    for dtype in dtypes or [""]:
        if not isinstance(getattr(torch, dtype, None), torch.dtype):
            raise ValueError(
                f"dtypes={list(dtypes)!r} must be names of dtypes of torch, such as 'float32'"
            )
    if size < 1 or repeats < 1:
        raise ValueError(f"size={size!r} and repeats={repeats!r} must be at least 1")
    peaks = {dtype: _peak_ops_per_s(dtype, size, repeats) for dtype in dtypes}
    bandwidth = _bandwidth_bytes_per_s(dtypes[0], repeats)
    source = f"measured, {torch.get_num_threads()} threads, {dtypes[0]}"
    return Device("this machine", bandwidth, peaks, source=source)


def _bandwidth_bytes_per_s(dtype: str, repeats: int) -> float:
    import torch

    # As in decoding, one token is multiplied with a weight that has to come from memory.
    w = torch.ones(WEIGHT_SIDE, WEIGHT_SIDE, dtype=getattr(torch, dtype))
    x = w[:1].clone()

    def one_token() -> None:
        torch.nn.functional.linear(x, w)

    return w.nbytes / least_time_s(one_token, repeats)


def _peak_ops_per_s(dtype: str, size: int, repeats: int) -> float:
    import torch

    # Double the side until the product is slow, since some dtypes have no fast product.
    side = min(size, SMALL)
    while True:
        a = torch.ones(side, side, dtype=getattr(torch, dtype))
        b = torch.ones_like(a)
        time_s = least_time_s(lambda a=a, b=b: a @ b, repeats)  # type: ignore[misc]
        if side == size or time_s > SLOW_S:
            return 2 * side**3 / time_s
        side = min(size, 2 * side)


def stream_bandwidth(repeats: int = 5) -> float:
    """Return the bytes per second of a sum over 256 MB of float32, close to the memory's limit."""
    import torch

    numbers = torch.ones(1 << 26)
    return numbers.nbytes / least_time_s(numbers.sum, repeats)
