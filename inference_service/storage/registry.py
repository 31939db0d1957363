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
from inference_service.checkpoints.snapshot import Snapshot
from inference_service.errors import ModelNotServable, ObjectReplaced, ServiceError, SnapshotCorrupt
from inference_service.storage.bucket.catalog import Catalog, RevisionNotFound
from inference_service.storage.bucket.directory import DirectoryStore
from inference_service.storage.bucket.documents import parse_object
from inference_service.storage.bucket.model import ADAPTER_CONFIG, Model, ModelKind
from inference_service.storage.bucket.store import Store, StoredObject
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
    """The catalog, the preflight and the sync of one bucket, in the order in which a model needs them."""

    def __init__(
        self,
        catalog: Catalog,
        preflight: Preflight,
        snapshots: SnapshotStore,
        layout: Layout,
        verifier: Verifier,
    ) -> None:
        self.catalog = catalog
        self.snapshots = snapshots
        self._preflight = preflight
        self._layout = layout
        self._verifier = verifier

    async def resolve(self, name: str) -> Model:
        """The model that a client means, known to be servable before anything of it is downloaded.

        Raises ModelNotFound, ModelNotServable, DiskFull and StoreError.
        """
        model = await self.find(name)
        await self.examine(model)
        return model

    async def find(self, name: str) -> Model:
        """As `resolve`, also for a model that cannot be served.

        A revision that the bucket does not hold any more is found while its snapshot is on the disk.
        """
        try:
            model = await self.catalog.find(name)
        except RevisionNotFound as error:
            kept = await self.kept(error.newest, error.revision)
            if kept is None:
                raise
            return replace(kept, exact=True)
        return await self._placed(model)

    async def _placed(self, model: Model) -> Model:
        """The model with what its engine must be: an adapter's base, the rank of a base's adapters."""
        if model.unservable is not None:
            return model
        if model.kind is ModelKind.CHECKPOINT:
            return replace(model, rank=await self._rank(model))
        base = await self.catalog.base_of(model)
        rank = 0 if base.unservable else await self._rank(base)
        return replace(model, base_model=replace(base, rank=rank))

    async def _rank(self, base: Model) -> int:
        limit = base.serving.max_lora_rank
        ranks = [each.rank for each in await self.catalog.adapters_of(base)]
        return engine_rank(max((rank for rank in ranks if limit is None or rank <= limit), default=0), limit)

    async def kept(self, newest: Model, revision: str) -> Model | None:
        """Another revision of a model, as its snapshot on the disk shows it; None where there is none.

        How it is served is what the bucket says of its newest revision.
        """
        path = self._layout.snapshot(newest.name, revision)
        if path.parent.parent != self._layout.root:
            return None
        kept = await asyncio.to_thread(_kept, newest, revision, path)
        return None if kept is None else await self._placed(kept)

    async def kept_instead(self, model: Model) -> Model | None:
        """The revision on the disk that was used last and is not this one; None where none can be served."""
        for revision in await self.kept_revisions(model.name):
            found = None if revision == model.revision else await self.kept(model, revision)
            if found is not None:
                try:
                    await self.examine(found)
                except ServiceError:
                    continue
                return found
        return None

    async def kept_revisions(self, name: str) -> list[str]:
        """The revisions of a model that are on the disk, the one that was used last first."""
        return await asyncio.to_thread(self._layout.revisions, name)

    async def examine(self, model: Model) -> None:
        """Returns for a model that can be served; raises ModelNotServable, DiskFull and StoreError."""
        if model.unservable is not None:
            raise ModelNotServable(model.name, model.unservable)
        if model.base_model is not None:
            try:
                await self.examine(model.base_model)
            except ModelNotServable as error:
                raise ModelNotServable(model.name, f"of its base: {error.message}") from error
        try:
            await self._preflight.examine(model)
        except ObjectReplaced:
            self.catalog.forget()
            raise

    def shape(self, model: Model) -> MemoryProfile:
        """What the model takes in memory; where it was not examined, as much as on the disk."""
        return self._preflight.shape(model) or MemoryProfile("", model.bytes)

    def swap_key(self, model: Model) -> str | None:
        """Models with the same can take one another's place in an engine; None: it is loaded afresh."""
        return self._preflight.swap_key(model)

    def architectures(self, model: Model) -> tuple[str, ...]:
        """The architectures of a model that was examined."""
        return self._preflight.architectures(model)

    async def newest_architectures(self, count: int) -> set[str]:
        """The architectures of the checkpoints that were uploaded last; what cannot be told is left out."""
        models = [each for each in await self.catalog.described() if each.kind is ModelKind.CHECKPOINT]
        newest = sorted(models, key=lambda each: each.created, reverse=True)[:count]
        found: set[str] = set()
        for model in newest:
            try:
                await self.examine(model)
            except ServiceError:
                continue
            found |= set(self.architectures(model))
        return found

    def fetching(self, model: Model) -> Progress | None:
        """How far the fetch of the model is; None while none is under way."""
        under_way = (progress for progress in self.snapshots.progress() if progress.model == model.name)
        return next(under_way, None)

    async def fetch(self, model: Model, entered: Callable[[str], None] = lambda phase: None) -> Snapshot:
        """The model's snapshot, held until `release`, every byte of it verified.

        `entered` is told the phases: list, sync, verify. Raises StoreError, CacheError, DiskFull, and
        ObjectReplaced where the bucket holds another revision by now.
        """
        entered("list")
        # It may have been let through because another revision was loaded, which is gone.
        await self.examine(model)
        try:
            snapshot = await self._verified(model, entered)
        except SnapshotCorrupt as error:
            # What was right when it came has been damaged on the disk since.
            logger.warning("fetching it anew: %s", error, extra={"model": model.name})
            snapshot = await self._verified(model, entered)
        except ObjectReplaced:
            self.catalog.forget()
            raise
        return replace(snapshot, adapter_rank=model.rank if model.kind is ModelKind.CHECKPOINT else 0)

    async def _verified(self, model: Model, entered: Callable[[str], None]) -> Snapshot:
        entered("sync")
        kept = await self.snapshots.kept(model)
        snapshot = await self.snapshots.snapshot(model)
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
        """No engine uses the snapshot any more."""
        self.snapshots.release(snapshot)


def _kept(newest: Model, revision: str, path: Path) -> Model | None:
    """The model as the snapshot in `path` has it; None where that is none, or damaged."""
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
    return replace(kept, rank=config.rank, base=base, unservable=config.problem)


def _stored(record: FileRecord) -> StoredObject:
    created = datetime.fromtimestamp(record.modified_ns / 1e9, UTC)
    return StoredObject(record.object, record.size, record.generation, record.crc32c, created)
