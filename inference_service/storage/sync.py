"""Snapshots: a model's files fetched into LOCAL_MODEL_CACHE, each checked as a whole.

    LOCAL_MODEL_CACHE/
      my-model/
        3f2a9c0d1e5b/             a snapshot: one revision, complete and verified
          config.json  model.safetensors  ...
          .manifest.json          written last; only with it is the directory a snapshot
        .incomplete-3f2a9c0d1e5b-<random>/   a fetch under way, or what a killed one left

A file's existence proves nothing, only the manifest does.
"""

import asyncio
import json
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

import google_crc32c

from inference_service.engines.base import Snapshot
from inference_service.errors import SnapshotCorrupt, StoreError
from inference_service.storage.catalog import Model
from inference_service.storage.store import CHUNK_BYTES, Store, StoredObject

logger = logging.getLogger(__name__)

MANIFEST = ".manifest.json"
_INCOMPLETE = ".incomplete-"
PROGRESS_SECONDS = 3.0
ABANDONED_SECONDS = 3600.0
FETCHES_AT_ONCE = 16


class Sync:
    """Fetches snapshots from one store into one directory."""

    def __init__(self, store: Store, cache: Path) -> None:
        self._store = store
        self._cache = cache
        self._under_way: dict[Path, asyncio.Future[Snapshot]] = {}
        # Its own: a fetch that takes for ever must not hold a listing or a parse.
        self._threads = ThreadPoolExecutor(FETCHES_AT_ONCE, thread_name_prefix="fetch")

    async def snapshot(self, model: Model) -> Snapshot:
        """The verified snapshot of `model`, fetched unless it is there; one fetch however many ask.

        Raises StoreError and SnapshotCorrupt; nothing half-written stays behind then.
        """
        target = self._cache / model.name / model.revision
        fetching = self._under_way.get(target)
        if fetching is None:
            loop = asyncio.get_running_loop()
            fetching = loop.run_in_executor(self._threads, self._ensure, model, target)
            self._under_way[target] = fetching
            fetching.add_done_callback(lambda _: self._under_way.pop(target, None))
        return await asyncio.shield(fetching)

    def _ensure(self, model: Model, target: Path) -> Snapshot:
        if not _is_whole(target, model):
            with _disk_errors(model, self._cache):
                self._fetch(model, target)
        return Snapshot(model.name, model.revision, target, model.bytes)

    def _fetch(self, model: Model, target: Path) -> None:
        target.parent.mkdir(parents=True, exist_ok=True)
        _sweep_abandoned(target.parent)
        staging = Path(tempfile.mkdtemp(prefix=f"{_INCOMPLETE}{model.revision}-", dir=target.parent))
        try:
            progress = _Progress(model)
            sums = {
                PurePosixPath(stored.name).name: self._fetch_file(stored, staging, progress)
                for stored in model.objects
            }
            _write_durably(staging / MANIFEST, json.dumps(sums, indent=1).encode())
            _sync_directory(staging)
            _put_in_place(staging, target, model)
        finally:
            shutil.rmtree(staging, ignore_errors=True)

    def _fetch_file(self, stored: StoredObject, staging: Path, progress: "_Progress") -> str:
        path = staging / PurePosixPath(stored.name).name
        fetched = google_crc32c.Checksum()
        with path.open("wb") as file:
            for chunk in self._store.read(stored):
                fetched.update(chunk)
                file.write(chunk)
                progress.advance(len(chunk))
            file.flush()
            os.fsync(file.fileno())
        expected = int.from_bytes(fetched.digest(), "big") if stored.crc32c is None else stored.crc32c
        _verify(path, stored, expected)
        return f"{expected:08x}"


class _Progress:
    """Logs bytes, percentage and rate of one fetch every few seconds."""

    def __init__(self, model: Model) -> None:
        self._model = model
        self._done = 0
        self._started = self._logged = time.monotonic()

    def advance(self, count: int) -> None:
        self._done += count
        now = time.monotonic()
        if now - self._logged < PROGRESS_SECONDS and self._done < self._model.bytes:
            return
        self._logged = now
        logger.info(
            "fetched" if self._done >= self._model.bytes else "fetching",
            extra={
                "model": self._model.name,
                "revision": self._model.revision,
                "bytes": self._done,
                "percent": round(100 * self._done / max(1, self._model.bytes)),
                "mib_per_second": round(self._done / (1 << 20) / max(1e-3, now - self._started)),
            },
        )


def _is_whole(target: Path, model: Model) -> bool:
    """A snapshot: it has its manifest, and nobody has taken or cut a file since."""
    if not (target / MANIFEST).is_file():
        return False
    try:
        sizes = [(target / PurePosixPath(stored.name).name).stat().st_size for stored in model.objects]
    except FileNotFoundError:
        return False
    return sizes == [stored.size for stored in model.objects]


def _sweep_abandoned(directory: Path) -> None:
    """Remove what killed fetches left: staging that nobody has written to for an hour.

    Anything younger may be another process's, whose fetch must not lose its files.
    """
    for staging in directory.glob(f"{_INCOMPLETE}*"):
        newest = max((path.stat().st_mtime for path in (staging, *staging.iterdir())), default=0.0)
        if time.time() - newest > ABANDONED_SECONDS:
            shutil.rmtree(staging, ignore_errors=True)


def _verify(path: Path, stored: StoredObject, expected: int) -> None:
    """Check the file on disk as a whole against the store's sum; raises SnapshotCorrupt."""
    found = google_crc32c.Checksum()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            found.update(chunk)
    actual = int.from_bytes(found.digest(), "big")
    size = path.stat().st_size
    if actual != expected or size != stored.size:
        raise SnapshotCorrupt(
            f"{stored.name} arrived damaged: crc32c {actual:08x} over {size} bytes, the store "
            f"holds {expected:08x} over {stored.size} bytes. Nothing of it was kept; try again."
        )


def _put_in_place(staging: Path, target: Path, model: Model) -> None:
    # What is not whole is nobody's snapshot; another process may have been faster.
    if target.exists() and not _is_whole(target, model):
        shutil.rmtree(target)
    try:
        staging.rename(target)
    except OSError:
        if not _is_whole(target, model):
            raise
    _sync_directory(target.parent)


def _write_durably(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _disk_errors(model: Model, cache: Path) -> Iterator[None]:
    """Translate a failing cache directory (full, read-only) into an error with its path."""
    try:
        yield
    except OSError as error:
        raise StoreError(
            f"The model '{model.name}' could not be stored in LOCAL_MODEL_CACHE "
            f"({cache}): {error.strerror or error}"
        ) from error
