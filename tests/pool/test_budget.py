"""What an engine gets of its device's memory."""

import pytest

from inference_service.checkpoints.memory_profile import Footprint, MemoryProfile
from inference_service.config import Backend
from inference_service.machine.device import Device, DeviceKind
from inference_service.pool.budget import MIN_KV_CACHE_BYTES, Budget

GIB = 1 << 30
L4 = Device(DeviceKind.CUDA, "NVIDIA L4", 1, 24 * GIB)
LAPTOP = Device(DeviceKind.CPU, "cpu", 1, 16 * GIB)
# Of 24 layers, 8 KV heads of 128: 96 KiB a token in 16 bit.
TOKEN = 96 << 10


def budget(device: Device = L4, slots: int = 2, backend: Backend = Backend.VLLM) -> Budget:
    return Budget(device, backend, 0.9, slots)


def shape(weights: float, context: int = 8192, **more: object) -> MemoryProfile:
    return MemoryProfile("bfloat16", int(weights * GIB), TOKEN, context, **more)  # type: ignore[arg-type]


@pytest.mark.parametrize("slots", [1, 2, 3, 4])
@pytest.mark.parametrize("device", [L4, LAPTOP], ids=["L4", "laptop"])
@pytest.mark.parametrize("backend", [Backend.VLLM, Backend.TRANSFORMERS])
def test_models_that_fit_into_a_share_fit_together(device: Device, slots: int, backend: Backend) -> None:
    found = budget(device, slots, backend).footprint(shape(0.6))
    assert found.weights == int(0.6 * GIB)
    assert found.kv_cache >= MIN_KV_CACHE_BYTES
    total = budget(device, slots).total
    assert total is not None
    assert slots * found.total <= total


@pytest.mark.parametrize("backend", [Backend.VLLM, Backend.TRANSFORMERS])
def test_on_cuda_the_kv_cache_takes_the_rest_of_the_share(backend: Backend) -> None:
    found = budget(backend=backend).footprint(shape(3))
    assert found.total == pytest.approx(24 * GIB * 0.9 / 2, abs=9)


def test_on_the_cpu_it_is_no_larger_than_a_few_requests_can_use() -> None:
    found = budget(LAPTOP).footprint(shape(0.5, context=2048))
    assert found.kv_cache == 4 * 2048 * TOKEN


def test_transformers_needs_more_beside_the_cache() -> None:
    """A scored prompt's keys and values, and what a layer repeats of those that it reads."""
    vllm, transformers = (
        budget(backend=backend).footprint(shape(3, kv_cache_bytes=GIB))
        for backend in (Backend.VLLM, Backend.TRANSFORMERS)
    )
    prompt = 4096 * TOKEN
    assert transformers.overhead - vllm.overhead == pytest.approx(prompt + 0.15 * GIB, abs=2)


def test_a_model_larger_than_its_share_gets_what_it_needs() -> None:
    found = budget().footprint(shape(15))
    assert found.kv_cache == 4 * 8192 * TOKEN
    assert found.total > 24 * GIB * 0.9 / 2
    total = budget().total
    assert total is not None
    assert found.total <= total


def test_no_engine_is_reserved_more_than_there_is() -> None:
    """Alone it may be tried; the overhead is an estimate."""
    found = budget().footprint(shape(21))
    assert found.total == budget().total
    assert found.kv_cache == MIN_KV_CACHE_BYTES
    assert found.overhead < GIB


def test_what_serving_json_requests() -> None:
    assert budget().footprint(shape(3, kv_cache_bytes=GIB)).kv_cache == GIB


def test_each_of_several_gpus_has_its_part() -> None:
    whole, half = budget(slots=1).footprint(shape(10)), budget(slots=1).footprint(shape(10, gpus=2))
    assert half.weights == whole.weights // 2
    assert half.kv_cache > whole.kv_cache


def test_where_nothing_is_known() -> None:
    unknown = Budget(Device(DeviceKind.CPU, "cpu"), Backend.VLLM, 0.9, 2)
    assert unknown.total is None
    assert unknown.footprint(MemoryProfile("", GIB)).kv_cache == GIB


def test_it_reads_well() -> None:
    assert str(Footprint(3 * GIB, GIB, GIB >> 1)) == (
        "4.5 GiB (weights 3.0 GiB, KV cache 1.0 GiB, overhead 512.0 MiB)"
    )


def automatic(requests: int = 50, device: Device = L4) -> Budget:
    return Budget(device, Backend.VLLM, 0.9, None, requests=requests)


def test_as_many_as_fit_get_what_the_requests_need() -> None:
    found = automatic().footprint(shape(0.6))
    assert found.kv_cache == 50 * 1024 * TOKEN, "more than four of full length"
    total = automatic().total
    assert total is not None
    assert total // found.total == 3
    assert automatic().footprint(shape(0.6)) == found, "whatever else is there"
    assert automatic(requests=4).footprint(shape(0.6)).kv_cache == 4 * 8192 * TOKEN


def test_a_large_model_takes_what_is_there() -> None:
    found = automatic().footprint(shape(17))
    assert found.total == automatic().total
    assert MIN_KV_CACHE_BYTES < found.kv_cache < 4 * 8192 * TOKEN


def test_on_the_cpu_no_more_than_a_few_requests() -> None:
    assert automatic(device=LAPTOP).footprint(shape(0.5, context=2048)).kv_cache == 4 * 2048 * TOKEN


@pytest.mark.parametrize(("awake", "asleep"), [(0.6, 6), (6, 0.6)])
@pytest.mark.parametrize("slots", [1, 2])
def test_shares_leave_room_for_what_sleeping_engines_keep(slots: int, awake: float, asleep: float) -> None:
    """Whichever of two models of different size it is that sleeps."""
    found = Budget(L4, Backend.VLLM, 0.9, slots, adapters=8, sleepers=2)
    assert found.total is not None
    kept = found.asleep_bytes(shape(asleep))
    assert 0 < kept < 3 * GIB
    assert slots * found.footprint(shape(awake)).total + 2 * kept <= found.total
    without = Budget(L4, Backend.VLLM, 0.9, slots)
    assert without.footprint(shape(awake)).total > found.footprint(shape(awake)).total


def test_what_sleeps_keeps_no_room_for_adapters() -> None:
    found = Budget(L4, Backend.VLLM, 0.9, 1, adapters=8, sleepers=1)
    profile = shape(6, adapter_bytes=1 << 20)
    assert found.footprint(profile, adapter_rank=64).overhead > found.footprint(profile).overhead
    assert found.asleep_bytes(profile) == found.footprint(profile).overhead


@pytest.mark.parametrize("sleepers", [0, 1, 8, 64])
def test_however_many_may_sleep_as_many_engines_fit_as_there_are_slots(sleepers: int) -> None:
    found = Budget(L4, Backend.VLLM, 0.9, 2, sleepers=sleepers)
    assert found.total is not None
    assert 2 * found.footprint(shape(2)).total <= found.total
