"""Whether a process that has imported a backend may fork hosts that use it.

What vLLM does at import is its own affair and changes with its releases; where a fork of it could go wrong,
each host imports vLLM anew.
"""

import importlib
import sys
import threading
from pathlib import Path

# Symbols of vLLM that a forked host relies on beyond its command line and its server's own entry points.
EXPECTED = {
    "vllm.v1.engine.utils": ("get_mp_context",),
    "vllm.v1.engine.core": ("EngineCoreProc",),
    "vllm.model_executor.models.registry": ("_run_in_subprocess",),
    "vllm.v1.worker.gpu_worker": ("Worker",),
}


def why_never_warm() -> str | None:
    """Why hosts cannot be forked on this system, whatever was imported."""
    if sys.platform == "darwin":
        return "macOS ends a forked process that uses its frameworks"
    return None


def why_cold(backend: str) -> str | None:
    """Why hosts must not be forked from this process; None where they may."""
    # Threads of native pools, which wait for work and hold no lock of Python's, do no harm.
    threads = threading.active_count()
    if threads > 1:
        return f"it has {threads} threads, and a fork keeps one"
    return why_cuda() or (why_unexpected() if backend == "vllm" else None)


def why_cuda() -> str | None:
    """A CUDA context, or an open GPU, does not survive a fork."""
    cuda = getattr(sys.modules.get("torch"), "cuda", None)
    if cuda is not None and cuda.is_initialized():
        return "it has a CUDA context"
    opened = [target for target in _open_files() if target.startswith("/dev/nvidia")]
    return f"it has opened {opened[0]}" if opened else None


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
