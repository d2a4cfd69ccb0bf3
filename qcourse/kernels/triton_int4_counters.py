"""Counters for products whose K is split between programs, kept at 0 from call to call.

The idea: a counter tells the last program of a tile that it is the last and adds up the sums. The
kernel sets the counter back to 0, so the next call needs no second launch to clear it. Each stream
has its own counters, because products on two streams may run at the same time.

How it differs from ``triton_int4_launch.py``: that is one call; this outlives it.
"""

import threading

import torch
from jaxtyping import Int32
from torch import Tensor

COUNTERS = 4096  # the most tiles of a product that is split
STREAMS = 32  # the most streams per device whose counters are kept

_kept: dict[torch.device, Tensor] = {}  # (streams, counters) per device
_places: dict[tuple[torch.device, int], int] = {}  # the row of each stream
_lock = threading.Lock()


def zero_counters(device: torch.device) -> Int32[Tensor, " counters"]:
    """Return COUNTERS counters at 0 for the current stream of a device.

    >>> int(zero_counters(torch.device("cpu")).count_nonzero())
    0
    """
    if device.type == "cuda":
        # No memory may be kept while a graph is captured. A product before the capture (a warm-up)
        # makes the counters; without one, the graph clears its own at each replay. Graphs captured
        # on one stream share counters, so they must not be replayed at the same time.
        if device not in _kept and not torch.cuda.is_current_stream_capturing():
            _kept[device] = torch.zeros(STREAMS, COUNTERS, dtype=torch.int32, device=device)
            torch.cuda.synchronize(device)  # another stream may be the next to use them
        place = _place(device)
        if device in _kept and place < STREAMS:
            return _kept[device][place]
    return torch.zeros(COUNTERS, dtype=torch.int32, device=device)


def _place(device: torch.device) -> int:
    """The row of the current stream: how many other streams of the device came before it."""
    stream = (device, torch.cuda.current_stream(device).cuda_stream)
    with _lock:  # two threads on new streams must not get the same row
        taken = sum(other == device for other, _ in _places)
        return _places.setdefault(stream, taken)
