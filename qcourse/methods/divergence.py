"""The range whose histogram, after quantization, still tells most of what it told before.

The idea: let P be the bins inside a candidate range, with all that lies beyond added to the bins at its ends (clipping
does that). Cut the same bins, without what lies beyond, into as many equal runs as the grid has levels, and spread each
run's count evenly over those of its bins that hold anything: that is Q, what is left once a run has become one code.
Take the range with the least KL(P || Q) = sum P log(P / Q).

Source: Migacz, "8-bit inference with TensorRT" (GTC 2017), there for |x| and 128 levels.

How it differs from the naive program (which the tests hold, bin by bin): every sum over bins is a difference of running
sums, so that a candidate costs its levels and not its bins, and all candidates are weighed at once.
"""

import torch
from jaxtyping import Float64, Int64
from torch import Tensor


def least_divergence(counts: Int64[Tensor, " bins"], zero: int, levels: int) -> tuple[int, int]:
    """The bins [start, stop) of the candidate range with the least KL divergence, the narrowest of equals.

    Args:
        counts: a histogram that holds at least one value.
        zero: the bin that begins at 0; every range reaches from there.
        levels: how many codes the grid has for a range.

    Returns:
        start <= zero <= stop. Candidates have at least `levels` bins, and both ends go out to the data's at one pace.

    >>> least_divergence(torch.tensor([40, 30, 20, 10, 1, 0, 0, 1]), zero=0, levels=2)
    (0, 3)
    """
    used = counts.nonzero()
    below, above = max(zero - int(used[0]), 0), max(int(used[-1]) + 1 - zero, 0)
    longest = max(below, above)
    part = torch.arange(1, longest + 1, device=counts.device)
    start, stop = zero - below * part // longest, zero + above * part // longest
    allowed = (stop - start >= levels) | (part == longest)
    start, stop = start[allowed], stop[allowed]
    best = divergences(counts, start, stop, levels).argmin()
    return int(start[best]), int(stop[best])


def divergences(
    counts: Int64[Tensor, " bins"],
    start: Int64[Tensor, " ranges"],
    stop: Int64[Tensor, " ranges"],
    levels: int,
) -> Float64[Tensor, " ranges"]:
    """KL(P || Q) in nats for each range of bins [start, stop), of at least `levels` bins unless it holds all.

    Infinite where an end bin is empty though values lie beyond it: P then has something where Q has nothing.

    >>> two = torch.tensor([0, 0]), torch.tensor([2, 4])
    >>> divergences(torch.tensor([3, 1, 2, 2]), *two, levels=2).round(decimals=4)  # P = 3 5, then 3 1 2 2
    tensor([0.3128, 0.0654], dtype=torch.float64)
    """
    size, held = _running(counts), _running(counts > 0)
    cuts = (
        start[:, None]
        + (stop - start)[:, None] * torch.arange(levels + 1, device=counts.device) // levels
    )
    mass, bins = size[cuts].diff(dim=1), held[cuts].diff(dim=1)
    log_q = (
        (mass / bins.clamp(min=1)).clamp(min=1).log()
    )  # of a bin that holds anything, times the mass inside
    below, above = size[start], size[-1] - size[stop]
    first, last = counts[start].double(), counts[stop - 1].double()
    # Sums over P, times the whole mass: first as if nothing lay beyond, then with the two end bins as they are.
    p_log_p = _running(_xlogx(counts.double()))
    p_log_p = (
        p_log_p[stop]
        - p_log_p[start]
        + _xlogx(first + below)
        - _xlogx(first)
        + _xlogx(last + above)
        - _xlogx(last)
    )
    p_log_q = (mass * log_q).sum(dim=1) + below * log_q[:, 0] + above * log_q[:, -1]
    kl = (p_log_p - p_log_q) / size[-1] - size[-1].log() + mass.sum(dim=1).log()
    lost = ((first == 0) & (below > 0)) | ((last == 0) & (above > 0))
    return torch.where(lost, torch.inf, kl)


def _running(values: Tensor) -> Float64[Tensor, " edges"]:
    """The sum of all values before each edge between bins."""
    return torch.nn.functional.pad(values.double().cumsum(dim=0), (1, 0))


def _xlogx(x: Tensor) -> Tensor:
    """x log x, 0 at 0."""
    return torch.xlogy(x, x)
