"""The launcher's environment, which every host inherits."""

import os
from pathlib import Path

from inference_service.backends.cuda import cuda_environment
from inference_service.backends.vllm import vllm_environment
from inference_service.config import Backend
from inference_service.machine.device import Device, DeviceKind

KEPT_BY_TRITON = ".triton"


def launcher_environment(backend: Backend, device: Device, cache: Path | None = None) -> dict[str, str]:
    """The variables that must be set before the launcher imports its backend, inherited by every host.

    `cache`: the directory for compiled kernels and start-up plans, next to the snapshots, for the next engine
    of the same architecture on this device; vLLM and Triton key them themselves.
    """
    if backend is Backend.FAKE:
        return {}
    environment = {
        # Nothing is ever fetched from a model hub: only models in the bucket are served.
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "DO_NOT_TRACK": "1",
    }
    if device.kind is DeviceKind.CPU:
        environment["OMP_NUM_THREADS"] = os.environ.get("OMP_NUM_THREADS", str(_cores()))
    if device.kind is DeviceKind.CUDA:
        environment |= cuda_environment(device)
    if cache is not None and "TRITON_CACHE_DIR" not in os.environ:
        environment["TRITON_CACHE_DIR"] = str(cache / KEPT_BY_TRITON)
    return environment | (vllm_environment(device, cache) if backend is Backend.VLLM else {})


def compiled_environment(directory: Path) -> dict[str, str]:
    """The variables of a host that keeps what it compiles in a directory of its own."""
    return {"VLLM_CACHE_ROOT": str(directory / "vllm"), "TRITON_CACHE_DIR": str(directory / "triton")}


def _cores() -> int:
    """The processors that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
