"""What the launcher's environment holds on CUDA. The libraries themselves are not here: no GPU is needed."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from inference_service.backends import cuda
from inference_service.backends.cuda import cuda_environment, why_too_old
from inference_service.backends.environment import launcher_environment
from inference_service.config import Backend
from inference_service.machine.device import Device, DeviceKind
from tests.fixtures.installed import needs_torch

L4 = Device(DeviceKind.CUDA, "NVIDIA L4", driver_cuda=(12, 2))
NEW = Device(DeviceKind.CUDA, "NVIDIA H200", driver_cuda=(13, 0))
CHOSEN = (
    *("VLLM_ENABLE_CUDA_COMPATIBILITY", "VLLM_CUDA_COMPATIBILITY_PATH", "VLLM_USE_FLASHINFER_SAMPLER"),
    *("CONDA_PREFIX", "CUDA_HOME", "CUDA_PATH", "LD_LIBRARY_PATH", "TRITON_CACHE_DIR", "VLLM_CACHE_ROOT"),
)


@pytest.fixture(autouse=True)
def compat(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A machine with torch for CUDA 13.0, NVIDIA's compatibility package and no compiler."""
    for name in CHOSEN:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(cuda, "_CUDA_ROOT", tmp_path)
    monkeypatch.setattr(cuda, "_wheel_cuda", lambda: (13, 0))
    directory = tmp_path / "cuda-13.0" / "compat"
    directory.mkdir(parents=True)
    (directory / "libcuda.so.1").touch()
    return directory


def test_forward_compatibility_on_an_older_driver_alone(
    compat: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert cuda_environment(L4)["LD_LIBRARY_PATH"] == str(compat)
    monkeypatch.setenv("LD_LIBRARY_PATH", "/usr/local/nvidia/lib64")
    assert cuda_environment(L4)["LD_LIBRARY_PATH"] == f"{compat}:/usr/local/nvidia/lib64"
    assert "LD_LIBRARY_PATH" not in cuda_environment(NEW)
    assert "LD_LIBRARY_PATH" not in cuda_environment(Device(DeviceKind.CUDA, "unknown"))
    monkeypatch.setattr(cuda, "_wheel_cuda", lambda: (12, 1))
    assert "LD_LIBRARY_PATH" not in cuda_environment(L4)


@pytest.mark.parametrize("device", [L4, NEW])
def test_what_the_operator_says_of_compatibility_wins(
    device: Device, compat: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_ENABLE_CUDA_COMPATIBILITY", "0")
    assert "LD_LIBRARY_PATH" not in cuda_environment(device)
    monkeypatch.setenv("VLLM_ENABLE_CUDA_COMPATIBILITY", "1")
    assert cuda_environment(device)["LD_LIBRARY_PATH"] == str(compat)


def test_nothing_is_said_of_a_driver_where_there_is_none(
    compat: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (compat / "libcuda.so.1").unlink()
    monkeypatch.setenv("VLLM_ENABLE_CUDA_COMPATIBILITY", "1")
    assert why_too_old(Device(DeviceKind.CPU, "cpu")) is None
    assert why_too_old(NEW) is None
    assert why_too_old(L4) is not None


def test_an_older_driver_without_the_package_is_told(compat: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert why_too_old(L4) is None
    (compat / "libcuda.so.1").unlink()
    assert "LD_LIBRARY_PATH" not in cuda_environment(L4)
    told = str(why_too_old(L4))
    assert "supports CUDA 12.2" in told
    assert "cuda-compat-13-0" in told
    assert why_too_old(NEW) is None
    elsewhere = compat.parent / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "libcuda.so.1").touch()
    monkeypatch.setenv("VLLM_CUDA_COMPATIBILITY_PATH", str(elsewhere))
    assert cuda_environment(L4)["LD_LIBRARY_PATH"] == str(elsewhere)


def test_flashinfers_sampler_needs_a_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert cuda_environment(NEW)["VLLM_USE_FLASHINFER_SAMPLER"] == "0"
    monkeypatch.setenv("VLLM_USE_FLASHINFER_SAMPLER", "1")
    assert "VLLM_USE_FLASHINFER_SAMPLER" not in cuda_environment(NEW)
    monkeypatch.delenv("VLLM_USE_FLASHINFER_SAMPLER")
    nvcc = tmp_path / "toolkit" / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.touch(0o755)
    monkeypatch.setenv("CUDA_HOME", str(nvcc.parents[1]))
    assert "VLLM_USE_FLASHINFER_SAMPLER" not in cuda_environment(NEW)
    monkeypatch.setenv("CUDA_HOME", "/nowhere")
    assert cuda_environment(NEW)["VLLM_USE_FLASHINFER_SAMPLER"] == "0", "FlashInfer looks nowhere else then"
    monkeypatch.delenv("CUDA_HOME")
    monkeypatch.setenv("PATH", str(nvcc.parent))
    assert "VLLM_USE_FLASHINFER_SAMPLER" not in cuda_environment(NEW)


def test_compiled_kernels_are_kept_beside_the_snapshots(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    environment = launcher_environment(Backend.VLLM, NEW, tmp_path)
    assert environment["VLLM_CACHE_ROOT"] == str(tmp_path / ".vllm")
    assert environment["TRITON_CACHE_DIR"] == str(tmp_path / ".triton")
    monkeypatch.setenv("TRITON_CACHE_DIR", "/elsewhere")
    assert "TRITON_CACHE_DIR" not in launcher_environment(Backend.VLLM, NEW, tmp_path)


def test_imports_ask_nvml_and_not_cuda_for_a_gpu() -> None:
    for backend in (Backend.VLLM, Backend.TRANSFORMERS):
        assert launcher_environment(backend, NEW)["PYTORCH_NVML_BASED_CUDA_CHECK"] == "1"
    assert "PYTORCH_NVML_BASED_CUDA_CHECK" not in launcher_environment(
        Backend.VLLM, Device(DeviceKind.CPU, "")
    )


@needs_torch
def test_the_installed_torch_is_read_and_not_imported() -> None:
    ask = (
        "import sys; from inference_service.backends import cuda; found = cuda._wheel_cuda(); "
        "assert 'torch' not in sys.modules; import torch; print(found, torch.version.cuda)"
    )
    environment = {"PATH": "/usr/bin:/bin", "HOME": os.environ.get("HOME", "/")}
    told = subprocess.run(
        [sys.executable, "-c", ask], capture_output=True, text=True, check=True, env=environment
    )
    found, _, real = told.stdout.strip().rpartition(" ")
    expected = None if real == "None" else tuple(map(int, real.split(".")))
    assert found == str(expected)


@pytest.mark.parametrize(
    ("line", "version"),
    [
        ("cuda: Optional[str] = '13.0'", (13, 0)),
        ('cuda: str | None = "12.9"', (12, 9)),
        ("cuda = '12.6'", (12, 6)),
        ("cuda: Optional[str] = None", None),
        ("cudart = '1.0'", None),
    ],
)
def test_the_cuda_of_a_wheel(
    line: str, version: tuple[int, int] | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    package = tmp_path / "site" / "torch"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "version.py").write_text(f"__version__ = '2.13.0'\ndebug = False\n{line}\nhip = None\n")
    monkeypatch.syspath_prepend(package.parent)
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    assert cuda._wheel_cuda() == version
