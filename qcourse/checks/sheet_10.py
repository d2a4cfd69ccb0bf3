"""Sheet 10, the roofline: cases, references, tolerances, points and known mistakes.

Where the answer is a whole number (10.3, 10.5), what is rounded lies a twentieth or more from the next whole number, or
is one exactly, however it is worked out; so the order of the arithmetic does not matter. In 10.2 no work lies within a
twentieth of the ridge.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any

from torch import Generator

from qcourse.checks.common import make_cases, pick, uniform, until_told, whole
from qcourse.checks.exercise import Case, Exercise, Mistake, Sheet

MARGIN = 0.05
Numbers = tuple[Any, ...]


def _draw(generator: Generator, low: float, high: float) -> float:
    """A number of three digits, as people write them."""
    return float(f"{float(uniform(generator, low, high)):.3g}")


def _wanted(
    draw: Callable[[], Numbers], good: Callable[..., bool], count: int
) -> Iterator[Numbers]:
    """The arguments of so many drawn cases of which good holds."""
    while count:
        args = draw()
        if good(*args):
            count -= 1
            yield args


def _between(value: float) -> bool:
    """Whether rounding up or down is no matter of the last digits."""
    return MARGIN < value % 1 < 1 - MARGIN


# 10.1 -------------------------------------------------------------------------------------------------------------


def _layer_cases(generator: Generator) -> list[Case]:
    by_hand = [(3, 8, 1, 4, 4), (6, 16, 5, 8, 16), (4096, 4096, 16, 4, 128)]
    drawn = [
        (
            64 * int(whole(generator, 1, 60)),
            256 * int(whole(generator, 1, 15)),
            int(whole(generator, 2, 500)),
            pick(generator, 2, 4, 8),
            pick(generator, 32, 64, 128),
        )
        for _ in range(3)
    ]
    return make_cases(by_hand, drawn)


def _moved(
    outputs: int,
    inputs: int,
    batch: int,
    bits: float,
    group_size: int,
    *,
    scale_bytes: float = 2,
    reads: int = 1,
) -> float:
    """Bytes of the weights, so often read, and of inputs and outputs."""
    return outputs * inputs * (bits / 8 + scale_bytes / group_size) * reads + 2 * batch * (
        inputs + outputs
    )


def _done(outputs: int, inputs: int, batch: int) -> float:
    return 2.0 * batch * inputs * outputs


COUNT = Exercise(
    id="10.1",
    title="Two things to count",
    function="layer_work",
    points=1,
    cases=_layer_cases,
    reference=lambda n, k, batch, bits, group: (
        _moved(n, k, batch, bits, group),
        _done(n, k, batch),
    ),
    mistakes=(
        Mistake(
            "a multiplication and an addition counted as one operation",
            lambda n, k, batch, bits, group: (
                _moved(n, k, batch, bits, group),
                _done(n, k, batch) / 2,
            ),
            "What happens to each product once it has been worked out? Is that no operation?",
        ),
        *(
            Mistake("bits taken for bytes", function, "A code of 4 bits: how many bytes is that?")
            for function in (
                lambda n, k, batch, bits, group: (
                    _moved(n, k, batch, 8 * bits, group),
                    _done(n, k, batch),
                ),
                lambda n, k, batch, bits, group: (
                    _moved(n, k, batch, 8 * bits, group, scale_bytes=16) + 14 * batch * (n + k),
                    _done(n, k, batch),
                ),
            )
        ),
        Mistake(
            "the scales are left out",
            lambda n, k, batch, bits, group: (
                _moved(n, k, batch, bits, group, scale_bytes=0),
                _done(n, k, batch),
            ),
            "A code alone is no weight: what else has to come from memory, once for each group?",
        ),
        Mistake(
            "the weights are read anew for each token",
            lambda n, k, batch, bits, group: (
                _moved(n, k, batch, bits, group, reads=batch),
                _done(n, k, batch),
            ),
            "All tokens of a batch meet the same weights: how often does a weight have to come from memory?",
        ),
        *(
            Mistake(
                "not all activations are counted",
                function,
                "Two things besides the weights cross the wires for each token: which, and how long is each?",
            )
            for function in (
                lambda n, k, batch, bits, group: (
                    _moved(n, k, batch, bits, group) - 2 * batch * n,
                    _done(n, k, batch),
                ),
                lambda n, k, batch, bits, group: (
                    _moved(n, k, batch, bits, group) - 2 * batch * k,
                    _done(n, k, batch),
                ),
                lambda n, k, batch, bits, group: (_moved(n, k, 0, bits, group), _done(n, k, batch)),
                lambda n, k, batch, bits, group: (_moved(n, k, 1, bits, group), _done(n, k, batch)),
            )
        ),
    ),
)


# 10.2 -------------------------------------------------------------------------------------------------------------


def _roof_cases(generator: Generator) -> list[Case]:
    by_hand = [
        (200.0, 100.0, 100.0, 1000.0),
        (200.0, 8000.0, 100.0, 1000.0),
        (33.6e6, 33.5e6, 3.35e12, 989e12),
    ]
    drawn = _wanted(
        lambda: (
            _draw(generator, 1e6, 1e9),
            _draw(generator, 1e8, 2e11),
            _draw(generator, 1e11, 4e12),
            _draw(generator, 1e13, 1e15),
        ),
        lambda size, operations, bandwidth, peak: (
            abs(size * peak - operations * bandwidth) > MARGIN * operations * bandwidth
        ),
        4,
    )
    return make_cases(by_hand, drawn)


def _by_memory(size: float, operations: float, bandwidth: float, peak: float) -> bool:
    return size / bandwidth > operations / peak


def _two_times(
    size: float, operations: float, bandwidth: float, peak: float
) -> tuple[float, float]:
    return size / bandwidth, operations / peak


ROOF = Exercise(
    id="10.2",
    title="The roof",
    function="roof",
    points=1,
    cases=_roof_cases,
    reference=lambda *work: (_by_memory(*work), max(_two_times(*work))),
    mistakes=(
        Mistake(
            "the shorter of the two times",
            lambda *work: (_by_memory(*work), min(_two_times(*work))),
            "If the bytes take a second and the operations a minute, when is everything done?",
        ),
        Mistake(
            "the two times are added",
            lambda *work: (_by_memory(*work), sum(_two_times(*work))),
            "What do the multipliers do while the next bytes are on their way?",
        ),
        Mistake(
            "the sides are swapped",
            lambda *work: (not _by_memory(*work), max(_two_times(*work))),
            "Which of the two times is the longer one if there is hardly anything to calculate?",
        ),
        Mistake(
            "the ridge upside down",
            lambda size, operations, bandwidth, peak: (
                operations / size < bandwidth / peak,
                max(_two_times(size, operations, bandwidth, peak)),
            ),
            "Intensity is operations a byte: in which unit is the quotient that you compare it with?",
        ),
    ),
)


# 10.3 -------------------------------------------------------------------------------------------------------------


JUST_LARGE_ENOUGH = (
    608,
    576,
    4,
    32,
    3.35e12,
    989e12,
)  # 43,864 tokens: one adds hardly more work than waiting


def _ridge_cases(generator: Generator) -> list[Case]:
    by_hand = [
        (8192, 8192, 4, 128, 3.35e12, 989e12),
        (1024, 2048, 8, 64, 1e12, 100e12),
        (256, 512, 4, 128, 3.35e12, 989e12),  # no batch is large enough
        JUST_LARGE_ENOUGH,
    ]

    def layer(step: int) -> Numbers:
        return (
            step * int(whole(generator, 1, 24)),
            step * int(whole(generator, 1, 24)),
            pick(generator, 2, 4, 8),
            pick(generator, 32, 64, 128),
            _draw(generator, 5e11, 4e12),
            _draw(generator, 5e13, 5e14),
        )

    drawn = _wanted(
        lambda: layer(512), lambda *of: 2 < _batch(*of) < 2000 and _between(_batch(*of)), 4
    )
    nowhere = _wanted(lambda: layer(128), lambda *of: _batch(*of) < -2 and _between(_batch(*of)), 1)
    return make_cases(by_hand, [*drawn, *nowhere])


def _batch(
    n: int,
    k: int,
    bits: float,
    group: int,
    bandwidth: float,
    peak: float,
    *,
    per_weight: float = 2,
    moved: float = 2,
) -> float:
    """Where operations and bytes take the same time: of each token, and of the weights; below 0 for nowhere."""
    of_a_token = per_weight * n * k / peak - moved * (n + k) / bandwidth
    return _moved(n, k, 0, bits, group) / bandwidth / of_a_token


def _least(
    round_off: Callable[[float], int], *, per_weight: float = 2, moved: float = 2
) -> Callable[..., int]:
    return lambda *layer: max(round_off(_batch(*layer, per_weight=per_weight, moved=moved)), 0)


RIDGE = Exercise(
    id="10.3",
    title="The batch at the ridge",
    function="ridge_batch",
    points=2,
    cases=_ridge_cases,
    reference=_least(math.ceil),
    mistakes=(
        Mistake(
            "the activations are left out",
            _least(math.ceil, moved=0),
            "Each token of the batch brings something to be moved as well: what does it do to the intensity?",
        ),
        Mistake(
            "rounded down",
            _least(math.floor),
            "With one token less than your answer needs, which of the two times is the longer?",
        ),
        Mistake(
            "a multiplication and an addition counted as one operation",
            _least(math.ceil, per_weight=1),
            "How many operations does one token do with one weight?",
        ),
        Mistake(
            "16 bits, whatever the weights have",
            lambda n, k, bits, group, *device: max(
                math.ceil(_batch(n, k, 16 - 16 / group, group, *device)), 0
            ),
            "If the weights had half the bits, would your answer be another one?",
        ),
        *(
            Mistake(
                "a batch where none is large enough",
                function,
                "For a small layer, look at what one more token adds to either time: can the operations catch up?",
            )
            for function in (
                lambda *layer: math.ceil(_batch(*layer)),
                lambda *layer: abs(math.ceil(_batch(*layer))),
                lambda *layer: math.ceil(abs(_batch(*layer))),
                lambda *layer: max(math.ceil(_batch(*layer)), 1),
            )
        ),
    ),
)


# 10.4 -------------------------------------------------------------------------------------------------------------


def _step_cases(generator: Generator) -> list[Case]:
    by_hand = [
        (1e6, 4, 32, 2, 4, 2, 8, 3, 100, 1e6),
        (6.6e9, 4, 128, 32, 32, 16, 128, 5, 1000, 2.039e12),
        (69e9, 8, 128, 80, 64, 8, 128, 32, 4096, 3.35e12),
    ]
    drawn = [
        (
            _draw(generator, 1e9, 8e9),
            pick(generator, 2, 4, 8),
            pick(generator, 32, 64, 128),
            pick(generator, 24, 32, 48),
            kv_heads * pick(generator, 2, 4),
            kv_heads,
            pick(generator, 64, 128),
            pick(generator, 3, 5, 24),
            int(whole(generator, 500, 9000)),
            _draw(generator, 5e11, 4e12),
        )
        for kv_heads in (4, 8, 16)
    ]
    return make_cases(by_hand, drawn)


def _step(
    parameters: float,
    bits: float,
    group: int,
    layers: int,
    query_heads: int,
    kv_heads: int,
    head_dim: int,
    batch: int,
    context: int,
    bandwidth: float,
    *,
    reads: int = 1,
    cache: float = 1,
) -> float:
    """Seconds for the weights, so often read, and for so many times the cache."""
    kept = 2 * layers * kv_heads * head_dim * context * batch * 2
    return (parameters * (bits / 8 + 2 / group) * reads + kept * cache) / bandwidth


STEP = Exercise(
    id="10.4",
    title="A token of a whole model",
    function="token_time",
    points=2,
    cases=_step_cases,
    reference=_step,
    mistakes=(
        Mistake(
            "the cache of the query heads",
            lambda *step: _step(*step, cache=step[4] / step[5]),
            "Whose keys are kept? Several query heads share one of them.",
        ),
        Mistake(
            "the weights are read for each text",
            lambda *step: _step(*step, reads=step[7]),
            "All texts of the batch take this step together: how often do the weights have to come?",
        ),
        Mistake(
            "the cache of one text only",
            lambda *step: _step(*step, cache=1 / step[7]),
            "Every text attends over its own tokens: can two of them share what is read?",
        ),
        *(
            Mistake(
                "the cache shrinks with the weights",
                function,
                "The bits are those of the weights: how many bytes has a number in the cache, as the card says?",
            )
            for function in (
                lambda *step: _step(*step, cache=step[1] / 16),
                lambda *step: _step(*step, cache=(step[1] / 8 + 2 / step[2]) / 2),
            )
        ),
        Mistake(
            "keys or values, not both",
            lambda *step: _step(*step, cache=1 / 2),
            "A token leaves two things behind in each layer: does attention read only one of them?",
        ),
    ),
)


# 10.5 -------------------------------------------------------------------------------------------------------------


def _fleet_cases(generator: Generator) -> list[Case]:
    by_hand = [
        (120.0, 0.0, 40.0, 0.3, 12, 4),
        (36.0, 43.0, 40.0, 0.1, 12, 4),
        (36.1, 9.0, 80.0, 0.2, 5, 8),
        (45.0, 4.0, 24.0, 0.3, 5, 2),  # 16.8 usable GB: three GPUs, but four of 16
        (100.0, 20.0, 40.0, 0.25, 3, 4),  # 30 usable GB: four GPUs, full to the last byte
    ]

    def service() -> Numbers:
        return (
            _draw(generator, 10, 400),
            _draw(generator, 5, 80),
            pick(generator, 24.0, 40.0, 80.0, 141.0),
            pick(generator, 0.1, 0.2, 0.3, 0.4),
            int(whole(generator, 3, 20)),
            pick(generator, 2, 4, 8),
        )

    def fits_nowhere(
        weights: float, cache: float, gpu: float, reserve: float, replicas: int, node: int
    ) -> bool:
        whole_service = _shares(weights, cache, gpu, reserve)
        shares = (whole_service, whole_service * replicas, _shares(weights, 0.0, gpu, reserve))
        return all(_between(share / unit) for share in shares for unit in (1, node))

    drawn = until_told(FLEET, lambda: [*_wanted(service, fits_nowhere, 4)])
    return make_cases(by_hand, [*drawn, _exact_fit(generator)])


def _exact_fit(generator: Generator) -> Numbers:
    """Replicas that fill whole nodes to the last byte; whatever is divided by what, no digit is lost."""
    gpu = pick(generator, 24.0, 40.0, 80.0)
    node = pick(generator, 2, 4, 8)
    needed = int(whole(generator, 1, 3)) * node * gpu * 0.75
    cache = needed * pick(generator, 0.25, 0.5)
    return needed - cache, cache, gpu, 0.25, int(whole(generator, 3, 20)), node


def _shares(weights: float, cache: float, gpu: float, reserve: float) -> float:
    """A replica in GPUs, before any rounding."""
    return (weights + cache) / (gpu * (1 - reserve))


def _bought(
    round_off: Callable[[float], int], shares: Callable[..., float] = _shares
) -> Callable[..., Numbers]:
    """GPUs by whole nodes and by single GPUs, each replica rounded by itself."""

    def gpus(
        weights: float, cache: float, gpu: float, reserve: float, replicas: int, node: int
    ) -> Numbers:
        replica = shares(weights, cache, gpu, reserve)
        return replicas * node * round_off(replica / node), replicas * round_off(replica)

    return gpus


def _bought_at_once(
    weights: float, cache: float, gpu: float, reserve: float, replicas: int, node: int
) -> Numbers:
    everything = replicas * _shares(weights, cache, gpu, reserve)
    return node * math.ceil(everything / node), math.ceil(everything)


def _replicas_share_nodes(*service: Any) -> Numbers:
    single = _bought(math.ceil)(*service)[1]
    return service[5] * math.ceil(single / service[5]), single


def _nodes(*service: Any) -> Numbers:
    by_node, single = _bought(math.ceil)(*service)
    return by_node // service[5], single


FLEET = Exercise(
    id="10.5",
    title="A fleet, both ways",
    function="fleet_gpus",
    points=2,
    cases=_fleet_cases,
    reference=_bought(math.ceil),
    mistakes=(
        *(
            Mistake(
                "the reserve is not taken off each GPU",
                _bought(math.ceil, shares),
                "Of a GPU of 40 GB with a reserve of 30%, how many GB may weights and cache use?",
            )
            for shares in (
                lambda weights, cache, gpu, reserve: (weights + cache) * (1 + reserve) / gpu,
                lambda weights, cache, gpu, reserve: (weights + cache) / gpu,
                lambda weights, cache, gpu, reserve: (weights + cache) / (gpu * reserve),
            )
        ),
        *(
            Mistake(
                "not rounded up",
                _bought(round_off),
                "Work out what the GPUs of one replica can hold: does it all fit?",
            )
            for round_off in (math.floor, round)
        ),
        *(
            Mistake(
                "replicas share GPUs or nodes",
                function,
                "A replica has GPUs, and nodes, of its own: at which point of the sum do you round?",
            )
            for function in (_bought_at_once, _replicas_share_nodes)
        ),
        Mistake(
            "the cache is forgotten",
            _bought(
                math.ceil, lambda weights, cache, gpu, reserve: weights / (gpu * (1 - reserve))
            ),
            "Two things share the usable memory of a replica: which of them did not become smaller?",
        ),
        Mistake(
            "nodes where GPUs are asked for",
            _nodes,
            "How many GPUs is a whole node?",
        ),
    ),
)


SHEET = Sheet("10", "The roofline", (COUNT, ROOF, RIDGE, STEP, FLEET))
