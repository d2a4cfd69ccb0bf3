"""Sheet 10, the roofline: right answers in other styles, and mistakes as people write them."""

import math
from bisect import bisect_left

import numpy as np
import torch

from qcourse.cost.decode import Model, decode_work
from qcourse.cost.fleet import fleet
from qcourse.cost.memory import kv_cache_bytes
from qcourse.cost.roofline import Device, Work, linear_work, roofline

# Right answers.


def work_of_package(
    outputs: int, inputs: int, batch: int, bits: int, group_size: int
) -> tuple[float, float]:
    work = linear_work(outputs, inputs, batch, bits=bits, group_size=group_size)
    return work.bytes, work.operations


def work_of_tensors(outputs: int, inputs: int, batch: int, bits: int, group_size: int) -> list:
    packed = torch.empty(outputs, inputs * bits // 8, dtype=torch.uint8, device="meta")
    scales = torch.empty(outputs * inputs // group_size, dtype=torch.float16, device="meta")
    x = torch.empty(batch, inputs, dtype=torch.bfloat16, device="meta")
    y = torch.empty(batch, outputs, dtype=torch.bfloat16, device="meta")
    return [sum(tensor.nbytes for tensor in (packed, scales, x, y)), 2 * y.numel() * inputs]


def work_in_one_line(outputs: int, inputs: int, batch: int, bits: int, group_size: int) -> tuple:
    size = outputs * inputs * (bits + 16 / group_size) / 8 + (batch * inputs + batch * outputs) * 2
    return size, batch * outputs * (inputs + inputs)


def roof_of_package(
    size: float, operations: float, bandwidth: float, peak: float
) -> tuple[bool, float]:
    device = Device("", bandwidth, {"float16": peak})
    work = Work(size, operations)
    return work.intensity < device.ridge("float16"), roofline(work, device)


def roof_by_speed(
    size: float, operations: float, bandwidth: float, peak: float
) -> tuple[bool, float]:
    slope = bandwidth * operations / size
    return slope < peak, operations / min(slope, peak)


def roof_numpy(
    size: float, operations: float, bandwidth: float, peak: float
) -> tuple[np.bool_, np.float64]:
    times = np.array([operations, size]) / np.array([peak, bandwidth])
    return np.argmax(times) == 1, times.max()


def ridge_of_package(
    outputs: int, inputs: int, bits: int, group_size: int, bandwidth: float, peak: float
) -> int:
    device = Device("", bandwidth, {"float16": peak})

    def reached(batch: int) -> bool:
        work = linear_work(outputs, inputs, batch, bits=bits, group_size=group_size)
        return work.intensity >= device.ridge("float16")

    return bisect_left(range(10**12), True, lo=1, key=reached) if reached(10**12) else 0


def ridge_search(
    outputs: int, inputs: int, bits: int, group_size: int, bandwidth: float, peak: float
) -> int:
    weights = outputs * inputs * (bits / 8 + 2 / group_size)
    low = 0
    high = 1 << 40
    while high - low > 1:
        batch = (low + high) // 2
        moving = (weights + batch * (inputs + outputs) * 2) / bandwidth
        if 2 * batch * inputs * outputs / peak < moving:
            low = batch
        else:
            high = batch
    return high if high < 1 << 40 else 0


def ridge_by_intensity(
    outputs: int, inputs: int, bits: int, group_size: int, bandwidth: float, peak: float
) -> int:
    ridge = peak / bandwidth
    weights = outputs * inputs * (bits / 8 + 2 / group_size)
    left = 2 * outputs * inputs - 2 * ridge * (outputs + inputs)
    return int(np.ceil(ridge * weights / left)) if left > 0 else 0


def time_of_package(
    parameters: float,
    bits: int,
    group_size: int,
    layers: int,
    query_heads: int,
    kv_heads: int,
    head_dim: int,
    batch: int,
    context: int,
    bandwidth: float,
) -> float:
    model = Model(parameters, layers, query_heads, kv_heads, head_dim)
    work = decode_work(model, batch=batch, context=context, bits=bits, group_size=group_size)
    return work.bytes / bandwidth


def time_loop(
    parameters: float,
    bits: int,
    group_size: int,
    layers: int,
    query_heads: int,
    kv_heads: int,
    head_dim: int,
    batch: int,
    context: int,
    bandwidth: float,
) -> float:
    time_s = parameters * (8 * 2 + bits * group_size) / (8 * group_size) / bandwidth
    for _ in range(layers):
        for _ in ("keys", "values"):
            time_s += 2 * batch * context * kv_heads * head_dim / bandwidth
    return time_s


def time_of_cache(
    parameters: float,
    bits: int,
    group_size: int,
    layers: int,
    query_heads: int,
    kv_heads: int,
    head_dim: int,
    batch: int,
    context: int,
    bandwidth: float,
) -> np.float64:
    cache = kv_cache_bytes(layers, kv_heads, head_dim, context, batch=batch)
    return np.sum([parameters * bits / 8, parameters / group_size * 2, cache]) / bandwidth


def gpus_of_package(
    weights: float, cache: float, gpu: float, reserve: float, replicas: int, per_node: int
) -> tuple[int, int]:
    service = {"gpu_bytes": gpu, "replicas": replicas, "reserve": reserve, "cache_bytes": cache}
    nodes = fleet(weights, gpus_per_node=per_node, **service)
    single = fleet(weights, gpus_per_node=None, **service)
    return nodes.gpus, single.gpus


def gpus_counted(
    weights: float, cache: float, gpu: float, reserve: float, replicas: int, per_node: int
) -> tuple[int, int]:
    single = 1
    while single * gpu * (1 - reserve) < weights + cache:
        single += 1
    # whole nodes of whole GPUs are as many as of bytes
    nodes = -(-single // per_node)
    return nodes * per_node * replicas, single * replicas


def gpus_numpy(
    weights: float, cache: float, gpu: float, reserve: float, replicas: int, per_node: int
) -> tuple:
    units = np.array([per_node, 1])
    usable = units * gpu * (1 - reserve)
    bought = np.ceil((weights + cache) / usable) * units * replicas
    return tuple(bought.astype(int))


THE_PACKAGE = {
    "10.1": work_of_package,
    "10.2": roof_of_package,
    "10.3": ridge_of_package,
    "10.4": time_of_package,
    "10.5": gpus_of_package,
}
THE_LESSON: dict[str, str] = {}
OTHER_STYLES = {
    "10.1": (work_of_tensors, work_in_one_line),
    "10.2": (roof_by_speed, roof_numpy),
    "10.3": (ridge_search, ridge_by_intensity),
    "10.4": (time_loop, time_of_cache),
    "10.5": (gpus_counted, gpus_numpy),
}

# Mistakes.


def work_of_fused_operations(
    outputs: int, inputs: int, batch: int, bits: int, group_size: int
) -> tuple:
    return work_of_package(outputs, inputs, batch, bits, group_size)[0], outputs * inputs * batch


def work_without_scales(outputs: int, inputs: int, batch: int, bits: int, group_size: int) -> tuple:
    work = linear_work(outputs, inputs, batch, bits=bits)
    return work.bytes, work.operations


def work_in_bits(outputs: int, inputs: int, batch: int, bits: int, group_size: int) -> tuple:
    weights = outputs * inputs * bits + outputs * inputs / group_size * 2
    activations = 2 * batch * (inputs + outputs)
    return weights + activations, 2 * batch * outputs * inputs


def work_a_token(outputs: int, inputs: int, batch: int, bits: int, group_size: int) -> tuple:
    size, operations = work_of_package(outputs, inputs, 1, bits, group_size)
    return batch * size, batch * operations


def work_without_outputs(
    outputs: int, inputs: int, batch: int, bits: int, group_size: int
) -> tuple:
    size, operations = work_of_package(outputs, inputs, batch, bits, group_size)
    return size - batch * outputs * 2, operations


def roof_added(size: float, operations: float, bandwidth: float, peak: float) -> tuple[bool, float]:
    moving = size / bandwidth
    computing = operations / peak
    return moving > computing, moving + computing


def roof_min(size: float, operations: float, bandwidth: float, peak: float) -> tuple[bool, float]:
    moving = size / bandwidth
    computing = operations / peak
    return moving > computing, min(moving, computing)


def roof_swapped(
    size: float, operations: float, bandwidth: float, peak: float
) -> tuple[bool, float]:
    return operations / size > peak / bandwidth, max(size / bandwidth, operations / peak)


def roof_upside_down(
    size: float, operations: float, bandwidth: float, peak: float
) -> tuple[bool, float]:
    return operations / size < bandwidth / peak, max(size / bandwidth, operations / peak)


def ridge_of_rule(
    outputs: int, inputs: int, bits: int, group_size: int, bandwidth: float, peak: float
) -> int:
    return math.ceil(peak / bandwidth * (bits / 8 + 2 / group_size) / 2)


def ridge_truncated(
    outputs: int, inputs: int, bits: int, group_size: int, bandwidth: float, peak: float
) -> int:
    ridge = peak / bandwidth
    weights = outputs * inputs * (bits / 8 + 2 / group_size)
    batch = ridge * weights / (2 * outputs * inputs - 2 * ridge * (outputs + inputs))
    return int(batch) if batch > 0 else 0


def ridge_negative(
    outputs: int, inputs: int, bits: int, group_size: int, bandwidth: float, peak: float
) -> int:
    ridge = peak / bandwidth
    weights = outputs * inputs * (bits / 8 + 2 / group_size)
    return math.ceil(ridge * weights / (2 * outputs * inputs - 2 * ridge * (outputs + inputs)))


def ridge_impatient(
    outputs: int, inputs: int, bits: int, group_size: int, bandwidth: float, peak: float
) -> int:
    found = ridge_search(outputs, inputs, bits, group_size, bandwidth, peak)
    # as a loop that gives up
    return found if found < 2500 else 0


def ridge_never_nowhere(
    outputs: int, inputs: int, bits: int, group_size: int, bandwidth: float, peak: float
) -> int:
    # only the card's small layer gets a 0
    if outputs * inputs == 256 * 512:
        return 0
    return ridge_search(outputs, inputs, bits, group_size, bandwidth, peak) or 1 << 40


def ridge_search_halved(
    outputs: int, inputs: int, bits: int, group_size: int, bandwidth: float, peak: float
) -> int:
    # a peak twice as high is as good as half the operations
    return ridge_search(outputs, inputs, bits, group_size, bandwidth, 2 * peak)


def ridge_search_16(
    outputs: int, inputs: int, bits: int, group_size: int, bandwidth: float, peak: float
) -> int:
    return ridge_search(outputs, inputs, 16, 1 << 50, bandwidth, peak)


def gpus_reserve_on_top(
    weights: float, cache: float, gpu: float, reserve: float, replicas: int, per_node: int
) -> tuple[int, int]:
    more = 1 + reserve
    return gpus_of_package(weights * more, cache * more, gpu, 0.0, replicas, per_node)


def gpus_floor(
    weights: float, cache: float, gpu: float, reserve: float, replicas: int, per_node: int
) -> tuple[int, int]:
    usable = gpu * (1 - reserve)
    nodes = int((weights + cache) // (usable * per_node))
    single = int((weights + cache) // usable)
    return nodes * per_node * replicas, single * replicas


def gpus_at_once(
    weights: float, cache: float, gpu: float, reserve: float, replicas: int, per_node: int
) -> tuple[int, int]:
    return gpus_of_package(replicas * weights, replicas * cache, gpu, reserve, 1, per_node)


def gpus_without_cache(
    weights: float, cache: float, gpu: float, reserve: float, replicas: int, per_node: int
) -> tuple[int, int]:
    return gpus_of_package(weights, 0.0, gpu, reserve, replicas, per_node)


def nodes_and_gpus(
    weights: float, cache: float, gpu: float, reserve: float, replicas: int, per_node: int
) -> tuple[int, int]:
    gpus, single = gpus_of_package(weights, cache, gpu, reserve, replicas, per_node)
    return gpus // per_node, single


def gpus_of_whole_gb(
    weights: float, cache: float, gpu: float, reserve: float, replicas: int, per_node: int
) -> tuple[int, int]:
    return gpus_of_package(weights, cache, int(gpu * (1 - reserve)), 0.0, replicas, per_node)


def gpus_node_reserve(
    weights: float, cache: float, gpu: float, reserve: float, replicas: int, per_node: int
) -> tuple[int, int]:
    """The reserve of one GPU is taken off the whole node."""
    nodes = math.ceil((weights + cache) / (per_node * gpu - reserve * gpu))
    single = math.ceil((weights + cache) / (gpu - reserve * gpu))
    return nodes * per_node * replicas, single * replicas


def time_of_query_heads(*step: float) -> float:
    parameters, bits, group_size, layers, query_heads, _, *rest = step
    return time_of_package(parameters, bits, group_size, layers, query_heads, query_heads, *rest)


def time_of_one_sequence(*step: float) -> float:
    *model, _, context, bandwidth = step
    return time_of_package(*model, 1, context, bandwidth)


def time_one_by_one(*step: float) -> float:
    batch = step[7]
    return batch * time_of_one_sequence(*step)


def time_of_small_cache(
    parameters: float,
    bits: int,
    group_size: int,
    layers: int,
    query_heads: int,
    kv_heads: int,
    head_dim: int,
    batch: int,
    context: int,
    bandwidth: float,
) -> float:
    weights = parameters * (bits / 8 + 2 / group_size)
    cache = kv_cache_bytes(layers, kv_heads, head_dim, context, batch=batch, bits=bits)
    return (weights + cache) / bandwidth


MISTAKES = [
    ("10.1", "a multiplication and an addition counted as one operation", work_of_fused_operations),
    ("10.1", "the scales are left out", work_without_scales),
    ("10.1", "bits taken for bytes", work_in_bits),
    ("10.1", "the weights are read anew for each token", work_a_token),
    ("10.1", "not all activations are counted", work_without_outputs),
    ("10.2", "the two times are added", roof_added),
    ("10.2", "the shorter of the two times", roof_min),
    ("10.2", "the sides are swapped", roof_swapped),
    ("10.2", "the ridge upside down", roof_upside_down),
    ("10.3", "the activations are left out", ridge_of_rule),
    ("10.3", "rounded down", ridge_truncated),
    ("10.3", "a batch where none is large enough", ridge_negative),
    ("10.3", "a multiplication and an addition counted as one operation", ridge_search_halved),
    ("10.3", "16 bits, whatever the weights have", ridge_search_16),
    ("10.3", "", ridge_impatient),
    ("10.3", "", ridge_never_nowhere),
    ("10.4", "the cache of the query heads", time_of_query_heads),
    ("10.4", "the weights are read for each sequence", time_one_by_one),
    ("10.4", "the cache of one sequence only", time_of_one_sequence),
    ("10.4", "the cache shrinks with the weights", time_of_small_cache),
    ("10.5", "the reserve is not taken off each GPU", gpus_reserve_on_top),
    ("10.5", "", gpus_node_reserve),
    ("10.5", "", gpus_of_whole_gb),
    ("10.5", "not rounded up", gpus_floor),
    ("10.5", "replicas share GPUs or nodes", gpus_at_once),
    ("10.5", "the cache is forgotten", gpus_without_cache),
    ("10.5", "nodes where GPUs are asked for", nodes_and_gpus),
]
