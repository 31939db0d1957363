"""The command line of the transformers backend."""

import json

from inference_service.backends.base import compute_dtype, text_config
from inference_service.checkpoints.context_length import longest_request
from inference_service.checkpoints.memory_profile import Footprint
from inference_service.checkpoints.serving_config import Serving
from inference_service.checkpoints.snapshot import Snapshot
from inference_service.config import Backend, Settings
from inference_service.machine.device import Device, DeviceKind, tensor_parallel_size

# Sequences per step of the transformers backend, unless serving.json sets max_num_seqs.
TRANSFORMERS_SEQUENCES = 64


def transformers_arguments(
    settings: Settings, device: Device, snapshot: Snapshot, footprint: Footprint
) -> tuple[str, ...]:
    """The command line of hosts/transformers/server.py; the model's serving.json overrides the settings."""
    serving = snapshot.serving
    sampling = {"temperature": settings.default_temperature} | serving.sampling_defaults.generation_config()
    arguments = [
        *("--device", device.kind.value),
        *("--dtype", compute_dtype(settings.dtype, device, Backend.TRANSFORMERS, snapshot)),
        *("--kv-cache-bytes", str(footprint.kv_cache)),
        *("--max-num-seqs", str(serving.max_num_seqs or TRANSFORMERS_SEQUENCES)),
        *("--sampling-defaults", json.dumps(sampling)),
    ]
    length = longest_request(text_config(snapshot.path), serving, settings.max_model_len)
    if length is not None:
        arguments += ["--max-model-len", str(length)]
    if _needs_several(settings, device, footprint, serving):
        arguments.append("--spread")
    if settings.quantizes and device.kind is DeviceKind.CPU:
        arguments.append("--int8")
    if serving.reasoning_parser is not None:
        arguments.append("--reasons")
    if serving.enable_prefix_caching is False:
        arguments.append("--no-prefix-caching")
    return tuple(arguments)


def _needs_several(settings: Settings, device: Device, footprint: Footprint, serving: Serving) -> bool:
    """Whether the model is too large for one GPU: batches run on a single GPU only."""
    gpus = serving.tensor_parallel_size or tensor_parallel_size(settings.tensor_parallel_size, device)
    whole = footprint.weights * gpus + footprint.kv_cache + footprint.overhead
    return gpus > 1 and whole > device.memory_bytes * settings.gpu_memory_utilization
