"""Checks whether a model can be served before any of its weights are downloaded.

Reads config.json and the header of every safetensors file by range. Results are cached per revision, so only
the first request for a revision pays the few milliseconds.
"""

import asyncio
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import google_crc32c

from inference_service.backends import source_tables
from inference_service.checkpoints.adapter_config import adapter_config, why_malformed, why_not_of
from inference_service.checkpoints.context_length import is_stretched, positions
from inference_service.checkpoints.memory_profile import (
    MemoryProfile,
    Weights,
    memory_profile_of,
    memory_profile_of_fake,
)
from inference_service.checkpoints.safetensors import (
    LENGTH_BYTES,
    BadHeader,
    Tensor,
    header_bytes,
    parse_header,
)
from inference_service.checkpoints.serving_config import Serving
from inference_service.checkpoints.swap_key import VOCABULARY, swap_key
from inference_service.config import Backend, Settings
from inference_service.errors import CacheError, ModelNotServable, readable_bytes
from inference_service.machine.device import Device
from inference_service.storage.bucket.documents import (
    WEIGHTS,
    BadDocument,
    Reader,
    SnapshotDocuments,
    parse_object,
)
from inference_service.storage.bucket.model import ADAPTER_CONFIG, CONFIG, ListedModel
from inference_service.storage.bucket.store import StoredObject
from inference_service.storage.model import Adapter, Checkpoint, Model

READS_AT_ONCE = 8
KEPT_VERDICTS = 3
JUDGES = 4
# Most shard headers fit: one request instead of two.
FIRST_READ_BYTES = 64 << 10


@dataclass(frozen=True)
class _Verdict:
    """The result of an examination: why the model cannot be served (if so), and the memory it needs.

    `revision`: for an adapter, includes the reference of its base.
    """

    revision: str
    reason: str | None
    memory_profile: MemoryProfile | None = None
    swap_key: str | None = None
    architectures: tuple[str, ...] = ()


class Preflight:
    """Examines models for one device and backend.

    `check_disk(model, bytes)` raises DiskFull if the disk cannot hold the model. `kept` returns the path of
    the snapshot if it is already on disk; the bucket is then not read.
    """

    def __init__(
        self,
        documents: Reader,
        settings: Settings,
        device: Device,
        backend: Backend,
        check_disk: Callable[[str, int], None],
        kept: Callable[[ListedModel], Awaitable[Path | None]] | None = None,
    ) -> None:
        self._documents = documents
        self._settings = settings
        self._device = device
        self._backend = backend
        self._check_disk = check_disk
        self._kept = kept
        # The newest revisions of each model: the one that serves and the one that will.
        self._found: dict[tuple[str, str], _Verdict] = {}
        self._examining: dict[tuple[str, str], asyncio.Task[_Verdict]] = {}
        self._judges = ThreadPoolExecutor(JUDGES, thread_name_prefix="judge")
        self._readers = ThreadPoolExecutor(READS_AT_ONCE, thread_name_prefix="preflight")

    async def examine(self, model: Model) -> None:
        """Returns for a model that can be served; raises ModelNotServable, DiskFull and StoreError."""
        verdict = self._verdict(model) or await self._once(model)
        if verdict.reason is not None:
            raise ModelNotServable(model.name, verdict.reason)

    def memory_profile(self, model: Model) -> MemoryProfile | None:
        """The memory that an examined model takes; None if no header was read."""
        verdict = self._verdict(model)
        return None if verdict is None else verdict.memory_profile

    def swap_key(self, model: Model) -> str | None:
        """Which engines can take the weights of an examined model; None if none can."""
        verdict = self._verdict(model)
        return None if verdict is None else verdict.swap_key

    def architectures(self, model: Model) -> tuple[str, ...]:
        """The architectures that config.json of an examined model names."""
        verdict = self._verdict(model)
        return () if verdict is None else verdict.architectures

    def _verdict(self, model: Model) -> _Verdict | None:
        return self._found.get((model.name, _examined(model)))

    async def _once(self, model: Model) -> _Verdict:
        """One examination per revision, shared by all callers; it continues if a client disconnects."""
        key = (model.name, _examined(model))
        examining = self._examining.get(key)
        if examining is None:
            examining = asyncio.create_task(self._examine(model))
            self._examining[key] = examining
            examining.add_done_callback(lambda _: self._examining.pop(key, None))
        return await asyncio.shield(examining)

    async def _examine(self, model: Model) -> _Verdict:
        snapshot = await self._snapshot(model)
        of_base = await self._snapshot(model.engine_model) if isinstance(model, Adapter) else None
        loop = asyncio.get_running_loop()
        verdict = await loop.run_in_executor(
            self._judges, self._judge_where_it_lies, model, snapshot, of_base
        )
        older = [key for key in self._found if key[0] == model.name]
        for key in older[: max(0, len(older) - KEPT_VERDICTS + 1)]:
            del self._found[key]
        self._found[model.name, verdict.revision] = verdict
        return verdict

    async def _snapshot(self, model: Model) -> Path | None:
        return None if self._kept is None else await self._kept(model.described)

    def _judge_where_it_lies(self, model: Model, snapshot: Path | None, of_base: Path | None) -> _Verdict:
        """Prefers snapshots on disk, also for an adapter's base: the bucket may no longer hold them."""
        try:
            return self._judge(model, self._reader(snapshot), self._reader(of_base), fetch=snapshot is None)
        except CacheError:  # the snapshot has just been evicted
            return self._judge(model, self._documents, self._documents, fetch=True)

    def _reader(self, snapshot: Path | None) -> Reader:
        return self._documents if snapshot is None else SnapshotDocuments(snapshot)

    def _judge(self, model: Model, reader: Reader, of_base: Reader, fetch: bool) -> _Verdict:
        """Whether the model can be served. Damage is raised, not cached: the network may have caused it."""
        if fetch:
            self._check_disk(model.name, model.bytes)
        if self._backend is Backend.FAKE:  # the fake engine never reads weights
            return self._judge_fake(model, reader)
        if isinstance(model, Adapter):
            return self._judge_adapter(model, model.engine_model, reader, of_base)
        try:
            config = _document(CONFIG, model, reader)
            weights = self._weights(model, reader)
        except BadDocument as error:
            raise ModelNotServable(model.name, f"{error}.") from error
        reason = _malformed(config) or _runs_code(config) or self._unknown_names(config, model.serving)
        if reason is not None:
            return _Verdict(model.revision, reason)
        profile = memory_profile_of(
            config, model.serving, weights, self._settings, self._device, self._backend
        )
        reason = _too_long(config, model.serving) or self._too_large(profile)
        key = swap_key(config, weights.tensors, model.serving, _vocabulary(model, reader))
        return _Verdict(model.revision, reason, profile, key, tuple(config.get("architectures") or ()))

    def _judge_fake(self, model: Model, reader: Reader) -> _Verdict:
        profile = memory_profile_of_fake(model.bytes, model.serving)
        try:
            key = _document(CONFIG, model, reader).get("fake", {}).get("swap_key")
        except BadDocument:
            key = None
        return _Verdict(_examined(model), self._too_large(profile), profile, key)

    def _judge_adapter(self, adapter: Adapter, base: Checkpoint, reader: Reader, of_base: Reader) -> _Verdict:
        limit = base.serving.max_lora_rank
        if limit is not None and adapter.rank > limit:
            return _Verdict(
                _examined(adapter),
                f"its rank {adapter.rank} exceeds max_lora_rank={limit} in the serving.json of its base "
                f"'{base.name}'. Raise max_lora_rank there, or train the adapter with a lower rank.",
            )
        try:
            tensors = self._weights(adapter, reader).tensors
            config = adapter_config(_document(ADAPTER_CONFIG, adapter, reader))
            base_tensors = self._weights(base, of_base).tensors
        except BadDocument as error:
            raise ModelNotServable(adapter.name, f"{error}.") from error
        reason = why_malformed(config, tensors) or why_not_of(base.name, tensors, base_tensors)
        return _Verdict(_examined(adapter), reason, MemoryProfile("", adapter.bytes))

    def _weights(self, model: Model, reader: Reader) -> Weights:
        """The tensors of all files of a model; raises BadDocument."""
        files = [stored for stored in model.objects if stored.filename.endswith(WEIGHTS)]
        headers = list(self._readers.map(lambda stored: _header(reader, stored), files))
        weights = Weights({})
        for stored, header in zip(files, headers, strict=True):
            weights.tensors.update(_parsed(stored, header))
        return weights

    def _unknown_names(self, config: dict[str, Any], serving: Serving) -> str | None:
        """An architecture, parser or quantization that the engine does not support."""
        by_vllm = self._backend is Backend.VLLM
        architectures: list[str] = config.get("architectures") or []
        known = source_tables.architectures() if by_vllm else source_tables.transformers_architectures()
        if known is not None and not known.intersection(architectures):
            named = ", ".join(architectures) or "no architecture"
            return f"config.json names {named}, which the {self._backend} backend does not support."
        if not by_vllm:
            return _only_vllm(serving)
        for key, name, names in (
            ("tool_call_parser", serving.tool_call_parser, source_tables.tool_parsers()),
            ("reasoning_parser", serving.reasoning_parser, source_tables.reasoning_parsers()),
            ("quantization", serving.quantization, source_tables.quantizations()),
        ):
            if name is not None and names is not None and name not in names:
                return f"serving.json: {key}: '{name}' is not one of {', '.join(sorted(names))}."
        return None

    def _too_large(self, profile: MemoryProfile) -> str | None:
        device, settings = self._device, self._settings
        if not device.memory_bytes:
            return None
        usable = int(device.memory_bytes * settings.gpu_memory_utilization) * profile.gpus
        needed, cache = profile.weights_bytes, profile.kv_cache_bytes or 0
        if needed + cache <= usable:
            return None
        beside = f" plus {readable_bytes(cache)} of KV cache (serving.json: kv_cache_gib)" if cache else ""
        return (
            f"its weights take {readable_bytes(needed)} as {profile.dtype}{beside}, but the engine may use "
            f"only {readable_bytes(usable)} ({profile.gpus} x {readable_bytes(device.memory_bytes)} of "
            f"{device.name}, GPU_MEMORY_UTILIZATION={settings.gpu_memory_utilization:g})."
        )


def _examined(model: Model) -> str:
    """The key of an examination: the revision, and for an adapter also the reference of its base."""
    on = f" on {model.engine_model.reference}" if isinstance(model, Adapter) else ""
    return f"{model.revision}{on}"


def _document(name: str, model: Model, reader: Reader) -> dict[str, Any]:
    """A JSON object of the model, {} if the file does not exist; raises BadDocument."""
    found = [stored for stored in model.objects if stored.filename == name]
    return parse_object(name, reader.read(found[0])) if found else {}


def _vocabulary(model: Model, reader: Reader) -> dict[str, int]:
    """crc32c of the tokenizer's files, computed if the store has none (file://)."""
    files = [stored for stored in model.objects if stored.filename in VOCABULARY]
    return {
        stored.filename: stored.crc32c
        if stored.crc32c is not None
        else int(google_crc32c.value(reader.read(stored)))
        for stored in files
    }


def _header(reader: Reader, stored: StoredObject) -> bytes:
    """The length and the header's JSON; an invalid header is returned as is, for `_parsed` to report."""
    first = reader.read_range(stored, 0, min(stored.size, FIRST_READ_BYTES))
    try:
        end = LENGTH_BYTES + header_bytes(first, stored.size)
    except BadHeader:
        return first[:LENGTH_BYTES]
    if end > len(first):
        first += reader.read_range(stored, len(first), end)
    return first[:end]


def _parsed(stored: StoredObject, header: bytes) -> dict[str, Tensor]:
    try:
        header_bytes(header, stored.size)
        return parse_header(header[LENGTH_BYTES:], stored.size)
    except BadHeader as error:
        raise BadDocument(f"{stored.filename} is incomplete or damaged: {error}") from error


def _malformed(config: dict[str, Any]) -> str | None:
    """Checks the types that all later code takes for granted."""
    architectures = config.get("architectures") or []
    if not isinstance(architectures, list) or not all(isinstance(name, str) for name in architectures):
        return "config.json: architectures must be a list of names."
    if not isinstance(config.get("text_config") or {}, dict):
        return "config.json: text_config must be an object."
    return None


def _only_vllm(serving: Serving) -> str | None:
    """Settings that transformers would ignore: the model would not be served as serving.json asks."""
    if serving.quantization is not None:
        return "serving.json: quantization requires the vLLM backend; the transformers backend has CPU_INT8."
    return None


def _too_long(config: dict[str, Any], serving: Serving) -> str | None:
    """max_model_len beyond the model's positions; if RoPE is scaled, the engine decides."""
    known = positions(config)
    if serving.max_model_len is None or known is None or is_stretched(config):
        return None
    if serving.max_model_len <= known:
        return None
    return (
        f"serving.json: max_model_len: {serving.max_model_len} is more than the {known} positions that the "
        "model has (config.json)."
    )


def _runs_code(config: dict[str, Any]) -> str | None:
    if not config.get("auto_map"):
        return None
    return (
        "config.json has an auto_map, which requires running Python code from the bucket. This service never "
        "does. If the engine supports the architecture natively, remove auto_map."
    )
