"""Whether a process that has imported a backend can safely fork hosts that use it.

What vLLM does at import changes with its releases. If a fork would not be safe, each host imports vLLM
itself. On CUDA the GPUs are hidden during the launcher's imports, so that nothing can initialize CUDA, which
does not survive a fork.
"""

import importlib
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from inference_service.backends.preload import EXPECTED
from inference_service.machine.device import Device

VISIBLE = "CUDA_VISIBLE_DEVICES"
DEVICES = Path("/dev")
# cuInit opens it. NVML, which survives a fork, opens /dev/nvidiactl only.
_UNIFIED_MEMORY = "nvidia-uvm"


def why_spawned(warm_launcher: bool, device: Device) -> str | None:
    """Why hosts cannot be forked on this machine, whatever was imported; None if they can."""
    if not warm_launcher:
        return "WARM_LAUNCHER is off"
    if sys.platform == "darwin":
        return "macOS kills a forked process that uses its frameworks"
    if not device.like_first:
        # At import, vLLM records the capabilities of the machine's first GPU.
        return (
            "the GPUs are not all of one kind (choose with CUDA_VISIBLE_DEVICES and "
            "CUDA_DEVICE_ORDER=PCI_BUS_ID)"
        )
    return None


@contextmanager
def gpus_hidden() -> Iterator[None]:
    """Hide the GPUs from imports; the environment is restored afterwards.

    Importing vLLM asks Triton's drivers whether they are active, which initializes CUDA if there is a GPU. If
    the variable is empty, vLLM assumes that a process without an active driver gets its GPU later, and keeps
    Triton (vllm/triton_utils/importing.py).
    """
    before = os.environ.get(VISIBLE)
    os.environ[VISIBLE] = ""
    try:
        yield
    finally:
        if before is None:
            os.environ.pop(VISIBLE, None)
        else:
            os.environ[VISIBLE] = before


def why_cold(backend: str) -> str | None:
    """Why hosts must not be forked from this process; None if they may."""
    # Idle threads of native pools, which hold no Python lock, are harmless.
    threads = threading.active_count()
    if threads > 1:
        return f"it has {threads} threads, and a fork keeps one"
    return why_cuda() or ((why_unexpected() or why_without_triton()) if backend == "vllm" else None)


def why_cuda() -> str | None:
    """Neither a CUDA context nor an initialized driver survives a fork."""
    cuda = getattr(sys.modules.get("torch"), "cuda", None)
    if cuda is not None and cuda.is_initialized():
        return "it has a CUDA context"
    opened = [file for file in _open_files() if file.startswith(str(DEVICES / _UNIFIED_MEMORY))]
    return f"it has initialised CUDA ({opened[0]} is open)" if opened else None


def why_without_triton() -> str | None:
    """vLLM on CUDA was imported without Triton, so its forks would run without it."""
    platforms, importing = map(sys.modules.get, ("vllm.platforms", "vllm.triton_utils.importing"))
    platform = getattr(platforms, "current_platform", None)
    if platform is None or not platform.is_cuda() or getattr(importing, "HAS_TRITON", True):
        return None
    return "vLLM's import found no Triton while the GPUs were hidden"


def why_unexpected() -> str | None:
    """A symbol of vLLM that is missing."""
    for module, names in EXPECTED.items():
        try:
            found = importlib.import_module(module)
        except ImportError as error:
            return f"{module} cannot be imported: {error}"
        missing = [name for name in names if not hasattr(found, name)]
        if missing:
            return f"{module} has no {missing[0]}"
    return None


def _open_files() -> list[str]:
    directory = Path("/proc/self/fd")
    found = []
    for entry in directory.iterdir() if directory.exists() else ():
        try:
            found.append(str(entry.readlink()))
        except OSError:  # the descriptor of this listing itself
            continue
    return found
