"""Quantize several weights as one, their rows one below the other, and take the result apart.

The idea: layers that read one input need the same work per column. If each row has a scale of its
own, the rows of all these layers can go through it together, with the same result.
How it differs from `numerics/granularity.py`: that says which values share a scale, for any tensor.
"""

from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any

import torch

from qcourse.numerics.quantized import QuantizedTensor, Quantizer


def rows_are_alone(quantizer: Quantizer, inputs: int) -> bool:
    """Return whether each row of a weight has parameters of its own.

    >>> from qcourse import IntQuantizer, PerGroup, PerTensor
    >>> rows_are_alone(IntQuantizer(4, granularity=PerGroup(32)), 64)
    True
    >>> rows_are_alone(IntQuantizer(4, granularity=PerTensor()), 64)
    False
    """
    # Fit two rows and look whether all parameters have two rows too.
    parameters = quantizer.fit(torch.zeros(2, inputs))
    for each in fields(parameters):
        value = getattr(parameters, each.name)
        if value.ndim == 0 or len(value) != 2:
            return False
    return True


def split_rows(q: QuantizedTensor, counts: Sequence[int]) -> list[QuantizedTensor]:
    """Return a weight as weights of so many rows each; needs rows that are alone.

    >>> from qcourse import IntQuantizer, PerChannel
    >>> q = IntQuantizer(4, granularity=PerChannel(0))(torch.tensor([[7.0], [14.0], [21.0]]))
    >>> [part.scale.tolist() for part in split_rows(q, [1, 2])]
    [[[1.0]], [[2.0], [3.0]]]
    """
    parts = []
    start = 0
    for count in counts:
        rows = slice(start, start + count)
        own: dict[str, Any] = {}
        for each in fields(q.parameters):
            own[each.name] = getattr(q.parameters, each.name)[rows].clone()
        parameters = replace(q.parameters, **own)
        parts.append(QuantizedTensor(q.codes[rows].clone(), parameters, q.quantizer))
        start += count
    return parts
