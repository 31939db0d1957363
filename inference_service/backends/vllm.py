"""The command line and the environment of vLLM.

vLLM is configured through its command line only, its most stable interface.
"""

import json
import os
from pathlib import Path

from inference_service.backends.base import can_sleep, compute_dtype, text_config
from inference_service.checkpoints.context_length import longest_request
from inference_service.checkpoints.memory_profile import Footprint
from inference_service.checkpoints.serving_config import Serving
from inference_service.checkpoints.snapshot import Snapshot
from inference_service.config import Backend, Settings
from inference_service.machine.device import Device, DeviceKind, tensor_parallel_size

# Larger batches are slow enough without a graph.
MAX_GRAPH_SIZE = 512
# Below LOCAL_MODEL_CACHE; no model's name begins with a dot.
KEPT_BY_VLLM = ".vllm"


def vllm_environment(device: Device, cache: Path | None) -> dict[str, str]:
    environment = {"VLLM_NO_USAGE_STATS": "1"}
    if device.kind is DeviceKind.CPU:
        # Run the worker inside the engine core: it respects OMP_NUM_THREADS and saves a process and its
        # imports. vLLM uses a separate worker only to be able to set that variable.
        environment["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    else:
        environment["VLLM_ENABLE_STARTUP_PLAN"] = os.environ.get("VLLM_ENABLE_STARTUP_PLAN", "1")
    if cache is not None and "VLLM_CACHE_ROOT" not in os.environ:
        environment["VLLM_CACHE_ROOT"] = str(cache / KEPT_BY_VLLM)
    return environment


def vllm_arguments(
    settings: Settings, device: Device, snapshot: Snapshot, footprint: Footprint
) -> tuple[str, ...]:
    """vLLM's command line for one snapshot; its serving.json overrides the settings."""
    serving = snapshot.serving
    length = longest_request(text_config(snapshot.path), serving, settings.max_model_len)
    gpus = serving.tensor_parallel_size or tensor_parallel_size(settings.tensor_parallel_size, device)
    sampling = {"temperature": settings.default_temperature} | serving.sampling_defaults.generation_config()
    arguments = [
        *("--model", str(snapshot.path)),
        *("--served-model-name", snapshot.model),
        *("--dtype", compute_dtype(settings.dtype, device, Backend.VLLM, snapshot)),
        *("--load-format", settings.load_format.value),
        # Mapped from the page cache, into which the service has already read them: faster than any copy.
        *("--safetensors-load-strategy", "lazy"),
        *("--max-model-len", str(length or "auto")),
        # DEFAULT_MAX_TOKENS is not passed: vLLM treats max_new_tokens as a limit, not as a default.
        *("--override-generation-config", json.dumps(sampling)),
        *("--worker-extension-cls", "inference_service.hosts.vllm.worker_extension.WorkerExtension"),
        # A request's image_url is never fetched: no domain is allowed.
        *("--allowed-media-domains", "none.invalid"),
        "--disable-uvicorn-access-log",
        "--disable-fastapi-docs",
        *_memory_arguments(device, footprint, gpus),
        *_serving_arguments(serving),
        *_adapter_arguments(settings, snapshot),
    ]
    if settings.max_sleeping and can_sleep(Backend.VLLM, device):
        arguments.append("--enable-sleep-mode")
    if runs_eagerly(settings.engine_eager, device):
        arguments.append("--enforce-eager")
    elif device.kind is DeviceKind.CUDA:
        arguments += _graph_arguments(settings, serving)
    return tuple(arguments)


def _graph_arguments(settings: Settings, serving: Serving) -> list[str]:
    """vLLM captures 51 sizes, and each twice if there are adapters: half a minute of every fresh load.

    A batch is padded to the next size. Graphs without adapters beside those with them would spare requests
    for the base the adapters' kernels: to be captured where a measurement shows that it pays.
    """
    most = serving.max_num_seqs or settings.concurrency
    sizes = settings.cuda_graph_sizes or graph_sizes(most)
    return [
        *("--cudagraph-capture-sizes", *map(str, sizes)),
        *("--compilation-config", json.dumps({"cudagraph_specialize_lora": False})),
    ]


def graph_sizes(most: int) -> tuple[int, ...]:
    """Batch sizes up to `most` sequences: powers of two, then steps that waste little."""
    most = min(most, MAX_GRAPH_SIZE)
    sizes = [size for size in (1, 2, 4, 8, 16, 32, *range(64, MAX_GRAPH_SIZE, 64)) if size < most]
    return (*sizes, most)


def _serving_arguments(serving: Serving) -> list[str]:
    """The arguments that only serving.json can set."""
    arguments = []
    if serving.quantization is not None:
        arguments += ["--quantization", serving.quantization]
    if serving.tool_call_parser is not None:
        arguments += ["--enable-auto-tool-choice", "--tool-call-parser", serving.tool_call_parser]
    if serving.reasoning_parser is not None:
        arguments += ["--reasoning-parser", serving.reasoning_parser]
    if serving.max_num_seqs is not None:
        arguments += ["--max-num-seqs", str(serving.max_num_seqs)]
    if serving.enable_prefix_caching is not None:
        arguments.append(f"--{'' if serving.enable_prefix_caching else 'no-'}enable-prefix-caching")
    return arguments


def _adapter_arguments(settings: Settings, snapshot: Snapshot) -> list[str]:
    """Only if there are adapters: every request pays for LoRA support."""
    if not snapshot.adapter_rank:
        return []
    return [
        "--enable-lora",
        *("--max-lora-rank", str(snapshot.adapter_rank)),
        *("--max-loras", str(settings.max_adapters)),
        *("--max-cpu-loras", str(max(settings.max_adapters, settings.max_cpu_adapters))),
    ]


def _memory_arguments(device: Device, footprint: Footprint, gpus: int) -> list[str]:
    arguments = ["--kv-cache-memory-bytes", str(footprint.kv_cache)]
    if device.kind is DeviceKind.CUDA:
        # With an explicit KV cache size this is only the memory that vLLM requires to be free at its start.
        share = min(1.0, footprint.total / device.memory_bytes) if device.memory_bytes else 1.0
        arguments += ["--gpu-memory-utilization", f"{share:.4f}", "--tensor-parallel-size", str(gpus)]
    return arguments


def runs_eagerly(choice: bool | None, device: Device) -> bool:
    if choice is not None:
        return choice
    # Compiling for the CPU takes half a minute at every start and requires a compiler.
    return device.kind is DeviceKind.CPU
