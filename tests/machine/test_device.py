"""Which device a machine offers, its GPUs, and the types that it computes in."""

import sys
from types import SimpleNamespace
from typing import Any

import pytest

from inference_service.config import Backend, DtypeChoice
from inference_service.machine import device as devices
from inference_service.machine.device import (
    Device,
    DeviceKind,
    find_device,
    resolve_dtype,
    tensor_parallel_size,
)

CPU = Device(DeviceKind.CPU, "cpu")
BFLOAT16_CPU = Device(DeviceKind.CPU, "cpu", bfloat16=True)
MPS = Device(DeviceKind.MPS, "Apple Silicon")
GPUS = Device(DeviceKind.CUDA, "NVIDIA L4", count=4)


@pytest.mark.parametrize(
    ("choice", "device", "backend", "checkpoint", "dtype"),
    [
        ("auto", GPUS, "vllm", "bfloat16", "bfloat16"),
        ("auto", GPUS, "vllm", "float32", "float16"),
        ("auto", GPUS, "transformers", None, "float16"),
        ("auto", CPU, "vllm", "bfloat16", "float32"),
        ("auto", BFLOAT16_CPU, "vllm", "bfloat16", "float32"),
        ("auto", BFLOAT16_CPU, "transformers", "bfloat16", "bfloat16"),
        ("auto", BFLOAT16_CPU, "transformers", "float32", "float32"),
        ("auto", CPU, "transformers", "bfloat16", "float32"),
        ("auto", MPS, "transformers", "float16", "float32"),
        ("bfloat16", CPU, "vllm", "float32", "bfloat16"),
    ],
)
def test_dtype(choice: str, device: Device, backend: str, checkpoint: str | None, dtype: str) -> None:
    assert resolve_dtype(DtypeChoice(choice), device, Backend(backend), checkpoint) == dtype


def test_all_gpus_unless_set_otherwise() -> None:
    assert tensor_parallel_size("auto", GPUS) == 4
    assert tensor_parallel_size("auto", CPU) == 1
    assert tensor_parallel_size(2, GPUS) == 2


class FakeNvml:
    """NVML of a machine with these GPUs: name and UUID of each, 24 GiB."""

    class NVMLError(Exception):
        pass

    def __init__(self, *gpus: tuple[str, str], cuda: int = 12020) -> None:
        self._gpus = gpus
        self._cuda = cuda

    def nvmlInit(self) -> None:  # noqa: N802
        pass

    def nvmlShutdown(self) -> None:  # noqa: N802
        pass

    def nvmlDeviceGetCount(self) -> int:  # noqa: N802
        return len(self._gpus)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> tuple[str, str]:  # noqa: N802
        if self._gpus[index] == BROKEN:
            raise self.NVMLError
        return self._gpus[index]

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> tuple[str, str]:  # noqa: N802
        if uuid != "MIG-1":
            raise self.NVMLError
        return (f"{self._gpus[0][0]} MIG 1g.10gb", uuid)

    def nvmlDeviceGetName(self, gpu: tuple[str, str]) -> str:  # noqa: N802
        return gpu[0]

    def nvmlDeviceGetUUID(self, gpu: tuple[str, str]) -> str:  # noqa: N802
        return gpu[1]

    def nvmlDeviceGetMemoryInfo(self, gpu: tuple[str, str]) -> SimpleNamespace:  # noqa: N802
        return SimpleNamespace(total=24 << 30, free=7 << 30)

    def nvmlSystemGetDriverVersion(self) -> str:  # noqa: N802
        return "535.1"

    def nvmlSystemGetCudaDriverVersion(self) -> int:  # noqa: N802
        return self._cuda


L4 = ("NVIDIA L4", "GPU-aaa1")
OTHER_L4 = ("NVIDIA L4", "GPU-aab2")
T4 = ("Tesla T4", "GPU-ccc3")
BROKEN = ("broken", "")


@pytest.mark.parametrize(
    ("gpus", "visible", "found"),
    [
        ((L4, OTHER_L4), None, [L4, OTHER_L4]),
        ((L4, OTHER_L4), "1", [OTHER_L4]),
        ((L4, OTHER_L4), "1, 0", [OTHER_L4, L4]),
        ((L4, OTHER_L4), "", []),
        ((L4, OTHER_L4), "-1", []),
        ((L4, OTHER_L4), "NoDevFiles", []),
        ((L4, OTHER_L4), "1,7,0", [OTHER_L4]),
        ((L4, OTHER_L4), "GPU-aab", [OTHER_L4]),
        ((L4, OTHER_L4), "GPU-aa", []),
        ((L4, OTHER_L4), "GPU-zzz", []),
        ((L4,), "MIG-1", [("NVIDIA L4 MIG 1g.10gb", "MIG-1")]),
        ((L4,), "MIG-2", []),
        ((L4, BROKEN), None, [L4]),
        ((L4, BROKEN), "0", [L4]),
        ((L4, BROKEN), "1,0", []),
        ((L4,), "\u00b2", []),
    ],
)
def test_the_gpus_that_cuda_shows(
    monkeypatch: pytest.MonkeyPatch, gpus: tuple[Any, ...], visible: str | None, found: list[Any]
) -> None:
    show(monkeypatch, visible)
    assert devices.visible_gpus(FakeNvml(*gpus)) == found


@pytest.mark.parametrize(
    ("gpus", "visible", "order", "alike"),
    [
        ((L4,), None, None, True),
        ((L4, OTHER_L4), "1", None, True),
        ((L4, T4), None, "PCI_BUS_ID", False),
        ((L4, T4), "0", "PCI_BUS_ID", True),
        ((L4, T4), "1", "PCI_BUS_ID", False),
        ((L4, BROKEN), "0", "PCI_BUS_ID", True),
        ((L4, BROKEN), "0", None, False),
        ((L4,), "MIG-1", "PCI_BUS_ID", True),
        # CUDA may count the T4 first, or not.
        ((L4, T4), "0", None, False),
    ],
)
def test_gpus_unlike_the_machines_first_one(
    monkeypatch: pytest.MonkeyPatch,
    gpus: tuple[Any, ...],
    visible: str | None,
    order: str | None,
    alike: bool,
) -> None:
    show(monkeypatch, visible)
    if order is not None:
        monkeypatch.setenv("CUDA_DEVICE_ORDER", order)
    monkeypatch.setitem(sys.modules, "pynvml", FakeNvml(*gpus))
    device = find_device()
    assert (device.kind, device.like_first) == (DeviceKind.CUDA, alike)
    assert (device.memory_bytes, device.driver_cuda) == (24 << 30, (12, 2))


def show(monkeypatch: pytest.MonkeyPatch, visible: str | None) -> None:
    monkeypatch.delenv("CUDA_DEVICE_ORDER", raising=False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)


def test_this_machine_has_a_device() -> None:
    device = find_device()
    assert device.name
    assert device.memory_bytes > 1 << 30
