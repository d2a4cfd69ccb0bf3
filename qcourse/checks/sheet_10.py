"""Sheet 10, the roofline: cases, references, tolerances, points and known mistakes.

Where an answer is a whole number (10.3, 10.5), the value before rounding lies at least a twentieth
from the next whole number, or is one exactly in any order of arithmetic. In 10.2 no work lies
within a twentieth of the ridge.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from torch import Generator

from qcourse.checks.common import make_cases, pick, uniform, until_told, variants, whole
from qcourse.checks.exercise import Case, Exercise, Mistake, Sheet

MARGIN = 0.05
Numbers = tuple[Any, ...]


def _draw(generator: Generator, low: float, high: float) -> float:
    """Return a number of three digits, as people write them."""
    return float(f"{float(uniform(generator, low, high)):.3g}")


def _wanted(
    draw: Callable[[], Numbers], good: Callable[..., bool], count: int
) -> Iterator[Numbers]:
    """Yield the arguments of `count` draws that are good."""
    while count:
        args = draw()
        if good(*args):
            count -= 1
            yield args


def _between(value: float) -> bool:
    """Return whether a value is far enough from whole numbers to be rounded safely."""
    return MARGIN < value % 1 < 1 - MARGIN


# 10.1 ---------------------------------------------------------------------------------------------


class Product(NamedTuple):
    """The arguments of layer_work."""

    outputs: int
    inputs: int
    batch: int
    bits: int
    group_size: int


def _layer_cases(generator: Generator) -> list[Case]:
    by_hand = [
        # the card's example, a small layer of INT8, and one of a large model
        Product(3, 8, batch=1, bits=4, group_size=4),
        Product(6, 16, batch=5, bits=8, group_size=16),
        Product(4096, 4096, batch=16, bits=4, group_size=128),
    ]
    drawn = []
    for _ in range(3):
        product = Product(
            outputs=64 * int(whole(generator, 1, 60)),
            inputs=256 * int(whole(generator, 1, 15)),
            batch=int(whole(generator, 2, 500)),
            bits=pick(generator, 2, 4, 8),
            group_size=pick(generator, 32, 64, 128),
        )
        drawn.append(product)
    return make_cases(by_hand, drawn)


def _weight_bytes(
    outputs: int, inputs: int, bits: float, group_size: int, scale_bytes: float = 2
) -> float:
    # a code of `bits` bits per weight, and a share of its group's scale
    return outputs * inputs * (bits / 8 + scale_bytes / group_size)


def _moved(product: Product, *, scale_bytes: float = 2, reads: int = 1) -> float:
    """Return the bytes of the weights, read `reads` times, and of inputs and outputs."""
    outputs, inputs, batch, bits, group_size = product
    weights = _weight_bytes(outputs, inputs, bits, group_size, scale_bytes)
    activations = 2 * batch * (inputs + outputs)
    return weights * reads + activations


def _done(product: Product) -> float:
    """Return the operations: a multiplication and an addition per token and weight."""
    return 2.0 * product.batch * product.inputs * product.outputs


def _work(*args: Any) -> Numbers:
    product = Product(*args)
    return _moved(product), _done(product)


# Known mistakes.


def _half_the_operations(*args: Any) -> Numbers:
    moved, done = _work(*args)
    return moved, done / 2


def _code_bits_as_bytes(*args: Any) -> Numbers:
    product = Product(*args)
    wide = product._replace(bits=8 * product.bits)
    return _moved(wide), _done(product)


def _all_bits_as_bytes(*args: Any) -> Numbers:
    product = Product(*args)
    wide = product._replace(bits=8 * product.bits)

    # 16 bits per activation instead of 2 bytes
    activations = 14 * product.batch * (product.outputs + product.inputs)
    return _moved(wide, scale_bytes=16) + activations, _done(product)


def _without_scales(*args: Any) -> Numbers:
    product = Product(*args)
    return _moved(product, scale_bytes=0), _done(product)


def _weights_per_token(*args: Any) -> Numbers:
    product = Product(*args)
    return _moved(product, reads=product.batch), _done(product)


def _without_outputs(*args: Any) -> Numbers:
    product = Product(*args)
    return _moved(product) - 2 * product.batch * product.outputs, _done(product)


def _without_inputs(*args: Any) -> Numbers:
    product = Product(*args)
    return _moved(product) - 2 * product.batch * product.inputs, _done(product)


def _without_activations(*args: Any) -> Numbers:
    product = Product(*args)
    return _moved(product._replace(batch=0)), _done(product)


def _activations_of_one_token(*args: Any) -> Numbers:
    product = Product(*args)
    return _moved(product._replace(batch=1)), _done(product)


COUNT = Exercise(
    id="10.1",
    title="Two things to count",
    function="layer_work",
    points=1,
    cases=_layer_cases,
    reference=_work,
    mistakes=(
        Mistake(
            "a multiplication and an addition counted as one operation",
            _half_the_operations,
            "Each product is added to a sum. Does that addition count as an operation?",
        ),
        *variants(
            "bits taken for bytes",
            "A code of 4 bits: how many bytes is that?",
            _code_bits_as_bytes,
            _all_bits_as_bytes,
        ),
        Mistake(
            "the scales are left out",
            _without_scales,
            "A code alone is no weight: what else has to come from memory, once per group?",
        ),
        Mistake(
            "the weights are read anew for each token",
            _weights_per_token,
            "All tokens of a batch use the same weights: how often does a weight have to come from"
            " memory?",
        ),
        *variants(
            "not all activations are counted",
            "Besides the weights, two vectors per token are moved: which ones, and how long is"
            " each?",
            _without_outputs,
            _without_inputs,
            _without_activations,
            _activations_of_one_token,
        ),
    ),
)


# 10.2 ---------------------------------------------------------------------------------------------


def _roof_cases(generator: Generator) -> list[Case]:
    by_hand = [
        # bound by memory, bound by compute, and one token of a layer on an H100
        (200.0, 100.0, 100.0, 1000.0),
        (200.0, 8000.0, 100.0, 1000.0),
        (33.6e6, 33.5e6, 3.35e12, 989e12),
    ]

    def work() -> Numbers:
        return (
            _draw(generator, 1e6, 1e9),
            _draw(generator, 1e8, 2e11),
            _draw(generator, 1e11, 4e12),
            _draw(generator, 1e13, 1e15),
        )

    return make_cases(by_hand, _wanted(work, _off_the_ridge, 4))


def _off_the_ridge(size: float, operations: float, bandwidth: float, peak: float) -> bool:
    # at the ridge, both times are equal: size / bandwidth = operations / peak
    apart = abs(size * peak - operations * bandwidth)
    return apart > MARGIN * operations * bandwidth


def _two_times(
    size: float, operations: float, bandwidth: float, peak: float
) -> tuple[float, float]:
    return size / bandwidth, operations / peak


def _roof(*work: float) -> Numbers:
    moving, computing = _two_times(*work)
    return moving > computing, max(moving, computing)


# Known mistakes.


def _shorter_time(*work: float) -> Numbers:
    by_memory, _ = _roof(*work)
    return by_memory, min(_two_times(*work))


def _added_times(*work: float) -> Numbers:
    by_memory, _ = _roof(*work)
    return by_memory, sum(_two_times(*work))


def _swapped_sides(*work: float) -> Numbers:
    by_memory, time = _roof(*work)
    return not by_memory, time


def _inverted_ridge(size: float, operations: float, bandwidth: float, peak: float) -> Numbers:
    by_memory = operations / size < bandwidth / peak
    return by_memory, max(size / bandwidth, operations / peak)


ROOF = Exercise(
    id="10.2",
    title="The roof",
    function="roof",
    points=1,
    cases=_roof_cases,
    reference=_roof,
    mistakes=(
        Mistake(
            "the shorter of the two times",
            _shorter_time,
            "If the bytes take a second and the operations a minute, when is everything done?",
        ),
        Mistake(
            "the two times are added",
            _added_times,
            "What do the multipliers do while the next bytes are on their way?",
        ),
        Mistake(
            "the sides are swapped",
            _swapped_sides,
            "Which of the two times is the longer one if there is hardly anything to calculate?",
        ),
        Mistake(
            "the ridge upside down",
            _inverted_ridge,
            "Intensity is operations per byte: in which unit is the quotient that you compare it"
            " with?",
        ),
    ),
)


# 10.3 ---------------------------------------------------------------------------------------------


class Layer(NamedTuple):
    """The arguments of ridge_batch: a layer and a device."""

    outputs: int
    inputs: int
    bits: float
    group_size: int
    bandwidth: float
    peak: float


# 43,864 tokens: one token adds hardly more compute time than memory time
JUST_LARGE_ENOUGH = Layer(608, 576, bits=4, group_size=32, bandwidth=3.35e12, peak=989e12)


def _ridge_cases(generator: Generator) -> list[Case]:
    by_hand = [
        # a large layer on an H100, then the card's example
        Layer(8192, 8192, bits=4, group_size=128, bandwidth=3.35e12, peak=989e12),
        Layer(1024, 2048, bits=8, group_size=64, bandwidth=1e12, peak=100e12),
        # so small that no batch is large enough
        Layer(256, 512, bits=4, group_size=128, bandwidth=3.35e12, peak=989e12),
        JUST_LARGE_ENOUGH,
    ]

    def layer(step: int) -> Layer:
        return Layer(
            outputs=step * int(whole(generator, 1, 24)),
            inputs=step * int(whole(generator, 1, 24)),
            bits=pick(generator, 2, 4, 8),
            group_size=pick(generator, 32, 64, 128),
            bandwidth=_draw(generator, 5e11, 4e12),
            peak=_draw(generator, 5e13, 5e14),
        )

    # four layers with such a batch, and a small one without
    drawn = [*_wanted(lambda: layer(512), _has_a_ridge, 4)]
    drawn += _wanted(lambda: layer(128), _has_no_ridge, 1)
    return make_cases(by_hand, drawn)


def _has_a_ridge(*args: Any) -> bool:
    batch = _batch(Layer(*args))
    return 2 < batch < 2000 and _between(batch)


def _has_no_ridge(*args: Any) -> bool:
    batch = _batch(Layer(*args))
    return batch < -2 and _between(batch)


def _batch(layer: Layer, *, per_weight: float = 2, moved: float = 2) -> float:
    """Return the batch at which operations and bytes take equal times; below 0 if there is none.

    Args:
        per_weight: operations per token and weight.
        moved: bytes per activation.
    """
    n, k, bits, group_size, bandwidth, peak = layer

    # what one more token adds: compute time minus memory time
    of_a_token = per_weight * n * k / peak - moved * (n + k) / bandwidth
    of_the_weights = _weight_bytes(n, k, bits, group_size) / bandwidth
    return of_the_weights / of_a_token


def _ridge(*args: Any) -> int:
    return max(math.ceil(_batch(Layer(*args))), 0)


# Known mistakes.


def _ridge_of_weights(*args: Any) -> int:
    return max(math.ceil(_batch(Layer(*args), moved=0)), 0)


def _ridge_rounded_down(*args: Any) -> int:
    return max(math.floor(_batch(Layer(*args))), 0)


def _ridge_of_half_the_operations(*args: Any) -> int:
    return max(math.ceil(_batch(Layer(*args), per_weight=1)), 0)


def _ridge_of_16_bits(*args: Any) -> int:
    layer = Layer(*args)
    # the codes take what the scales leave of 16 bits
    bits = 16 - 16 / layer.group_size
    return max(math.ceil(_batch(layer._replace(bits=bits))), 0)


def _negative_ridge(*args: Any) -> int:
    return math.ceil(_batch(Layer(*args)))


def _ridge_without_sign(*args: Any) -> int:
    return abs(math.ceil(_batch(Layer(*args))))


def _ridge_of_absolute_value(*args: Any) -> int:
    return math.ceil(abs(_batch(Layer(*args))))


def _ridge_of_at_least_one(*args: Any) -> int:
    return max(math.ceil(_batch(Layer(*args))), 1)


RIDGE = Exercise(
    id="10.3",
    title="The batch at the ridge",
    function="ridge_batch",
    points=2,
    cases=_ridge_cases,
    reference=_ridge,
    mistakes=(
        Mistake(
            "the activations are left out",
            _ridge_of_weights,
            "Each token of the batch also moves its inputs and outputs: what does that do to the"
            " intensity?",
        ),
        Mistake(
            "rounded down",
            _ridge_rounded_down,
            "With one token less than your answer needs, which of the two times is the longer?",
        ),
        Mistake(
            "a multiplication and an addition counted as one operation",
            _ridge_of_half_the_operations,
            "How many operations does one token do with one weight?",
        ),
        Mistake(
            "16 bits, whatever the weights have",
            _ridge_of_16_bits,
            "If the weights had half the bits, would your answer change?",
        ),
        *variants(
            "a batch where none is large enough",
            "For a small layer, look at what one more token adds to each time: can the operations"
            " catch up?",
            _negative_ridge,
            _ridge_without_sign,
            _ridge_of_absolute_value,
            _ridge_of_at_least_one,
        ),
    ),
)


# 10.4 ---------------------------------------------------------------------------------------------


class Step(NamedTuple):
    """The arguments of token_time: a model, its storage, a batch of sequences and a device."""

    parameters: float
    bits: int
    group_size: int
    layers: int
    query_heads: int
    kv_heads: int
    head_dim: int
    batch: int
    context: int
    bandwidth: float


# the card's example
CARD_EXAMPLE = Step(
    parameters=1e6,
    bits=4,
    group_size=32,
    layers=2,
    query_heads=4,
    kv_heads=2,
    head_dim=8,
    batch=3,
    context=100,
    bandwidth=1e6,
)

# a model of 7 billion parameters on an A100, with half as many key-value heads
MODEL_OF_7B = Step(
    parameters=6.6e9,
    bits=4,
    group_size=128,
    layers=32,
    query_heads=32,
    kv_heads=16,
    head_dim=128,
    batch=5,
    context=1000,
    bandwidth=2.039e12,
)

# a model of 70 billion parameters on an H100
MODEL_OF_70B = Step(
    parameters=69e9,
    bits=8,
    group_size=128,
    layers=80,
    query_heads=64,
    kv_heads=8,
    head_dim=128,
    batch=32,
    context=4096,
    bandwidth=3.35e12,
)


def _step_cases(generator: Generator) -> list[Case]:
    by_hand = [CARD_EXAMPLE, MODEL_OF_7B, MODEL_OF_70B]
    drawn = []
    for kv_heads in (4, 8, 16):
        step = Step(
            parameters=_draw(generator, 1e9, 8e9),
            bits=pick(generator, 2, 4, 8),
            group_size=pick(generator, 32, 64, 128),
            layers=pick(generator, 24, 32, 48),
            query_heads=kv_heads * pick(generator, 2, 4),
            kv_heads=kv_heads,
            head_dim=pick(generator, 64, 128),
            batch=pick(generator, 3, 5, 24),
            context=int(whole(generator, 500, 9000)),
            bandwidth=_draw(generator, 5e11, 4e12),
        )
        drawn.append(step)
    return make_cases(by_hand, drawn)


def _step_time(step: Step, *, reads: int = 1, cache: float = 1) -> float:
    """Return the seconds for `reads` times the weights and `cache` times the cache."""
    # a key and a value per token, each head_dim numbers of 2 bytes
    per_token = 2 * step.layers * step.kv_heads * step.head_dim
    cache_bytes = per_token * step.context * step.batch * 2
    weight_bytes = step.parameters * (step.bits / 8 + 2 / step.group_size)
    return (weight_bytes * reads + cache_bytes * cache) / step.bandwidth


def _token_time(*args: Any) -> float:
    return _step_time(Step(*args))


# Known mistakes.


def _cache_of_query_heads(*args: Any) -> float:
    step = Step(*args)
    return _step_time(step, cache=step.query_heads / step.kv_heads)


def _weights_per_sequence(*args: Any) -> float:
    step = Step(*args)
    return _step_time(step, reads=step.batch)


def _cache_of_one_sequence(*args: Any) -> float:
    step = Step(*args)
    return _step_time(step, cache=1 / step.batch)


def _cache_in_few_bits(*args: Any) -> float:
    step = Step(*args)
    return _step_time(step, cache=step.bits / 16)


def _cache_with_scales(*args: Any) -> float:
    step = Step(*args)
    bytes_per_number = step.bits / 8 + 2 / step.group_size
    return _step_time(step, cache=bytes_per_number / 2)


def _half_the_cache(*args: Any) -> float:
    return _step_time(Step(*args), cache=1 / 2)


STEP = Exercise(
    id="10.4",
    title="A token of a whole model",
    function="token_time",
    points=2,
    cases=_step_cases,
    reference=_token_time,
    mistakes=(
        Mistake(
            "the cache of the query heads",
            _cache_of_query_heads,
            "Which heads have keys in the cache? Several query heads share one of them.",
        ),
        Mistake(
            "the weights are read for each sequence",
            _weights_per_sequence,
            "All sequences of the batch take this step together: how often do the weights have to"
            " come?",
        ),
        Mistake(
            "the cache of one sequence only",
            _cache_of_one_sequence,
            "Every sequence attends over its own tokens: can two of them share what is read?",
        ),
        *variants(
            "the cache shrinks with the weights",
            "The bits are those of the weights: how many bytes has a number in the cache, as the"
            " card says?",
            _cache_in_few_bits,
            _cache_with_scales,
        ),
        Mistake(
            "keys or values, not both",
            _half_the_cache,
            "A token leaves two vectors per head in each layer: does attention read only one of"
            " them?",
        ),
    ),
)


# 10.5 ---------------------------------------------------------------------------------------------


class Service(NamedTuple):
    """The arguments of fleet_gpus; memory in GB."""

    weights: float
    cache: float
    gpu: float
    reserve: float
    replicas: int
    per_node: int


def _fleet_cases(generator: Generator) -> list[Case]:
    by_hand = [
        # the card's example, then a cache larger than the weights, then two GPUs of a large node
        Service(120.0, 0.0, gpu=40.0, reserve=0.3, replicas=12, per_node=4),
        Service(36.0, 43.0, gpu=40.0, reserve=0.1, replicas=12, per_node=4),
        Service(36.1, 9.0, gpu=80.0, reserve=0.2, replicas=5, per_node=8),
        # 16.8 usable GB: three GPUs, but it would be four of 16 GB
        Service(45.0, 4.0, gpu=24.0, reserve=0.3, replicas=5, per_node=2),
        # 30 usable GB: four GPUs, full to the last byte
        Service(100.0, 20.0, gpu=40.0, reserve=0.25, replicas=3, per_node=4),
    ]

    def service() -> Service:
        return Service(
            weights=_draw(generator, 10, 400),
            cache=_draw(generator, 5, 80),
            gpu=pick(generator, 24.0, 40.0, 80.0, 141.0),
            reserve=pick(generator, 0.1, 0.2, 0.3, 0.4),
            replicas=int(whole(generator, 3, 20)),
            per_node=pick(generator, 2, 4, 8),
        )

    drawn = until_told(FLEET, lambda: [*_wanted(service, _fills_no_gpu, 4)])
    return make_cases(by_hand, [*drawn, _exact_fit(generator)])


def _fills_no_gpu(*args: Any) -> bool:
    """Return whether all that may be rounded is far from whole numbers of GPUs and of nodes."""
    service = Service(*args)
    replica = _shares(service)
    fleet = replica * service.replicas
    weights_only = _shares(service._replace(cache=0.0))
    for share in (replica, fleet, weights_only):
        if not _between(share) or not _between(share / service.per_node):
            return False
    return True


def _exact_fit(generator: Generator) -> Service:
    """Return replicas that fill whole nodes exactly, with numbers that lose no digit."""
    gpu = pick(generator, 24.0, 40.0, 80.0)
    per_node = pick(generator, 2, 4, 8)
    needed = int(whole(generator, 1, 3)) * per_node * gpu * 0.75
    cache = needed * pick(generator, 0.25, 0.5)
    replicas = int(whole(generator, 3, 20))
    return Service(needed - cache, cache, gpu, 0.25, replicas, per_node)


def _shares(service: Service) -> float:
    """Return the GPUs of a replica before any rounding."""
    usable = service.gpu * (1 - service.reserve)
    return (service.weights + service.cache) / usable


def _rounded(
    service: Service, replica: float, round_off: Callable[[float], int] = math.ceil
) -> Numbers:
    """Return GPUs by whole nodes and by single GPUs, each replica rounded by itself."""
    nodes = round_off(replica / service.per_node)
    by_node = service.replicas * service.per_node * nodes
    single = service.replicas * round_off(replica)
    return by_node, single


def _gpus(*args: Any) -> Numbers:
    service = Service(*args)
    return _rounded(service, _shares(service))


# Known mistakes.


def _reserve_on_top(*args: Any) -> Numbers:
    service = Service(*args)
    needed = (service.weights + service.cache) * (1 + service.reserve)
    return _rounded(service, needed / service.gpu)


def _no_reserve(*args: Any) -> Numbers:
    service = Service(*args)
    return _rounded(service, (service.weights + service.cache) / service.gpu)


def _only_the_reserve(*args: Any) -> Numbers:
    service = Service(*args)
    usable = service.gpu * service.reserve
    return _rounded(service, (service.weights + service.cache) / usable)


def _gpus_rounded_down(*args: Any) -> Numbers:
    service = Service(*args)
    return _rounded(service, _shares(service), math.floor)


def _gpus_to_nearest(*args: Any) -> Numbers:
    service = Service(*args)
    return _rounded(service, _shares(service), round)


def _bought_at_once(*args: Any) -> Numbers:
    service = Service(*args)
    everything = service.replicas * _shares(service)
    nodes = math.ceil(everything / service.per_node)
    return service.per_node * nodes, math.ceil(everything)


def _replicas_share_nodes(*args: Any) -> Numbers:
    service = Service(*args)
    _, single = _gpus(*args)
    nodes = math.ceil(single / service.per_node)
    return service.per_node * nodes, single


def _without_cache(*args: Any) -> Numbers:
    service = Service(*args)
    usable = service.gpu * (1 - service.reserve)
    return _rounded(service, service.weights / usable)


def _nodes(*args: Any) -> Numbers:
    by_node, single = _gpus(*args)
    return by_node // Service(*args).per_node, single


FLEET = Exercise(
    id="10.5",
    title="A fleet, both ways",
    function="fleet_gpus",
    points=2,
    cases=_fleet_cases,
    reference=_gpus,
    mistakes=(
        *variants(
            "the reserve is not taken off each GPU",
            "Of a GPU of 40 GB with a reserve of 30%, how many GB may weights and cache use?",
            _reserve_on_top,
            _no_reserve,
            _only_the_reserve,
        ),
        *variants(
            "not rounded up",
            "Work out what the GPUs of one replica can hold: does it all fit?",
            _gpus_rounded_down,
            _gpus_to_nearest,
        ),
        *variants(
            "replicas share GPUs or nodes",
            "Each replica has its own GPUs and its own nodes: at which step do you round?",
            _bought_at_once,
            _replicas_share_nodes,
        ),
        Mistake(
            "the cache is forgotten",
            _without_cache,
            "Two things share the usable memory of a replica: which of them did not become"
            " smaller?",
        ),
        Mistake(
            "nodes where GPUs are asked for",
            _nodes,
            "How many GPUs is a whole node?",
        ),
    ),
)


SHEET = Sheet("10", "The roofline", (COUNT, ROOF, RIDGE, STEP, FLEET))
