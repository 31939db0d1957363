"""The device of this machine, and the dtype and number of GPUs of an engine on it.

Detected without torch, which the service never imports: CUDA through NVML (the driver's library, which
creates no CUDA context), MPS and the CPU from the platform.
"""

import itertools
import os
import platform
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, Literal

from inference_service.config import Backend, DtypeChoice

# x86 (AVX-512 and AMX) and Arm.
_BFLOAT16_FLAGS = frozenset({"avx512_bf16", "amx_bf16", "bf16"})


class DeviceKind(StrEnum):
    CUDA = "cuda"
    MPS = "mps"
    CPU = "cpu"


@dataclass(frozen=True)
class Device:
    """Where engines run: `count` devices with `memory_bytes` each (0 if unknown).

    `bfloat16`: whether the CPU multiplies it faster than float32. For GPUs, `driver` is the driver's version,
    `driver_cuda` the newest CUDA that it supports (None if unknown), and `like_first` whether all of them are
    of the same kind as the machine's first one.
    """

    kind: DeviceKind
    name: str
    count: int = 1
    memory_bytes: int = 0
    bfloat16: bool = False
    driver_cuda: tuple[int, int] | None = None
    driver: str = ""
    like_first: bool = True


def find_device() -> Device:
    """CUDA if the driver reports a GPU, else Apple's MPS, else the CPU."""
    return _cuda() or _mps() or _cpu()


def resolve_dtype(choice: DtypeChoice, device: Device, backend: Backend, checkpoint_dtype: str | None) -> str:
    """The dtype of one checkpoint's weights: 16-bit on CUDA, float32 elsewhere, unless configured.

    The transformers backend on a CPU with bfloat16 instructions keeps a checkpoint's bfloat16: it reads half
    the bytes per token (docs/engines.md has the figures).
    """
    if choice is not DtypeChoice.AUTO:
        return choice.value
    if device.kind is DeviceKind.CUDA:
        return "bfloat16" if checkpoint_dtype == "bfloat16" else "float16"
    faster = device.bfloat16 and backend is Backend.TRANSFORMERS and checkpoint_dtype == "bfloat16"
    return "bfloat16" if faster else "float32"


def tensor_parallel_size(choice: int | Literal["auto"], device: Device) -> int:
    """The number of GPUs per engine."""
    if choice == "auto":
        return device.count if device.kind is DeviceKind.CUDA else 1
    return choice


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
        gpus = visible_gpus(pynvml)
        if not gpus:
            return None
        return Device(
            DeviceKind.CUDA,
            str(pynvml.nvmlDeviceGetName(gpus[0])),
            len(gpus),
            min(int(pynvml.nvmlDeviceGetMemoryInfo(gpu).total) for gpu in gpus),
            driver_cuda=_driver_cuda(pynvml),
            driver=str(pynvml.nvmlSystemGetDriverVersion()),
            like_first=_like_first(pynvml, gpus),
        )
    finally:
        pynvml.nvmlShutdown()


def visible_gpus(nvml: Any) -> list[Any]:
    """NVML handles of the GPUs that are visible to CUDA; NVML itself ignores CUDA_VISIBLE_DEVICES.

    CUDA_VISIBLE_DEVICES holds indices, or UUIDs and prefixes of them; the first invalid entry ends the list.
    https://docs.nvidia.com/cuda/cuda-c-programming-guide/#env-vars
    """
    present = _present(nvml)
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is None:
        return [gpu for gpu in present if gpu is not None]
    named = (_named(nvml, entry.strip(), present) for entry in chosen.split(","))
    return list(itertools.takewhile(lambda gpu: gpu is not None, named))


def _present(nvml: Any) -> list[Any]:
    """Every GPU of the machine in NVML's order; None for a broken one."""
    found: list[Any] = []
    for index in range(nvml.nvmlDeviceGetCount()):
        try:
            found.append(nvml.nvmlDeviceGetHandleByIndex(index))
        except nvml.NVMLError:
            found.append(None)
    return found


def _named(nvml: Any, entry: str, present: list[Any]) -> Any:
    """The GPU or MIG device that an entry of CUDA_VISIBLE_DEVICES names; None if there is none."""
    if entry.isascii() and entry.isdigit():
        return present[int(entry)] if int(entry) < len(present) else None
    if entry.startswith("MIG-"):
        try:
            return nvml.nvmlDeviceGetHandleByUUID(entry)
        except nvml.NVMLError:
            return None
    working = (gpu for gpu in present if gpu is not None)
    found = [gpu for gpu in working if entry and str(nvml.nvmlDeviceGetUUID(gpu)).startswith(entry)]
    return found[0] if len(found) == 1 else None


def _like_first(nvml: Any, gpus: list[Any]) -> bool:
    """Whether the GPUs are of the same kind as the machine's first one, which imports see.

    Without CUDA_DEVICE_ORDER=PCI_BUS_ID, CUDA lists the fastest GPU first and NVML does not: on a machine
    with several kinds, an index may mean another GPU.
    """
    everyone = _present(nvml)
    ordered = os.environ.get("CUDA_DEVICE_ORDER") == "PCI_BUS_ID"
    compared = [everyone[0], *(gpus if ordered else everyone)]
    try:
        # The name of a MIG device is that of the GPU, followed by its size.
        kinds = {gpu and str(nvml.nvmlDeviceGetName(gpu)).partition(" MIG ")[0] for gpu in compared}
    except nvml.NVMLError:
        return False
    return len(kinds) == 1


def _driver_cuda(nvml: Any) -> tuple[int, int] | None:
    try:
        version = int(nvml.nvmlSystemGetCudaDriverVersion())
    except (nvml.NVMLError, AttributeError):
        return None
    return version // 1000, version % 1000 // 10


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
    """What Linux reports about the first processor; empty elsewhere."""
    try:
        first = Path("/proc/cpuinfo").read_text().split("\n\n")[0]
    except OSError:
        return {}
    pairs = (line.partition(":") for line in first.splitlines())
    return {key.strip(): value.strip() for key, _, value in pairs}


def memory_bytes() -> int:
    """The machine's memory, or the container's limit if that is lower."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
    except OSError:
        return total
    return min(total, int(limit)) if limit.isdigit() else total
