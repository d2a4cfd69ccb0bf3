"""Well-known devices by their data sheets, and this machine as measured.

The idea: a prediction needs two numbers of a device. For well-known ones the vendor states them; of the machine that
one sits at they are measured in a few seconds: bandwidth by a sum over more numbers than any cache holds, the peak by
the product of two matrices that are large enough to keep every multiplier busy.

Source: the vendors' data sheets of each product, dense (without sparsity); McCalpin's STREAM (1995) for
measuring bandwidth.

How it differs from ``roofline.py``: there what follows from these numbers; here the numbers.
"""

import time
from collections.abc import Callable

from qcourse.cost.roofline import Device

T, G = 1e12, 1e9


def _sheet(name: str, tb_per_s: float, gb: float, **tera_ops: float) -> Device:
    peaks = {dtype: value * T for dtype, value in tera_ops.items()}
    return Device(name, tb_per_s * T, {"bfloat16": peaks["float16"], **peaks}, gb * G, f"data sheet of the {name}")


DEVICES = {
    device.name: device
    for device in (
        _sheet("NVIDIA V100 SXM2", 0.9, 32, float16=125),
        _sheet("NVIDIA A10", 0.6, 24, float16=125, int8=250),
        _sheet("NVIDIA A100 SXM 40 GB", 1.555, 40, float16=312, int8=624),
        _sheet("NVIDIA A100 SXM 80 GB", 2.039, 80, float16=312, int8=624),
        _sheet("NVIDIA L4", 0.3, 24, float16=121, int8=242, float8=242),
        _sheet("NVIDIA H100 SXM", 3.35, 80, float16=989, int8=1979, float8=1979),
        _sheet("NVIDIA H200 SXM", 4.8, 141, float16=989, int8=1979, float8=1979),
        _sheet("AMD MI300X", 5.3, 192, float16=1307, int8=2615, float8=2615),
    )
}


def measure(*, dtype: str = "float32", size: int = 2048, repeats: int = 5) -> Device:
    """This machine's CPU, by torch: bytes a second of a sum over 256 MB, operations a second of a square product.

    Takes some seconds; the best of several runs counts. What runs beside it takes its share.

    Args:
        dtype: of the product, as torch names it.
        size: of the two square matrices.
        repeats: how often each is run.

    Raises:
        ValueError: no such dtype; size or repeats below 1.
    """
    import torch  # so that the rest of ``cost`` needs none

    if not isinstance(getattr(torch, dtype, None), torch.dtype):
        raise ValueError(f"dtype={dtype!r} must be the name of a dtype of torch, such as 'float32'")
    if size < 1 or repeats < 1:
        raise ValueError(f"size={size!r} and repeats={repeats!r} must be at least 1")
    numbers = torch.ones(1 << 26)
    a, b = (torch.ones(size, size, dtype=getattr(torch, dtype)) for _ in range(2))
    bandwidth = numbers.nbytes / _least_s(numbers.sum, repeats)
    peak = 2 * size**3 / _least_s(lambda: a @ b, repeats)
    return Device("this machine", bandwidth, {dtype: peak}, source=f"measured, {torch.get_num_threads()} threads")


def _least_s(work: Callable[[], object], repeats: int) -> float:
    work()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return min(times)
