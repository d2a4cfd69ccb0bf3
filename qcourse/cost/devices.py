"""Well-known devices by their data sheets, and this machine as measured.

The idea: a prediction needs two numbers of a device. For well-known ones the vendor states them; of the machine that
one sits at they are measured in a few seconds: bandwidth by the product of one token with a weight that no cache holds,
the peak by the product of two matrices that are large enough to keep every multiplier busy.

Source: the vendors' data sheets of each product, dense (without sparsity); McCalpin's STREAM (1995) for
measuring bandwidth.

How it differs from ``roofline.py``: there what follows from these numbers; here the numbers.
"""

from collections.abc import Sequence

from qcourse.cost.roofline import Device
from qcourse.machine import least_time_s

SMALL = 256  # of the first square product that is measured
SLOW_S = 0.2  # a product that takes longer is not measured on larger matrices

T, G = 1e12, 1e9


def _sheet(name: str, tb_per_s: float, gb: float, **tera_ops: float) -> Device:
    peaks = {dtype: value * T for dtype, value in tera_ops.items()}
    return Device(name, tb_per_s * T, peaks, gb * G, f"data sheet of the {name}")


DEVICES = {
    device.name: device
    for device in (
        _sheet("NVIDIA V100 SXM2", 0.9, 32, float16=125),
        _sheet("NVIDIA A10", 0.6, 24, float16=125, bfloat16=125, int8=250),
        _sheet("NVIDIA A100 SXM 40 GB", 1.555, 40, float16=312, bfloat16=312, int8=624),
        _sheet("NVIDIA A100 SXM 80 GB", 2.039, 80, float16=312, bfloat16=312, int8=624),
        _sheet("NVIDIA L4", 0.3, 24, float16=121, bfloat16=121, int8=242, float8=242),
        _sheet("NVIDIA H100 SXM", 3.35, 80, float16=989, bfloat16=989, int8=1979, float8=1979),
        _sheet("NVIDIA H200 SXM", 4.8, 141, float16=989, bfloat16=989, int8=1979, float8=1979),
        _sheet("AMD MI300X", 5.3, 192, float16=1307, bfloat16=1307, int8=2615, float8=2615),
    )
}


def measure_device(
    *, dtypes: Sequence[str] = ("bfloat16", "float32"), size: int = 2048, repeats: int = 5
) -> Device:
    """This machine's CPU, by torch: what the products of one token and of many get out of it.

    Bandwidth is bytes a second of a weight of 8192 x 8192 that one token is multiplied with, in the first of the
    dtypes: the stream that decoding consists of, and on many CPUs well below what a plain sum over memory gets
    (`stream`). The peak is that of a square product. On a processor without instructions for bfloat16 torch's product
    of bfloat16 has a lower peak than that of float32. It takes a few seconds; the best of several runs counts, and what
    runs beside it takes its share.

    Args:
        dtypes: of the products, as torch names them.
        size: of the two square matrices; a product that would take seconds is measured on smaller ones.
        repeats: how often each is run.

    Raises:
        ValueError: no dtype, or none that torch knows; size or repeats below 1.
    """
    import torch  # so that the rest of ``cost`` needs none

    for dtype in dtypes or [""]:
        if not isinstance(getattr(torch, dtype, None), torch.dtype):
            raise ValueError(
                f"dtypes={list(dtypes)!r} must be names of dtypes of torch, such as 'float32'"
            )
    if size < 1 or repeats < 1:
        raise ValueError(f"size={size!r} and repeats={repeats!r} must be at least 1")
    peaks = {dtype: _peak_ops_per_s(dtype, size, repeats) for dtype in dtypes}
    w = torch.ones(8192, 8192, dtype=getattr(torch, dtypes[0]))
    x = w[:1].clone()
    bandwidth = w.nbytes / least_time_s(lambda: torch.nn.functional.linear(x, w), repeats)
    source = f"measured, {torch.get_num_threads()} threads, {dtypes[0]}"
    return Device("this machine", bandwidth, peaks, source=source)


def _peak_ops_per_s(dtype: str, size: int, repeats: int) -> float:
    """Operations a second of a square product; of a smaller one where the product of that dtype is slow."""
    import torch

    now = min(size, SMALL)
    while True:
        a, b = (torch.ones(now, now, dtype=getattr(torch, dtype)) for _ in range(2))
        time_s = least_time_s(lambda a=a, b=b: a @ b, repeats)  # type: ignore[misc]
        if now == size or time_s > SLOW_S:
            return 2 * now**3 / time_s
        now = min(size, 2 * now)


def stream_bandwidth(repeats: int = 5) -> float:
    """Bytes a second that a sum over 256 MB of float32 reads: as near to the memory's own limit as torch comes."""
    import torch

    numbers = torch.ones(1 << 26)
    return numbers.nbytes / least_time_s(numbers.sum, repeats)
