"""The bucket as a registry: from the name that a client uses to a snapshot that an engine can load."""

import asyncio
import logging
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from inference_service.checkpoints.adapter_config import adapter_config, engine_rank
from inference_service.checkpoints.memory_profile import MemoryProfile
from inference_service.checkpoints.reference import Reference
from inference_service.checkpoints.snapshot import Snapshot
from inference_service.errors import ModelNotServable, ObjectReplaced, ServiceError, SnapshotCorrupt
from inference_service.storage.bucket.catalog import Catalog, RevisionNotFound
from inference_service.storage.bucket.directory import DirectoryStore
from inference_service.storage.bucket.documents import parse_object
from inference_service.storage.bucket.model import ADAPTER_CONFIG, DescribedModel, ModelKind, canonical_name
from inference_service.storage.bucket.store import Store, StoredObject
from inference_service.storage.compiled import CompileCache
from inference_service.storage.model import Adapter, AnyModel, Checkpoint, Model, Requested, Unservable
from inference_service.storage.preflight import Preflight
from inference_service.storage.snapshots.layout import FileRecord, Layout, Manifest, disown
from inference_service.storage.snapshots.progress import Progress
from inference_service.storage.snapshots.snapshots import SnapshotStore
from inference_service.storage.snapshots.verify import Verifier

logger = logging.getLogger(__name__)

FILE_SCHEME = "file://"


def open_store(bucket: str) -> Store:
    """The store that GCS_BUCKET names; nothing is contacted yet."""
    if bucket.startswith(FILE_SCHEME):
        return DirectoryStore(Path(bucket.removeprefix(FILE_SCHEME)))
    # Imported only here: half a second that file:// does not need.
    from inference_service.storage.bucket.gcs import GcsStore

    return GcsStore(bucket)


class Registry:
    """Catalog, preflight and snapshots of one bucket, in the order in which a model needs them."""

    def __init__(
        self,
        catalog: Catalog,
        preflight: Preflight,
        snapshots: SnapshotStore,
        layout: Layout,
        verifier: Verifier,
        compiled: CompileCache | None = None,
    ) -> None:
        self.catalog = catalog
        self.snapshots = snapshots
        self._preflight = preflight
        self._layout = layout
        self._verifier = verifier
        self._compiled = compiled

    async def find(self, name: str) -> Requested[AnyModel]:
        """The model that a client means by `name`; raises ModelNotFound and StoreError.

        A revision that the bucket no longer holds is found while its snapshot is on the disk.
        """
        exact = Reference.parse(canonical_name(name)) is not None
        try:
            described = await self.catalog.find(name)
        except RevisionNotFound as error:
            kept = await self.kept(error.newest, error.revision)
            if kept is None:
                raise
            return Requested(kept, exact)
        return Requested(await self._placed(described), exact)

    async def _placed(self, described: DescribedModel) -> AnyModel:
        """The model with its engine: an adapter's base, the rank of a checkpoint's adapters."""
        if described.unservable is not None:
            return Unservable(described)
        if described.kind is ModelKind.CHECKPOINT:
            return Checkpoint(described, await self._adapter_rank(described))
        base = await self.catalog.base_of(described)
        if base.unservable is not None:
            return Adapter(described, Unservable(base))
        return Adapter(described, Checkpoint(base, await self._adapter_rank(base)))

    async def _adapter_rank(self, base: DescribedModel) -> int:
        limit = base.serving.max_lora_rank
        ranks = [each.rank for each in await self.catalog.adapters_of(base)]
        return engine_rank(max((rank for rank in ranks if limit is None or rank <= limit), default=0), limit)

    async def kept(self, newest: DescribedModel, revision: str) -> AnyModel | None:
        """Another revision of a model, from its snapshot on the disk; None if there is none.

        It is served as the bucket says of the newest revision.
        """
        path = self._layout.snapshot(newest.name, revision)
        if path.parent.parent != self._layout.root:
            return None
        kept = await asyncio.to_thread(_kept, newest, revision, path)
        return None if kept is None else await self._placed(kept)

    async def kept_instead(self, newest: DescribedModel) -> Model | None:
        """The most recently used other revision on the disk; None if none can be served."""
        for revision in await self.kept_revisions(newest.name):
            found = None if revision == newest.revision else await self.kept(newest, revision)
            if found is not None:
                try:
                    return await self.examine(found)
                except ServiceError:
                    continue
        return None

    async def kept_revisions(self, name: str) -> list[str]:
        """The revisions of a model on the disk, the most recently used first."""
        return await asyncio.to_thread(self._layout.revisions, name)

    async def examine(self, model: AnyModel) -> Model:
        """The model, if it can be served; raises ModelNotServable, DiskFull and StoreError."""
        if isinstance(model, Unservable):
            raise ModelNotServable(model.name, model.reason)
        if isinstance(model, Adapter):
            try:
                await self.examine(model.base)
            except ModelNotServable as error:
                raise ModelNotServable(model.name, f"of its base: {error.message}") from error
        try:
            await self._preflight.examine(model)
        except ObjectReplaced:
            self.catalog.forget()
            raise
        return model

    def memory_profile(self, model: Model) -> MemoryProfile:
        """The memory that the model takes; if it was not examined, as much as on the disk."""
        return self._preflight.memory_profile(model) or MemoryProfile("", model.bytes)

    def swap_key(self, model: Model) -> str | None:
        """Models with the same key can replace each other in an engine; None: it cannot be swapped."""
        return self._preflight.swap_key(model)

    def architectures(self, model: Model) -> tuple[str, ...]:
        """The architectures of a model that was examined."""
        return self._preflight.architectures(model)

    async def newest_architectures(self, count: int) -> set[str]:
        """The architectures of the newest checkpoints, without those that cannot be read."""
        described = [each for each in await self.catalog.described() if isinstance(each, DescribedModel)]
        checkpoints = [each for each in described if each.kind is ModelKind.CHECKPOINT]
        newest = sorted(checkpoints, key=lambda each: each.created, reverse=True)[:count]
        found: set[str] = set()
        for each in newest:
            try:
                found |= set(self.architectures(await self.examine(await self._placed(each))))
            except ServiceError:
                continue
        return found

    def fetching(self, model: Model) -> Progress | None:
        """The progress of the model's fetch; None if none is in progress."""
        under_way = (progress for progress in self.snapshots.progress() if progress.model == model.name)
        return next(under_way, None)

    async def fetch(self, model: Model, entered: Callable[[str], None] = lambda phase: None) -> Snapshot:
        """The model's snapshot, held until `release`, every byte of it verified.

        `entered` is called with the phases: list, sync, verify. Raises StoreError, CacheError, DiskFull, and
        ObjectReplaced if the bucket holds another revision by now.
        """
        entered("list")
        # The request may have been admitted for another revision, which is gone.
        await self.examine(model)
        compiled = self._pull_compiled(model)
        try:
            snapshot = await self._verified(model, entered)
        except SnapshotCorrupt as error:
            # It was correct when it arrived and was damaged on the disk since.
            logger.warning("fetching it again: %s", error, extra={"model": model.name})
            snapshot = await self._verified(model, entered)
        except ObjectReplaced:
            self.catalog.forget()
            raise
        rank = model.adapter_rank if isinstance(model, Checkpoint) else 0
        directory = None if compiled is None else await compiled
        return replace(snapshot, serving=model.serving, adapter_rank=rank, compiled=directory)

    def _pull_compiled(self, model: Model) -> asyncio.Future[Path] | None:
        """Beside the weights; None for a model whose engine shares nothing that it compiles."""
        swap_key = self.swap_key(model)
        if self._compiled is None or swap_key is None or not isinstance(model, Checkpoint):
            return None
        return asyncio.ensure_future(self._compiled.pull(swap_key))

    async def loaded(self, snapshot: Snapshot) -> None:
        """A fresh engine has loaded the snapshot: share what that has compiled."""
        if self._compiled is not None and snapshot.compiled is not None:
            await self._compiled.push(snapshot.compiled)

    async def _verified(self, model: Model, entered: Callable[[str], None]) -> Snapshot:
        entered("sync")
        kept = await self.snapshots.kept(model.described)
        snapshot = await self.snapshots.snapshot(model.described)
        entered("verify")
        try:
            await self._verifier.verify(snapshot, arrived_now=kept is None)
        except BaseException as error:
            if isinstance(error, SnapshotCorrupt):
                await asyncio.to_thread(disown, snapshot.path)
            self.release(snapshot)
            raise
        return snapshot

    def stats(self) -> dict[str, Any]:
        """Fetches, the disk, the weights in memory. Walks the cache directory: call it in a thread."""
        cache = self._verifier.page_lock
        locked = {"quota_bytes": cache.quota, "used_bytes": cache.bytes}
        return {**self.snapshots.stats(), "host_cache": locked}

    def release(self, snapshot: Snapshot) -> None:
        """Release a snapshot that no engine uses any more."""
        self.snapshots.release(snapshot)


def _kept(newest: DescribedModel, revision: str, path: Path) -> DescribedModel | None:
    """The model of the snapshot in `path`; None if that is missing or damaged."""
    manifest = Manifest.read(path)
    try:
        records = {} if manifest is None else manifest.files
        objects = tuple(_stored(record) for _, record in sorted(records.items()))
        if not objects:
            return None
        kept = replace(newest, revision=revision, objects=objects, unservable=None, problem=None)
        if kept.kind is not ModelKind.ADAPTER:
            return kept
        config = adapter_config(parse_object(ADAPTER_CONFIG, (path / ADAPTER_CONFIG).read_bytes()))
    except (OSError, ValueError, TypeError, OverflowError, AttributeError):
        return None
    base = newest.serving.base or config.base
    return replace(kept, rank=config.rank, base_name=base, unservable=config.problem)


def _stored(record: FileRecord) -> StoredObject:
    created = datetime.fromtimestamp(record.modified_ns / 1e9, UTC)
    return StoredObject(record.object, record.size, record.generation, record.crc32c, created)
