"""Counters at 0 for products that share a tile's K between programs, kept from call to call.

The idea: the last program to arrive adds up what all have left, and a counter tells it that it is the last. It has to
be 0 before, and the kernel puts it back to 0: so the same counters serve every call, where setting new ones to 0 would
be a second launch, as long as a small product itself. Each stream has its own: products at one time do not meet.

While a graph is captured no memory may be kept: counters have to be there already, which any product before it (a
warm-up) sees to; without one the graph sets its own to 0 at each replay. Graphs captured on one stream share counters:
they are not to be replayed at one time.

How it differs from ``triton_int4_launch.py``: that is one call; this is what outlives it.
"""

import threading

import torch
from jaxtyping import Int32
from torch import Tensor

COUNTERS = 4096  # the most tiles of a product that is split
STREAMS = 32  # with counters that are kept

_kept: dict[torch.device, Tensor] = {}
_lock = threading.Lock()
_places: dict[tuple[torch.device, int], int] = {}


def counters_at_0(device: torch.device) -> Int32[Tensor, " counters"]:
    """COUNTERS counters at 0 for the current stream of a device.

    >>> int(counters_at_0(torch.device("cpu")).count_nonzero())
    0
    """
    if device.type == "cuda":
        if device not in _kept and not torch.cuda.is_current_stream_capturing():
            _kept[device] = torch.zeros(STREAMS, COUNTERS, dtype=torch.int32, device=device)
            torch.cuda.synchronize(device)  # another stream may be the next to use them
        stream = device, torch.cuda.current_stream(device).cuda_stream
        with _lock:  # two threads on new streams must not get one place
            place = _places.setdefault(stream, sum(other == device for other, _ in _places))
        if device in _kept and place < STREAMS:
            return _kept[device][place]
    return torch.zeros(COUNTERS, dtype=torch.int32, device=device)
