"""Whether a model can be served at all, found out before a byte of its weights is downloaded.

Reads config.json and the header of every safetensors file by range. What it finds is kept per revision,
so that only the first request for a revision pays the few milliseconds.
"""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from inference_service.config import Settings
from inference_service.engines import vllm_names
from inference_service.engines.device import Backend, Device, resolve_dtype, tensor_parallel_size
from inference_service.errors import DiskFull, ModelNotServable
from inference_service.models.serving import Serving
from inference_service.storage.documents import WEIGHTS, BadDocument, Documents, parse_object
from inference_service.storage.model import Model
from inference_service.storage.safetensors import (
    LENGTH_BYTES,
    BadHeader,
    Tensor,
    header_bytes,
    parse_header,
)
from inference_service.storage.store import StoredObject

READS_AT_ONCE = 8
# Most headers of a shard fit: one request instead of two.
FIRST_READ_BYTES = 64 << 10
_GIB = 1 << 30
_DTYPE_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
_FLOATS = frozenset({"F64", "F32", "F16", "BF16"})


@dataclass(frozen=True)
class Weights:
    """What the headers say. `tensors` by name, of all files; `stored_bytes` as they lie in the files."""

    tensors: dict[str, Tensor]

    @property
    def stored_bytes(self) -> int:
        return sum(tensor.bytes for tensor in self.tensors.values())

    def bytes_as(self, dtype: str) -> int:
        """Bytes in memory once floats are converted to `dtype`; packed integers stay as they are."""
        return sum(
            tensor.elements * _DTYPE_BYTES[dtype] if tensor.dtype in _FLOATS else tensor.bytes
            for tensor in self.tensors.values()
        )


class Preflight:
    """Examines models for one device and backend. `most_bytes`: what the disk can hold of one model."""

    def __init__(
        self,
        documents: Documents,
        settings: Settings,
        device: Device,
        backend: Backend,
        most_bytes: Callable[[], int],
    ) -> None:
        self._documents = documents
        self._settings = settings
        self._device = device
        self._backend = backend
        self._most_bytes = most_bytes
        # Model -> the revision that was examined, and why it cannot be served, if it cannot.
        self._found: dict[str, tuple[str, str | None]] = {}
        self._examining: dict[tuple[str, str], asyncio.Task[None]] = {}
        self._threads = ThreadPoolExecutor(READS_AT_ONCE, thread_name_prefix="preflight")

    async def examine(self, model: Model) -> None:
        """Returns for a model that can be served; raises ModelNotServable, DiskFull and StoreError."""
        revision, reason = self._found.get(model.name, (None, None))
        if revision != model.revision:
            await self._once(model)
            _, reason = self._found[model.name]
        if reason is not None:
            raise ModelNotServable(model.name, reason)

    async def _once(self, model: Model) -> None:
        """One examination of a revision, however many ask; it outlives a client that leaves."""
        key = (model.name, model.revision)
        examining = self._examining.get(key)
        if examining is None:
            examining = asyncio.create_task(self._examine(model))
            self._examining[key] = examining
            examining.add_done_callback(lambda _: self._examining.pop(key, None))
        await asyncio.shield(examining)

    async def _examine(self, model: Model) -> None:
        self._check_disk(model)
        # Nothing reads the insides of the fake engine's models.
        reason = None if self._backend is Backend.FAKE else await self._judge(model)
        self._found[model.name] = (model.revision, reason)

    async def _judge(self, model: Model) -> str | None:
        """Why the model cannot be served; what is damaged is told and not kept: it may be the wire."""
        files = [stored for stored in model.objects if stored.filename.endswith(WEIGHTS)]
        (config_file,) = (stored for stored in model.objects if stored.filename == "config.json")
        content, *headers = await asyncio.gather(
            self._run(self._documents.read, config_file),
            *(self._run(self._header, stored) for stored in files),
        )
        try:
            config = parse_object("config.json", content)
            weights = Weights({})
            for stored, header in zip(files, headers, strict=True):
                weights.tensors.update(_parsed(stored, header))
        except BadDocument as error:
            raise ModelNotServable(model.name, f"{error}.") from error
        return (
            _malformed(config)
            or _runs_code(config)
            or self._unknown_names(config, model.serving)
            or self._too_large(config, model.serving, weights)
        )

    async def _run(self, read: Callable[[StoredObject], bytes], stored: StoredObject) -> bytes:
        return await asyncio.get_running_loop().run_in_executor(self._threads, read, stored)

    def _header(self, stored: StoredObject) -> bytes:
        """The header's JSON; what is no header comes as the reason, for `_parsed` to tell."""
        first = self._documents.read_range(stored, 0, min(stored.size, FIRST_READ_BYTES))
        try:
            length = header_bytes(first, stored.size)
        except BadHeader:
            return first[:LENGTH_BYTES]
        end = LENGTH_BYTES + length
        if end > len(first):
            first += self._documents.read_range(stored, len(first), end)
        return first[:end]

    def _check_disk(self, model: Model) -> None:
        most = self._most_bytes()
        if model.bytes > most:
            raise DiskFull(
                f"The model '{model.name}' needs {_gib(model.bytes)} in LOCAL_MODEL_CACHE, which can hold "
                f"{_gib(most)} at most (DISK_CACHE_GIB and the size of the file system).",
                param="model",
            )

    def _unknown_names(self, config: dict[str, Any], serving: Serving) -> str | None:
        """An architecture, parser or quantisation that the engine does not have."""
        if self._backend is not Backend.VLLM:
            return None
        architectures: list[str] = config.get("architectures") or []
        known = vllm_names.architectures()
        if known is not None and not known.intersection(architectures):
            named = ", ".join(architectures) or "no architecture"
            return f"config.json names {named}, which {self._backend} does not run."
        for key, name, names in (
            ("tool_call_parser", serving.tool_call_parser, vllm_names.tool_parsers()),
            ("reasoning_parser", serving.reasoning_parser, vllm_names.reasoning_parsers()),
            ("quantization", serving.quantization, vllm_names.quantizations()),
        ):
            if name is not None and names is not None and name not in names:
                return f"serving.json: {key}: '{name}' is none of {', '.join(sorted(names))}."
        return None

    def _too_large(self, config: dict[str, Any], serving: Serving, weights: Weights) -> str | None:
        device, settings = self._device, self._settings
        if not device.memory_bytes:
            return None
        merged = config | (config.get("text_config") or {})
        stored_dtype = merged.get("dtype") or merged.get("torch_dtype")
        dtype = serving.dtype or resolve_dtype(settings.dtype, device, stored_dtype)
        gpus = serving.tensor_parallel_size or tensor_parallel_size(settings, device)
        usable = int(device.memory_bytes * settings.gpu_memory_utilization) * gpus
        needed = weights.bytes_as(dtype)
        if needed <= usable:
            return None
        return (
            f"its weights take {_gib(needed)} as {dtype}, and the engine may use {_gib(usable)} "
            f"({gpus} x {_gib(device.memory_bytes)} of {device.name}, "
            f"GPU_MEMORY_UTILIZATION={settings.gpu_memory_utilization:g})."
        )


def _parsed(stored: StoredObject, header: bytes) -> dict[str, Tensor]:
    try:
        header_bytes(header, stored.size)
        return parse_header(header[LENGTH_BYTES:], stored.size)
    except BadHeader as error:
        raise BadDocument(f"{stored.filename} is not complete or damaged: {error}") from error


def _malformed(config: dict[str, Any]) -> str | None:
    """What is read of config.json has the type that everything after this takes for granted."""
    architectures = config.get("architectures") or []
    if not isinstance(architectures, list) or not all(isinstance(name, str) for name in architectures):
        return "config.json: architectures is not a list of names."
    if not isinstance(config.get("text_config") or {}, dict):
        return "config.json: text_config is not an object."
    return None


def _runs_code(config: dict[str, Any]) -> str | None:
    if not config.get("auto_map"):
        return None
    return (
        "config.json has an auto_map: it wants Python code from the bucket to be run, which this service "
        "never does. If the engine knows the architecture by itself, remove auto_map."
    )


def _gib(count: int) -> str:
    return f"{count / _GIB:.2f} GiB"
