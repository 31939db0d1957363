"""The bucket as a registry: from the name that a client uses to a snapshot that an engine can load."""

from pathlib import Path

from inference_service.engines.base import Snapshot
from inference_service.errors import ModelNotServable, ObjectReplaced
from inference_service.storage.catalog import Catalog
from inference_service.storage.directory import DirectoryStore
from inference_service.storage.model import Model
from inference_service.storage.preflight import Preflight
from inference_service.storage.progress import Progress
from inference_service.storage.shape import Shape
from inference_service.storage.store import Store
from inference_service.storage.sync import Sync

FILE_SCHEME = "file://"
REPLACED_ATTEMPTS = 3


def open_store(bucket: str) -> Store:
    """The store that GCS_BUCKET names; nothing is contacted yet."""
    if bucket.startswith(FILE_SCHEME):
        return DirectoryStore(Path(bucket.removeprefix(FILE_SCHEME)))
    # Imported only here: half a second that file:// does not need.
    from inference_service.storage.gcs import GcsStore

    return GcsStore(bucket)


class Registry:
    """The catalog, the preflight and the sync of one bucket, in the order in which a model needs them."""

    def __init__(self, catalog: Catalog, preflight: Preflight, sync: Sync) -> None:
        self.catalog = catalog
        self.sync = sync
        self._preflight = preflight

    async def resolve(self, name: str) -> Model:
        """The model that a client means, known to be servable before anything of it is downloaded.

        Raises ModelNotFound, ModelNotServable, DiskFull and StoreError.
        """
        model = await self.catalog.find(name)
        await self.examine(model)
        return model

    async def examine(self, model: Model) -> None:
        """Returns for a model that can be served; raises ModelNotServable, DiskFull and StoreError."""
        if model.unservable is not None:
            raise ModelNotServable(model.name, model.unservable)
        await self._preflight.examine(model)

    def shape(self, model: Model) -> Shape:
        """What the model takes in memory; where it was not examined, as much as on the disk."""
        return self._preflight.shape(model) or Shape("", model.bytes)

    def fetching(self, model: Model) -> Progress | None:
        """How far the fetch of the model is; None while none is under way."""
        under_way = (progress for progress in self.sync.progress() if progress.model == model.name)
        return next(under_way, None)

    async def fetch(self, model: Model) -> Snapshot:
        """The model's snapshot, held until `release`; raises StoreError, CacheError and DiskFull.

        Where the bucket's objects are replaced meanwhile the whole new revision is fetched, never a mix;
        but a client that named the revision gets no other.
        """
        # It may have been let through because another revision was loaded, which is gone.
        await self.examine(model)
        for attempt in range(1, REPLACED_ATTEMPTS + 1):
            try:
                return await self.sync.snapshot(model)
            except ObjectReplaced:
                self.catalog.forget()
                if model.exact or attempt == REPLACED_ATTEMPTS:
                    raise
                model = await self.resolve(model.name)
        raise AssertionError  # the last attempt returned or raised

    def release(self, snapshot: Snapshot) -> None:
        """No engine uses the snapshot any more."""
        self.sync.release(snapshot)
