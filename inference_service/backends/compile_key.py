"""What compiled artefacts depend on: engines with the same key can use each other's."""

import hashlib
import json
import re

from inference_service.backends.base import backend_version
from inference_service.config import Backend, Settings
from inference_service.machine.device import Device


def compile_key(settings: Settings, device: Device, swap_key: str) -> str:
    """A file name. vLLM and Triton check what they find themselves: a key too coarse costs space only."""
    parts = {
        "architecture": swap_key,
        "dtype": settings.dtype,
        "max_model_len": settings.max_model_len,
        "sequences": settings.concurrency,
        "graphs": settings.cuda_graph_sizes,
        "adapters": settings.max_adapters,
        "gpus": settings.tensor_parallel_size,
    }
    digest = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]
    machine = (f"vllm-{backend_version(Backend.VLLM)}", device.name, device.driver)
    return "-".join([*(re.sub(r"[^0-9A-Za-z.]+", "-", part) for part in machine if part), digest])
