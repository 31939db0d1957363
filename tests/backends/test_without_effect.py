"""Settings that change nothing here, and what their operator is told."""

from typing import Any

import pytest

from inference_service.backends.without_effect import why_no_sleep, why_not_int8, without_effect
from inference_service.config import Backend, Settings
from inference_service.machine.device import Device, DeviceKind

CPU = Device(DeviceKind.CPU, "cpu")
MPS = Device(DeviceKind.MPS, "Apple Silicon")
GPUS = Device(DeviceKind.CUDA, "NVIDIA L4", count=4)
EVERYTHING: dict[str, Any] = {
    "compile_cache": "/shared",
    "cuda_graph_sizes": "1,2",
    "load_format": "read_ahead",
    "max_sleeping": 1,
}


@pytest.mark.parametrize(
    ("settings", "device", "backend", "reason"),
    [
        ({"local_dev": True}, CPU, Backend.TRANSFORMERS, None),
        ({"cpu_int8": False}, CPU, Backend.VLLM, None),
        ({}, CPU, Backend.TRANSFORMERS, "LOCAL_DEV=true"),
        ({"local_dev": True}, MPS, Backend.TRANSFORMERS, "this device is mps"),
        ({"local_dev": True}, CPU, Backend.VLLM, "ENGINE=transformers"),
    ],
)
def test_eight_bits_without_effect_are_reported(
    settings: dict[str, Any], device: Device, backend: Backend, reason: str | None
) -> None:
    found = why_not_int8(Settings(**({"cpu_int8": True} | settings)), device, backend)
    assert (found is None) if reason is None else reason in str(found)


@pytest.mark.parametrize(
    ("device", "backend", "settings", "words"),
    [
        (GPUS, Backend.VLLM, {}, None),
        (GPUS, Backend.VLLM, {"weight_swap": "off"}, "WEIGHT_SWAP=off"),
        (GPUS, Backend.VLLM, {"weight_swap": "off", "max_sleeping": 0}, None),
        (GPUS, Backend.TRANSFORMERS, {}, "runs transformers on cuda"),
        (CPU, Backend.VLLM, {}, "runs vllm on cpu"),
        (MPS, Backend.TRANSFORMERS, {}, "on mps"),
    ],
)
def test_where_engines_sleep(
    device: Device, backend: Backend, settings: dict[str, Any], words: str | None
) -> None:
    found = why_no_sleep(Settings(**({"max_sleeping": 1} | settings)), device, backend)
    assert found is None if words is None else words in (found or "")


@pytest.mark.parametrize(
    ("device", "backend", "settings", "named"),
    [
        (GPUS, Backend.VLLM, {}, ""),
        (GPUS, Backend.VLLM, {"engine_eager": True}, "COMPILE_CACHE CUDA_GRAPH_SIZES"),
        (GPUS, Backend.TRANSFORMERS, {}, "MAX_SLEEPING COMPILE_CACHE CUDA_GRAPH_SIZES LOAD_FORMAT"),
        (CPU, Backend.VLLM, {}, "MAX_SLEEPING COMPILE_CACHE CUDA_GRAPH_SIZES"),
        (CPU, Backend.VLLM, {"engine_eager": False}, "MAX_SLEEPING CUDA_GRAPH_SIZES"),
        (CPU, Backend.FAKE, {}, "COMPILE_CACHE CUDA_GRAPH_SIZES LOAD_FORMAT"),
    ],
)
def test_each_is_named(device: Device, backend: Backend, settings: dict[str, Any], named: str) -> None:
    found = without_effect(Settings(**(EVERYTHING | settings)), device, backend)
    assert [name for name, _ in found] == named.split()
    assert list(without_effect(Settings(**settings), device, backend)) == []
