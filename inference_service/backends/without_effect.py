"""Settings that change nothing on this machine, so that the service can tell its operator at the start."""

from collections.abc import Iterator

from inference_service.backends.base import can_sleep
from inference_service.backends.vllm import runs_eagerly
from inference_service.config import Backend, LoadFormat, Settings, WeightSwap
from inference_service.machine.device import Device, DeviceKind


def without_effect(settings: Settings, device: Device, backend: Backend) -> Iterator[tuple[str, str]]:
    """Each such setting that is set, with the reason."""
    reasons = {
        "CPU_INT8": why_not_int8(settings, device, backend),
        "MAX_SLEEPING": why_no_sleep(settings, device, backend),
        "COMPILE_CACHE": why_not_compiled(settings, device, backend) if settings.compile_cache else None,
        "CUDA_GRAPH_SIZES": _why_no_graphs(settings, device, backend) if settings.cuda_graph_sizes else None,
        "LOAD_FORMAT": _why_no_format(settings, backend),
    }
    for setting, reason in reasons.items():
        if reason is not None:
            yield setting, reason


def why_not_int8(settings: Settings, device: Device, backend: Backend) -> str | None:
    if not settings.cpu_int8:
        return None
    if not settings.local_dev:
        return "it is for development only: set LOCAL_DEV=true"
    if device.kind is not DeviceKind.CPU:
        return f"it is for the CPU, and this device is {device.kind}"
    if backend is not Backend.TRANSFORMERS:
        return f"ENGINE={backend} has no weights of 8 bits: set ENGINE=transformers"
    return None


def why_no_sleep(settings: Settings, device: Device, backend: Backend) -> str | None:
    if not settings.max_sleeping:
        return None
    if not can_sleep(backend, device):
        return f"only vLLM on an NVIDIA GPU can sleep, and this service runs {backend} on {device.kind}"
    if settings.weight_swap is WeightSwap.OFF:
        return "engines wake with other weights, which WEIGHT_SWAP=off forbids"
    return None


def why_not_compiled(settings: Settings, device: Device, backend: Backend) -> str | None:
    if backend is not Backend.VLLM:
        return f"only vLLM compiles, and this service runs {backend}"
    if runs_eagerly(settings.engine_eager, device):
        return "engines compile nothing (ENGINE_EAGER)"
    return None


def _why_no_graphs(settings: Settings, device: Device, backend: Backend) -> str | None:
    if backend is not Backend.VLLM or device.kind is not DeviceKind.CUDA:
        return f"only vLLM on an NVIDIA GPU has them, and this service runs {backend} on {device.kind}"
    if runs_eagerly(settings.engine_eager, device):
        return "engines capture none (ENGINE_EAGER)"
    return None


def _why_no_format(settings: Settings, backend: Backend) -> str | None:
    if settings.load_format is LoadFormat.SAFETENSORS or backend is Backend.VLLM:
        return None
    return f"it is for vLLM, and this service runs {backend}"
