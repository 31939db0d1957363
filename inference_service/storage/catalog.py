"""Names: which models the bucket holds, and which one a client means.

A model is a directory below the prefix that holds `config.json` (a checkpoint) or
`adapter_config.json` (an adapter). Its name is its path below the prefix with hyphens for slashes, and a
client may write it either way: `org/model` and `org-model` are one model. `model@revision` names one
revision of it. Fetching is sync.py's.
"""

import asyncio
import hashlib
import itertools
import logging
import re
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from datetime import datetime
from enum import StrEnum

from inference_service.errors import ModelNotFound, ModelNotServable, StoreError
from inference_service.storage.store import Store, StoredObject

logger = logging.getLogger(__name__)

LISTING_SECONDS = 30.0
# A name that the cached listing lacks may have been uploaded just now; look again, but not for
# every wrong name.
MISS_LISTING_SECONDS = 2.0
_MARKERS = {"config.json": "checkpoint", "adapter_config.json": "adapter"}
MAX_NAME_CHARACTERS = 200
_NAME = re.compile(rf"[A-Za-z0-9][A-Za-z0-9._-]{{0,{MAX_NAME_CHARACTERS - 1}}}")
_SHARD = re.compile(r"(?P<stem>.+)-(?P<number>\d{5,6})-of-(?P<count>\d{5,6})\.safetensors")
_TOKENIZERS = frozenset({"tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "tekken.json"})
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
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="list")

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

    def forget(self) -> None:
        """The listing is known to be old: the next request lists again."""
        self._listed_at = None if not self._models else float("-inf")

    async def find(self, name: str) -> Model:
        """As `resolve`, also for a model that cannot be served."""
        wanted, _, revision = canonical_name(name).partition("@")
        if wanted in self._models:
            # A known model never waits for the bucket: a stale listing is renewed behind it.
            self._refresh_if_older(LISTING_SECONDS)
        else:
            await self._refresh_after(MISS_LISTING_SECONDS)
        if wanted not in self._models:
            raise ModelNotFound(name)
        model = self._models[wanted]
        if revision and model.revision != revision:
            raise ModelNotFound(name, f"The bucket holds revision {model.revision} of it.")
        return model

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
            loop = asyncio.get_running_loop()
            objects = await loop.run_in_executor(self._thread, self._store.list, self._prefix)
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
    astray: dict[str, str] = {}
    for stored in objects:
        segments = stored.name.removeprefix(prefix).split("/")
        safe = list(itertools.takewhile(_is_safe, segments))
        if len(safe) < len(segments):
            astray["/".join(safe)] = stored.name
        else:
            directories.setdefault("/".join(segments[:-1]), []).append(stored)
    models: dict[str, Model] = {}
    for directory, files in sorted(directories.items()):
        model = _model(directory, files, astray.get(directory))
        if model is not None:
            models[model.name] = _only(models.get(model.name), model)
    return dict(sorted(models.items()))


def _is_safe(segment: str) -> bool:
    """Whether a part of an object's name is a plain name of a file or directory."""
    return segment not in ("", ".", "..") and "\\" not in segment and segment.isprintable()


def _only(other: Model | None, model: Model) -> Model:
    """Two directories of one name are neither of them served: nobody can say which is meant."""
    if other is None:
        return model
    clash = f"the directories {other.directory} and {model.directory} have the same name; rename one."
    return replace(model, unservable=clash)


def _model(directory: str, files: list[StoredObject], astray: str | None) -> Model | None:
    names = {stored.name.rpartition("/")[2]: stored for stored in files}
    marker = next((name for name in _MARKERS if name in names), None)
    if marker is None or not directory:
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
        unservable=_why_misnamed(directory, astray) or _why_unservable(kind, set(names)),
    )


def _why_misnamed(directory: str, astray: str | None) -> str | None:
    if astray is not None:
        return f"the object name {astray!r} would leave its directory; delete that object."
    if not _NAME.fullmatch(canonical_name(directory)):
        return (
            "its name may hold letters, digits, '.', '_' and '-' only, begin with a letter or digit, and "
            f"be at most {MAX_NAME_CHARACTERS} characters long; rename its directory."
        )
    return None


def _by_name(stored: StoredObject) -> str:
    return stored.name


def _is_served(name: str) -> bool:
    return name.endswith(_SERVED_SUFFIXES) and name not in _NOT_SERVED


def _why_unservable(kind: ModelKind, names: set[str]) -> str | None:
    if kind is ModelKind.ADAPTER:
        return "it is a LoRA adapter, and this version serves checkpoints only."
    weights = sorted(name for name in names if name.endswith(".safetensors"))
    if weights:
        missing = _missing_shard(weights) or _missing_tokenizer(names)
        return f"the upload is not complete: {missing} is missing." if missing else None
    pickles = sorted(name for name in names if name.endswith(_PICKLES))
    if pickles:
        return (
            f"its weights are pickles ({pickles[0]}), which run code when they are loaded. "
            "Save it with safe_serialization=True and upload the safetensors files."
        )
    return "it has no *.safetensors file; the upload may not be complete."


def _missing_shard(weights: list[str]) -> str | None:
    """The first shard that the names of the others promise (`model-00001-of-00004.safetensors`)."""
    for found in filter(None, map(_SHARD.fullmatch, weights)):
        digits = len(found["number"])
        for number in range(1, int(found["count"]) + 1):
            name = f"{found['stem']}-{number:0{digits}}-of-{found['count']}.safetensors"
            if name not in weights:
                return name
    return None


def _missing_tokenizer(names: set[str]) -> str | None:
    return None if names & _TOKENIZERS else "tokenizer.json"


def _fingerprint(files: tuple[StoredObject, ...]) -> str:
    """Twelve hex digits over every file's name, generation and checksum."""
    digest = hashlib.sha256()
    for stored in files:
        digest.update(f"{stored.name}\0{stored.generation}\0{stored.crc32c}\n".encode())
    return digest.hexdigest()[:12]
