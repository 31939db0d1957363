"""From a snapshot to an engine: the host's program, its command line and its environment.

vLLM is steered by its own command line only, the most stable interface that it has.
"""

import contextlib
import itertools
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any, TypeVar

from inference_service.config import EngineChoice, Settings
from inference_service.engines.base import Footprint, HostSpec, Snapshot
from inference_service.engines.context import longest_request
from inference_service.engines.cuda import cuda_environment
from inference_service.engines.device import (
    Backend,
    Device,
    DeviceKind,
    backend_version,
    missing_for,
    resolve_dtype,
    tensor_parallel_size,
)
from inference_service.engines.hosted import HostedEngine
from inference_service.engines.launcher import Launcher
from inference_service.models.serving import Serving

_Number = TypeVar("_Number", int, float)
ROOM_PREFIX = "inference-service-"
# That may share one step of the transformers backend where serving.json does not say.
TRANSFORMERS_SEQUENCES = 64
# Below LOCAL_MODEL_CACHE; no model's name begins with a dot.
KEPT_BY_VLLM = ".vllm"
KEPT_BY_TRITON = ".triton"


class EngineFactory:
    """Makes engines for one device and backend; owns the directory of their sockets."""

    def __init__(self, settings: Settings, device: Device, backend: Backend, launcher: Launcher) -> None:
        self._settings = settings
        self._device = device
        self._backend = backend
        self._launcher = launcher
        self._numbers = itertools.count(1)
        _sweep_orphaned_rooms()
        self._room = Path(tempfile.mkdtemp(prefix=f"{ROOM_PREFIX}{os.getpid()}-"))

    def make(self, snapshot: Snapshot, footprint: Footprint) -> HostedEngine:
        """A new engine that keeps within `footprint`, not started yet."""
        directory = self._room / str(next(self._numbers))

        def specify(snapshot: Snapshot) -> HostSpec:
            return self._spec(snapshot, footprint, directory)

        return HostedEngine(self._launcher, specify(snapshot), directory, specify)

    def conditions(self) -> str:
        """What logits depend on besides the weights: kernels, their version, the type they compute in."""
        bits = "int8" if self._settings.quantizes else ""
        computing = f"{self._device.name} {self._settings.dtype} {bits}".rstrip()
        return f"{self._backend} {backend_version(self._backend)} {computing}"

    def close(self) -> None:
        shutil.rmtree(self._room, ignore_errors=True)

    def _spec(self, snapshot: Snapshot, footprint: Footprint, directory: Path) -> HostSpec:
        arguments: tuple[str, ...] = ()
        environment: dict[str, str] = {}
        fallback: tuple[str, ...] | None = None
        if self._backend is Backend.VLLM:
            if self._settings.engine is EngineChoice.AUTO and not missing_for(
                Backend.TRANSFORMERS, self._device
            ):
                fallback = transformers_arguments(self._settings, self._device, snapshot, footprint)
            arguments = vllm_arguments(self._settings, self._device, snapshot, footprint)
            # vLLM's sockets and temporary files: in the engine's own room they go when it goes.
            environment = {"VLLM_RPC_BASE_PATH": str(directory), "TMPDIR": str(directory)}
        elif self._backend is Backend.TRANSFORMERS:
            arguments = transformers_arguments(self._settings, self._device, snapshot, footprint)
        elif self._backend is Backend.FAKE:
            arguments = (str(self._settings.fake_tokens_per_second),)
        sampling = snapshot.serving.sampling_defaults
        return HostSpec(
            model=snapshot.model,
            program=f"inference_service.hosts.{self._backend.value}",
            directory=str(snapshot.path),
            arguments=arguments,
            environment=environment,
            fallback=fallback,
            default_max_tokens=_chosen(sampling.max_tokens, self._settings.default_max_tokens),
            default_temperature=_chosen(sampling.temperature, self._settings.default_temperature),
        )


def _sweep_orphaned_rooms() -> None:
    """Remove what a service that was killed has left; its process id is in the name."""
    for room in Path(tempfile.gettempdir()).glob(f"{ROOM_PREFIX}*-*"):
        owner = room.name.removeprefix(ROOM_PREFIX).partition("-")[0]
        with contextlib.suppress(FileNotFoundError):  # another service sweeps too
            if owner.isdigit() and room.stat().st_uid == os.getuid() and not _lives(int(owner)):
                shutil.rmtree(room, ignore_errors=True)


def _lives(process: int) -> bool:
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass  # another user's, but alive
    return True


def launcher_environment(backend: Backend, device: Device, cache: Path | None = None) -> dict[str, str]:
    """What must be set before the launcher imports its backend, and every host inherits.

    `cache`: where compiled kernels and start-up plans are kept beside the snapshots, for the next engine of
    the same architecture on this device; vLLM and Triton tell them apart by themselves.
    """
    if backend is Backend.FAKE:
        return {}
    environment = {
        # Nothing is ever fetched from a model hub: what is served is what the bucket holds.
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "DO_NOT_TRACK": "1",
    }
    if device.kind is DeviceKind.CPU:
        environment["OMP_NUM_THREADS"] = os.environ.get("OMP_NUM_THREADS", str(_cores()))
    if device.kind is DeviceKind.CUDA:
        environment |= cuda_environment(device)
    if cache is not None and "TRITON_CACHE_DIR" not in os.environ:
        environment["TRITON_CACHE_DIR"] = str(cache / KEPT_BY_TRITON)
    return environment | (_vllm_environment(device, cache) if backend is Backend.VLLM else {})


def _vllm_environment(device: Device, cache: Path | None) -> dict[str, str]:
    environment = {"VLLM_NO_USAGE_STATS": "1"}
    if device.kind is DeviceKind.CPU:
        # The worker inside the engine core: it obeys OMP_NUM_THREADS and saves a process and its
        # imports. vLLM refuses a worker of its own only for the sake of that variable.
        environment["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    else:
        environment["VLLM_ENABLE_STARTUP_PLAN"] = os.environ.get("VLLM_ENABLE_STARTUP_PLAN", "1")
    if cache is not None and "VLLM_CACHE_ROOT" not in os.environ:
        environment["VLLM_CACHE_ROOT"] = str(cache / KEPT_BY_VLLM)
    return environment


def _cores() -> int:
    """Those that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def transformers_arguments(
    settings: Settings, device: Device, snapshot: Snapshot, footprint: Footprint
) -> tuple[str, ...]:
    """The command line of hosts/transformers.py; what the snapshot's serving.json says wins."""
    serving = snapshot.serving
    sampling = {"temperature": settings.default_temperature} | serving.sampling_defaults.generation_config()
    arguments = [
        *("--device", device.kind.value),
        *("--dtype", _dtype(settings, device, Backend.TRANSFORMERS, snapshot)),
        *("--kv-cache-bytes", str(footprint.kv_cache)),
        *("--max-num-seqs", str(serving.max_num_seqs or TRANSFORMERS_SEQUENCES)),
        *("--sampling-defaults", json.dumps(sampling)),
    ]
    length = longest_request(_text_config(snapshot.path), serving, settings)
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
    """Whether the model is too large for one GPU: a batch can be shared on one only."""
    gpus = serving.tensor_parallel_size or tensor_parallel_size(settings, device)
    whole = footprint.weights * gpus + footprint.kv_cache + footprint.overhead
    return gpus > 1 and whole > device.memory_bytes * settings.gpu_memory_utilization


def _dtype(settings: Settings, device: Device, backend: Backend, snapshot: Snapshot) -> str:
    config = _text_config(snapshot.path)
    stored = config.get("dtype") or config.get("torch_dtype")
    return snapshot.serving.dtype or resolve_dtype(settings.dtype, device, backend, stored)


def vllm_arguments(
    settings: Settings, device: Device, snapshot: Snapshot, footprint: Footprint
) -> tuple[str, ...]:
    """vLLM's command line for one snapshot; what its serving.json says wins over the settings."""
    serving = snapshot.serving
    length = longest_request(_text_config(snapshot.path), serving, settings)
    gpus = serving.tensor_parallel_size or tensor_parallel_size(settings, device)
    sampling = {"temperature": settings.default_temperature} | serving.sampling_defaults.generation_config()
    arguments = [
        *("--model", str(snapshot.path)),
        *("--served-model-name", snapshot.model),
        *("--dtype", _dtype(settings, device, Backend.VLLM, snapshot)),
        *("--load-format", "safetensors"),
        # Mapped from the page cache, where the service has read them already: no copy is faster.
        *("--safetensors-load-strategy", "lazy"),
        *("--max-model-len", str(length or "auto")),
        # DEFAULT_MAX_TOKENS is no part of this: vLLM reads max_new_tokens as a limit, not a default.
        *("--override-generation-config", json.dumps(sampling)),
        *("--worker-extension-cls", "inference_service.hosts.vllm_worker.WorkerExtension"),
        # A request's image_url is never fetched: no domain is allowed.
        *("--allowed-media-domains", "none.invalid"),
        "--disable-uvicorn-access-log",
        "--disable-fastapi-docs",
        *_memory_arguments(device, footprint, gpus),
        *_wished_arguments(serving),
        *_adapter_arguments(settings, snapshot),
    ]
    if _eager(settings, device):
        arguments.append("--enforce-eager")
    return tuple(arguments)


def _wished_arguments(serving: Serving) -> list[str]:
    """What only serving.json can ask for."""
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
    """Only where there are adapters: every request pays for it."""
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
        # With an explicit KV cache this is only what vLLM wants to see free at its start: its own part.
        share = min(1.0, footprint.total / device.memory_bytes) if device.memory_bytes else 1.0
        arguments += ["--gpu-memory-utilization", f"{share:.4f}", "--tensor-parallel-size", str(gpus)]
    return arguments


def _chosen(wish: _Number | None, default: _Number) -> _Number:
    return default if wish is None else wish


def _eager(settings: Settings, device: Device) -> bool:
    if settings.engine_eager is not None:
        return settings.engine_eager
    # Compiling for the CPU takes half a minute at every start and needs a compiler on the machine.
    return device.kind is DeviceKind.CPU


def _text_config(directory: Path) -> dict[str, Any]:
    """config.json, with the language model's own part on top where it is nested."""
    config: dict[str, Any] = json.loads((directory / "config.json").read_text())
    return config | (config.get("text_config") or {})
