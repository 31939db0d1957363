"""Names: which models the bucket holds, and which one a client means.

A model is a directory below the prefix that holds `config.json` (a checkpoint) or
`adapter_config.json` (an adapter). Its name is its path below the prefix with hyphens for slashes, and a
client may write it either way: `org/model` and `org-model` are one model. Fetching is sync.py's.
"""

import asyncio
import hashlib
import logging
import time
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from pathlib import PurePosixPath

from inference_service.errors import ModelNotFound, ModelNotServable, StoreError
from inference_service.storage.store import Store, StoredObject

logger = logging.getLogger(__name__)

LISTING_SECONDS = 30.0
# A name that the cached listing lacks may have been uploaded just now; look again, but not for
# every wrong name.
MISS_LISTING_SECONDS = 2.0
_MARKERS = {"config.json": "checkpoint", "adapter_config.json": "adapter"}
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
# What serving needs. Pickles and Python files are never fetched: loading either would run them.
_SERVED_SUFFIXES = (".safetensors", ".json", ".jinja", ".txt", ".model", ".tiktoken", ".vocab")
_NOT_SERVED = ("serving.json", "trainer_state.json", "training_args.json")


class ModelKind(StrEnum):
    CHECKPOINT = "checkpoint"
    ADAPTER = "adapter"


@dataclass(frozen=True)
class Model:
    """One model in the bucket at one revision.

    `objects` are the files that serving needs; `unservable` says why it cannot be served, if it cannot.
    """

    name: str
    kind: ModelKind
    directory: str
    revision: str
    objects: tuple[StoredObject, ...]
    created: datetime
    unservable: str | None = None

    @property
    def bytes(self) -> int:
        return sum(stored.size for stored in self.objects)


def canonical_name(name: str) -> str:
    """`org/model` -> `org-model`."""
    return name.strip("/").replace("/", "-")


class Catalog:
    """The listing of the prefix as models, kept for LISTING_SECONDS, refreshed once at a time."""

    def __init__(self, store: Store, prefix: str) -> None:
        self._store = store
        self._prefix = prefix
        self._models: dict[str, Model] = {}
        self._listed_at: float | None = None
        self._refreshing: asyncio.Task[None] | None = None

    @property
    def listed(self) -> list[Model]:
        """All models by name as they were last listed; the store is not asked."""
        return list(self._models.values())

    async def models(self) -> list[Model]:
        """All models by name; raises StoreError."""
        await self._refresh_after(LISTING_SECONDS)
        return self.listed

    async def resolve(self, name: str) -> Model:
        """The servable model that a client means by `name`.

        Raises ModelNotFound, ModelNotServable and StoreError.
        """
        model = await self.find(name)
        if model.unservable is not None:
            raise ModelNotServable(model.name, model.unservable)
        return model

    async def find(self, name: str) -> Model:
        """As `resolve`, also for a model that cannot be served."""
        wanted = canonical_name(name)
        if wanted in self._models:
            # A known model never waits for the bucket: a stale listing is renewed behind it.
            self._refresh_if_older(LISTING_SECONDS)
        else:
            await self._refresh_after(MISS_LISTING_SECONDS)
        if wanted not in self._models:
            raise ModelNotFound(name)
        return self._models[wanted]

    async def _refresh_after(self, seconds: float) -> None:
        refreshing = self._refresh_if_older(seconds)
        if refreshing is not None:
            # Shielded: one client that leaves must not end the listing that others wait for.
            await asyncio.shield(refreshing)

    def _refresh_if_older(self, seconds: float) -> asyncio.Task[None] | None:
        if self._listed_at is not None and time.monotonic() - self._listed_at < seconds:
            return None
        if self._refreshing is None:
            self._refreshing = asyncio.create_task(self._refresh())
        return self._refreshing

    async def _refresh(self) -> None:
        try:
            objects = await asyncio.to_thread(self._store.list, self._prefix)
            self._models = models_in(objects, self._prefix)
        except StoreError as error:
            if self._listed_at is None:
                raise
            # What is loaded and cached goes on being served while the bucket cannot be reached.
            logger.warning("the old listing is kept: %s", error)
        finally:
            self._refreshing = None
        self._listed_at = time.monotonic()


def models_in(objects: list[StoredObject], prefix: str) -> dict[str, Model]:
    """The models that a listing of `prefix` shows, by name."""
    directories: dict[str, list[StoredObject]] = {}
    for stored in objects:
        directory = str(PurePosixPath(stored.name.removeprefix(prefix)).parent)
        directories.setdefault(directory, []).append(stored)
    models: dict[str, Model] = {}
    for directory, files in sorted(directories.items()):
        model = _model(directory, files)
        if model is not None:
            # The first directory of a name wins, in the order of the listing.
            models.setdefault(model.name, model)
    return dict(sorted(models.items()))


def _model(directory: str, files: list[StoredObject]) -> Model | None:
    names = {PurePosixPath(stored.name).name: stored for stored in files}
    marker = next((name for name in _MARKERS if name in names), None)
    if marker is None or directory == ".":
        return None
    kind = ModelKind(_MARKERS[marker])
    served = tuple(sorted((names[name] for name in names if _is_served(name)), key=_by_name))
    return Model(
        name=canonical_name(directory),
        kind=kind,
        directory=directory,
        revision=_fingerprint(served),
        objects=served,
        created=max(stored.created for stored in files),
        unservable=_why_unservable(kind, set(names)),
    )


def _by_name(stored: StoredObject) -> str:
    return stored.name


def _is_served(name: str) -> bool:
    return name.endswith(_SERVED_SUFFIXES) and name not in _NOT_SERVED


def _why_unservable(kind: ModelKind, names: set[str]) -> str | None:
    if kind is ModelKind.ADAPTER:
        return "it is a LoRA adapter, and this version serves checkpoints only."
    if any(name.endswith(".safetensors") for name in names):
        return None
    pickles = sorted(name for name in names if name.endswith(_PICKLES))
    if pickles:
        return (
            f"its weights are pickles ({pickles[0]}), which run code when they are loaded. "
            "Save it with safe_serialization=True and upload the safetensors files."
        )
    return "it has no *.safetensors file; the upload may not be complete."


def _fingerprint(files: tuple[StoredObject, ...]) -> str:
    """Twelve hex digits over every file's name, generation and checksum."""
    digest = hashlib.sha256()
    for stored in files:
        digest.update(f"{stored.name}\0{stored.generation}\0{stored.crc32c}\n".encode())
    return digest.hexdigest()[:12]
