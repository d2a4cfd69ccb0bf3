"""The roofline and the fleet: by hand, at their limits, and against this machine."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qcourse.cost.decode import LLAMA_2_7B, LLAMA_2_70B, decode_time, decode_work
from qcourse.cost.devices import DEVICES, measure_device, stream_bandwidth
from qcourse.cost.fleet import fleet
from qcourse.cost.roofline import Device, Work, linear_work, roofline, speedup

TOY_PEAKS = {"float16": 1000.0, "int8": 4000.0}
TOY = Device("a toy", bandwidth_bytes_per_s=100.0, peak_ops_per_s=TOY_PEAKS)


def test_the_larger_of_two_times() -> None:
    assert roofline(Work(bytes=200, operations=100), TOY) == 2
    assert roofline(Work(bytes=200, operations=8000), TOY) == 8
    assert roofline(Work(bytes=200, operations=8000), TOY, "int8") == 2
    assert (TOY.ridge("float16"), TOY.ridge("int8")) == (10, 40)
    at_the_ridge = Work(bytes=7, operations=70)
    assert at_the_ridge.intensity == TOY.ridge("float16")
    assert 7 / 100 == 70 / 1000 == roofline(at_the_ridge, TOY)


def test_a_linear_layer_by_hand() -> None:
    work = linear_work(outputs=3, inputs=5, batch=2, bits=4, group_size=5)
    assert work == Work(bytes=15 / 2 + 3 * 2 + 2 * (5 + 3) * 2, operations=60)
    assert linear_work(3, 5, 2, activation_bytes=4).bytes == 30 + 2 * 8 * 4


def test_a_decode_step_by_hand() -> None:
    model = LLAMA_2_70B
    block = 2 * 8192**2 + 2 * 8192 * 1024 + 3 * 8192 * 28672
    assert model.parameters == 80 * block + 8192 * 32000
    assert model.activations == 80 * (2 * 16384 + 2 * 9216 + 3 * 36864) + 40192

    step = {"batch": 3, "context": 100}
    work = decode_work(model, **step)
    cache = 2 * 80 * 8 * 128 * 2 * 100 * 3  # keys and values, of key-value heads
    activations = 3 * 2 * model.activations
    attention = 4 * 3 * 100 * 80 * 64 * 128  # of all query heads
    assert work.bytes == 2 * model.parameters + cache + activations
    assert work.operations == 2 * 3 * model.parameters + attention

    small = decode_work(model, **step, bits=4, group_size=128, kv_bits=8, kv_group_size=32)
    small_cache = cache / 2 * (1 + 2 / 32)
    assert small.bytes == model.parameters * 4.125 / 8 + small_cache + activations
    assert small.operations == work.operations


def test_the_sources_step_of_1_2_gigabytes() -> None:
    device = Device("900 GB/s", 900e9, {"float16": 125e12})
    full = roofline(Work(1.2e9, 0), device)
    packed = roofline(Work(1.2e9 * 1.03 / 4, 0), device)
    assert round(1000 * full, 3) == 1.333
    assert round(1000 * packed, 3) == 0.343
    assert round(full / packed, 2) == 3.88


def test_fewer_bits_help_until_the_batch_is_large() -> None:
    device = DEVICES["NVIDIA H100 SXM"]
    gains = [speedup(device, 4, batch) for batch in (1, 8, 64, 512, 4096)]
    assert gains == sorted(gains, reverse=True)
    assert 3.8 < gains[0] < 16 / 4.125
    assert gains[-1] == 1
    assert speedup(device, 8, 1) < 2 < speedup(device, 4, 1)


def test_a_long_sequence_makes_the_cache_the_larger_part() -> None:
    device = DEVICES["NVIDIA A100 SXM 80 GB"]
    packed = {"bits": 4, "group_size": 128}
    short = decode_time(LLAMA_2_7B, device, context=0, **packed)
    long = decode_time(LLAMA_2_7B, device, context=32_768, **packed)
    assert long > 5 * short
    assert decode_time(LLAMA_2_7B, device, context=32_768, kv_bits=8, **packed) < 0.65 * long


@pytest.mark.parametrize("device", DEVICES.values(), ids=DEVICES)
def test_each_device_is_complete(device: Device) -> None:
    assert device.source
    assert device.memory_bytes is not None
    assert 50 < device.ridge("float16") < 500
    # A V100 is older than bfloat16.
    assert ("bfloat16" in device.peak_ops_per_s) == ("V100" not in device.name)
    assert all(device.peak(dtype) >= device.peak("float16") for dtype in device.peak_ops_per_s)


def test_this_machine_is_measured() -> None:
    here = measure_device(size=256, repeats=2)
    assert 1e8 < here.bandwidth_bytes_per_s < 1e13
    assert all(1e8 < here.peak(dtype) < 1e16 for dtype in ("float32", "bfloat16"))
    assert "threads" in here.source
    assert 1e8 < stream_bandwidth(repeats=1) < 1e13
    for unknown in (["half precision"], ["float32", "int 4"], []):
        with pytest.raises(ValueError, match="must be names of dtypes of torch"):
            measure_device(dtypes=unknown)
    with pytest.raises(ValueError, match="size=0 and repeats=1 must be at least 1"):
        measure_device(size=0, repeats=1)


# Fleets


def test_the_sources_fleet_both_ways() -> None:
    service = {"gpu_bytes": 40e9, "replicas": 12}
    sizes = [140e9, 70e9, 35e9]
    in_nodes = [fleet(size, **service, gpus_per_node=4) for size in sizes]
    assert [f.nodes_per_replica for f in in_nodes] == [2, 1, 1]
    assert [f.gpus for f in in_nodes] == [96, 48, 48]
    in_gpus = [fleet(size, **service) for size in sizes]
    assert [f.nodes_per_replica for f in in_gpus] == [None, None, None]
    assert [f.gpus_per_replica for f in in_gpus] == [5, 3, 2]
    assert [f.gpus for f in in_gpus] == [60, 36, 24]


def test_what_does_not_shrink_and_what_it_costs() -> None:
    alone = fleet(35e9, gpu_bytes=40e9, reserve=0.0)
    with_cache = fleet(35e9, gpu_bytes=40e9, reserve=0.0, cache_bytes=50e9)
    assert (alone.gpus, with_cache.gpus) == (1, 3)
    assert alone.filled == 35 / 40
    assert math.isclose(with_cache.filled, 85 / 120)
    assert fleet(35e9, gpu_bytes=40e9, replicas=12).cost(2.0, hours=10) == 24 * 20


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"weight_bytes": 0}, "weight_bytes=0 and gpu_bytes"),
        ({"gpu_bytes": -1}, "gpu_bytes=-1 must be above 0"),
        ({"reserve": 1.0}, r"reserve=1\.0 must be from 0 to less than 1"),
        ({"replicas": 0}, "replicas=0 must be a whole number"),
        ({"gpus_per_node": 0}, "gpus_per_node=0 must be a whole number"),
        ({"cache_bytes": -1}, "cache_bytes=-1 must be 0 or more"),
    ],
)
def test_fleets_that_cannot_be(change: dict[str, float], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        fleet(**{"weight_bytes": 1e9, "gpu_bytes": 1e9, **change})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"per_gpu_hour=-1 and hours=1\.0 must be 0 or more"):
        fleet(1e9, gpu_bytes=1e10).cost(-1)


def test_devices_and_work_that_cannot_be() -> None:
    with pytest.raises(ValueError, match="bandwidth_bytes_per_s=0 of x must be above 0"):
        Device("x", 0, {"float16": 1})
    with pytest.raises(ValueError, match="float16=-1 of x must be above 0"):
        Device("x", 1, {"float16": -1})
    with pytest.raises(ValueError, match="peak_ops_per_s of x must name at least one dtype"):
        Device("x", 1, {})
    unknown = "dtype='float8': a toy has no peak for it, only for float16, int8"
    with pytest.raises(ValueError, match=unknown):
        TOY.ridge("float8")
    with pytest.raises(ValueError, match="batch=0 must be at least 1"):
        linear_work(2, 2, 0)
    with pytest.raises(ValueError, match="batch=0 must be at least 1, context=1"):
        decode_work(LLAMA_2_7B, batch=0)


@given(st.integers(1, 200), st.sampled_from([16, 24, 40, 80, 141]), st.integers(0, 9))
def test_an_exact_fit_buys_no_gpu_more(gpus: int, gigabytes: int, tenths: int) -> None:
    size = gpus * gigabytes * (10 - tenths) / 10 * 1e9
    options = {"gpu_bytes": gigabytes * 1e9, "reserve": tenths / 10}
    assert fleet(size, **options).gpus_per_replica == gpus
    assert fleet(size * 1.0001, **options).gpus_per_replica == gpus + 1


@pytest.mark.usefixtures("unchecked")
def test_half_a_replica() -> None:
    with pytest.raises(ValueError, match=r"replicas=2\.5 must be a whole number"):
        fleet(1e9, gpu_bytes=1e9, replicas=2.5)  # type: ignore[arg-type]


@pytest.mark.usefixtures("unchecked")
def test_work_that_cannot_be() -> None:
    assert Work(0, 1).intensity == math.inf
    for bad in ((-1, 1), (1, -1), (math.nan, 1), (1, math.nan)):
        with pytest.raises(ValueError, match="must be 0 or more"):
            Work(*bad)
    with pytest.raises(ValueError, match="batch=nan must be at least 1"):
        linear_work(4, 4, math.nan)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="activation_bytes=-2 must be 0 or more"):
        linear_work(4, 4, 1, activation_bytes=-2)
    with pytest.raises(ValueError, match=r"memory_bytes=-1 of a toy must be above 0"):
        Device("a toy", 1e9, {"float16": 1e12}, memory_bytes=-1)
