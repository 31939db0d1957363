"""Whether a process that has imported a backend may fork hosts that use it.

What vLLM does at import is its own affair and changes with its releases; where a fork of it could go wrong,
each host imports vLLM by itself. On CUDA the GPUs are hidden while the launcher imports: nothing can
initialise CUDA, which does not survive a fork.
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
# cuInit opens it. NVML, which survives a fork, opens /dev/nvidiactl and no more.
_UNIFIED_MEMORY = "nvidia-uvm"


def why_spawned(warm_launcher: bool, device: Device) -> str | None:
    """Why hosts are not to be forked here, whatever was imported; None where they are."""
    if not warm_launcher:
        return "WARM_LAUNCHER is off"
    if sys.platform == "darwin":
        return "macOS ends a forked process that uses its frameworks"
    if not device.like_first:
        # vLLM keeps at import what the machine's first GPU can do.
        return (
            "the GPUs are not all of one kind (choose with CUDA_VISIBLE_DEVICES and "
            "CUDA_DEVICE_ORDER=PCI_BUS_ID)"
        )
    return None


@contextmanager
def gpus_hidden() -> Iterator[None]:
    """Show no GPU to what is imported meanwhile; afterwards the environment is what it was.

    An import of vLLM asks Triton's drivers whether they are active, which initialises CUDA where there is a
    GPU. Where the variable is empty, vLLM takes a process without an active driver for one that gets its GPU
    later, and keeps Triton (vllm/triton_utils/importing.py).
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
    """Why hosts must not be forked from this process; None where they may."""
    # Threads of native pools, which wait for work and hold no lock of Python's, do no harm.
    threads = threading.active_count()
    if threads > 1:
        return f"it has {threads} threads, and a fork keeps one"
    return why_cuda() or ((why_unexpected() or why_without_triton()) if backend == "vllm" else None)


def why_cuda() -> str | None:
    """Neither a CUDA context nor a driver that is initialised survives a fork."""
    cuda = getattr(sys.modules.get("torch"), "cuda", None)
    if cuda is not None and cuda.is_initialized():
        return "it has a CUDA context"
    opened = [file for file in _open_files() if file.startswith(str(DEVICES / _UNIFIED_MEMORY))]
    return f"it has initialised CUDA ({opened[0]} is open)" if opened else None


def why_without_triton() -> str | None:
    """vLLM on CUDA that did without Triton when it was imported: its forks would too."""
    platforms, importing = map(sys.modules.get, ("vllm.platforms", "vllm.triton_utils.importing"))
    platform = getattr(platforms, "current_platform", None)
    if platform is None or not platform.is_cuda() or getattr(importing, "HAS_TRITON", True):
        return None
    return "vLLM's import found no Triton while the GPUs were hidden"


def why_unexpected() -> str | None:
    """A symbol of vLLM that is not there."""
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
        except OSError:  # the descriptor of this very listing
            continue
    return found
