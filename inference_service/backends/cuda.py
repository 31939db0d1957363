"""The environment of the launcher and its hosts on a CUDA device.

Computed in the service, which imports neither torch nor vLLM. It must be set before the launcher starts: the
dynamic linker reads LD_LIBRARY_PATH only at the start of a process, and hosts are forks of the launcher.
"""

import importlib.util
import os
import re
import shutil
from pathlib import Path

from inference_service.machine.device import Device

_CUDA_ROOT = Path("/usr/local")
_LIBCUDA = "libcuda.so.1"


def cuda_environment(device: Device) -> dict[str, str]:
    """Variables for the launcher, except those that the operator has set."""
    # Otherwise torch.cuda.is_available(), called at import (by tvm_ffi, for example), initializes CUDA.
    environment = {"PYTORCH_NVML_BASED_CUDA_CHECK": os.environ.get("PYTORCH_NVML_BASED_CUDA_CHECK", "1")}
    if "VLLM_USE_FLASHINFER_SAMPLER" not in os.environ and not _has_nvcc():
        environment["VLLM_USE_FLASHINFER_SAMPLER"] = "0"  # FlashInfer compiles its sampler at run time
    directory = _compatibility_directory() if _switches_compatibility_on(device) else None
    if directory is not None:
        # vLLM's own VLLM_ENABLE_CUDA_COMPATIBILITY sets this too, for the processes that it spawns.
        others = os.environ.get("LD_LIBRARY_PATH", "")
        environment["LD_LIBRARY_PATH"] = os.pathsep.join(filter(None, (str(directory), others)))
    return environment


def why_too_old(device: Device) -> str | None:
    """Why the installed engines may not run with this driver; None if they do."""
    helped = not _switches_compatibility_on(device) or _compatibility_directory() is not None
    if helped or not _is_older(device):
        return None
    driver, wheel = _readable(device.driver_cuda), _readable(_wheel_cuda())
    package = f"cuda-compat-{wheel.replace('.', '-')}"
    return (
        f"the driver supports CUDA {driver} and the installed torch is built for CUDA {wheel}; update the "
        f"driver, or install NVIDIA's {package} (data center GPUs only)"
    )


def _switches_compatibility_on(device: Device) -> bool:
    """CUDA's forward compatibility: newer user-mode libraries on an older driver.

    Only if the driver is older than the CUDA that torch is built for: the libraries reject a newer driver.
    https://docs.nvidia.com/deploy/cuda-compatibility/forward-compatibility.html
    """
    chosen = os.environ.get("VLLM_ENABLE_CUDA_COMPATIBILITY")
    return _is_older(device) if chosen is None else chosen.strip().lower() in ("1", "true")


def _is_older(device: Device) -> bool:
    """Whether the driver is older than the CUDA that torch is built for."""
    wheel = _wheel_cuda()
    return wheel is not None and device.driver_cuda is not None and device.driver_cuda < wheel


def _wheel_cuda() -> tuple[int, int] | None:
    """The CUDA that the installed torch is built for; None for a build without it.

    Parsed from torch/version.py, because importing torch takes seconds.
    """
    try:
        spec = importlib.util.find_spec("torch")
        if spec is None or spec.origin is None:
            return None
        text = (Path(spec.origin).parent / "version.py").read_text()
    except (OSError, ValueError):
        return None
    found = re.search(r"^cuda\b[^=\n]*=\s*['\"](\d+)\.(\d+)", text, re.MULTILINE)
    return None if found is None else (int(found[1]), int(found[2]))


def _compatibility_directory() -> Path | None:
    """The directory of NVIDIA's cuda-compat package for the installed torch; searched as vLLM does."""
    chosen, conda = os.environ.get("VLLM_CUDA_COMPATIBILITY_PATH"), os.environ.get("CONDA_PREFIX")
    candidates = [
        *([Path(chosen)] if chosen else []),
        *([Path(conda) / "cuda-compat"] if conda else []),
        _CUDA_ROOT / f"cuda-{_readable(_wheel_cuda())}" / "compat",
    ]
    return next(filter(_has_libcuda, candidates), None)


def _has_libcuda(directory: Path) -> bool:
    try:
        return (directory / _LIBCUDA).exists()
    except OSError:  # no permission to read it
        return False


def _has_nvcc() -> bool:
    """Whether FlashInfer would find the compiler; searched as it does."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    if home:
        return shutil.which("nvcc", path=str(Path(home) / "bin")) is not None
    return shutil.which("nvcc") is not None or (_CUDA_ROOT / "cuda" / "bin" / "nvcc").exists()


def _readable(version: tuple[int, int] | None) -> str:
    return "" if version is None else "{}.{}".format(*version)
