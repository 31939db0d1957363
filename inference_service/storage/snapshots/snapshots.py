"""Snapshots: a model's files fetched into LOCAL_MODEL_CACHE (layout.py draws it), each checked as a whole.

One fetch per revision, however many ask, in this process and among those that share the directory. A
lock keeps the others from fetching the same; without it the result is as right, for every fetch writes
to a directory of its own and only a rename makes a snapshot of it. A fetch ends early with the last that
waits for it, and what has arrived stays for the next.
"""

import asyncio
import errno
import logging
import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from inference_service.checkpoints.snapshot import Snapshot
from inference_service.errors import CacheError, DiskFull, ServiceError, StoreUnavailable
from inference_service.storage.bucket.model import ListedModel
from inference_service.storage.bucket.store import Store, StoredObject
from inference_service.storage.snapshots.cache import Disk
from inference_service.storage.snapshots.cancellation import Cancelled, CancelToken
from inference_service.storage.snapshots.downloader import Downloader
from inference_service.storage.snapshots.layout import (
    FileRecord,
    Layout,
    Manifest,
    is_whole,
    revision_of,
    stagings,
    stagings_of,
    sync_directory,
)
from inference_service.storage.snapshots.locks import revision_lock
from inference_service.storage.snapshots.progress import Progress
from inference_service.storage.snapshots.staging import Coverage, IncomingFile, Staging
from inference_service.storage.snapshots.transfer import Job, Span, TransferConfig

logger = logging.getLogger(__name__)

LOG_SECONDS = 3.0
FETCHES_AT_ONCE = 16
POLL_INTERVAL = 0.2
_HOLD_ATTEMPTS = 5
HOLD_AGAIN_SECONDS = 0.05
_TAKEN_ATTEMPTS = 5


@dataclass(eq=False)
class _UnderWay:
    """A fetch in the threads, and how many tasks wait for it. The event loop's alone."""

    token: CancelToken
    work: Future[None]
    ended: asyncio.Event = field(default_factory=asyncio.Event)
    waiting: int = 0

    def cancel(self) -> None:
        self.token.cancel()
        self.work.cancel()  # what no thread has begun shall never begin


class SnapshotStore:
    """Fetches snapshots from one store into one directory."""

    def __init__(
        self, store: Store, layout: Layout, disk: Disk, config: TransferConfig | None = None
    ) -> None:
        self._store = store
        self._layout = layout
        self._disk = disk
        self._downloader = Downloader(store, config)
        self._under_way: dict[Path, _UnderWay] = {}
        self._progress: dict[Path, Progress] = {}
        # Its own: a fetch that takes for ever must not hold a listing or a parse.
        self._threads = ThreadPoolExecutor(FETCHES_AT_ONCE, thread_name_prefix="sync")
        self._lookers = ThreadPoolExecutor(1, thread_name_prefix="look")

    async def snapshot(self, model: ListedModel) -> Snapshot:
        """The verified snapshot of `model`, fetched unless it is there; held until `release`.

        Raises StoreError, CacheError and DiskFull; nothing half-written counts as a snapshot then. Cancelled,
        it ends the fetch unless others wait for that too.
        """
        target = self._layout.snapshot(model.name, model.revision)
        for _ in range(_HOLD_ATTEMPTS):
            await self._fetched_with_room(model, target)
            if self._disk.hold(target):
                return Snapshot(model.name, model.revision, target, model.bytes)
            await asyncio.sleep(HOLD_AGAIN_SECONDS)  # somebody looked whether it may go
        raise CacheError(f"The snapshot of '{model.name}' was removed as often as it was fetched.")

    async def kept(self, model: ListedModel) -> Path | None:
        """Where the model's snapshot lies, if it is on the disk already."""
        target = self._layout.snapshot(model.name, model.revision)
        loop = asyncio.get_running_loop()
        whole = await loop.run_in_executor(self._lookers, is_whole, target, model.objects)
        return target if whole else None

    def release(self, snapshot: Snapshot) -> None:
        """Nobody uses the snapshot any more that `snapshot` returned: it may be evicted."""
        self._disk.release(snapshot.path)

    def progress(self) -> list[Progress]:
        """The fetches under way."""
        return list(self._progress.values())

    def stats(self) -> dict[str, Any]:
        """Fetches under way, and the disk. Walks the cache directory: call it in a thread."""
        return {
            "syncs": [progress.describe() for progress in self.progress()],
            "disk": {"quota_bytes": self._disk.quota, "used_bytes": self._disk.used()},
        }

    async def _fetched_with_room(self, model: ListedModel, target: Path) -> None:
        """As `_fetched`; a fetch that is being stopped has its room on the disk a moment longer."""
        while True:
            stopping = [fetch for fetch in self._under_way.values() if fetch.token.cancelled]
            try:
                return await self._fetched(model, target)
            except DiskFull:
                if not stopping:
                    raise
                for fetch in stopping:
                    await fetch.ended.wait()

    async def _fetched(self, model: ListedModel, target: Path) -> None:
        """Wait for the fetch, a new one unless others wait for one; ends it if nobody else does."""
        fetch = await self._joined(model, target)
        fetch.waiting += 1
        try:
            await fetch.ended.wait()
        finally:
            fetch.waiting -= 1
            if fetch.waiting == 0:
                fetch.cancel()
        fetch.work.result()

    async def _joined(self, model: ListedModel, target: Path) -> _UnderWay:
        # One that is being stopped still writes; what it leaves is for the next to take over.
        while (fetch := self._under_way.get(target)) is not None and fetch.token.cancelled:
            await fetch.ended.wait()
        return fetch or self._begin(model, target)

    def _begin(self, model: ListedModel, target: Path) -> _UnderWay:
        loop, token = asyncio.get_running_loop(), CancelToken()
        fetch = _UnderWay(token, self._threads.submit(self.ensure, model, token))
        self._under_way[target] = fetch

        def over() -> None:
            del self._under_way[target]
            fetch.ended.set()

        fetch.work.add_done_callback(lambda _: _call_in(loop, over))
        return fetch

    def ensure(self, model: ListedModel, token: CancelToken | None = None) -> None:
        """Blocks until the snapshot is there; raises as `snapshot` does, and Withdrawn once `order` is."""
        target = self._layout.snapshot(model.name, model.revision)
        token = token or CancelToken()

        def whole() -> bool:
            token.check()
            return is_whole(target, model.objects)

        with _disk_errors(model.name, self._layout.root):
            if whole():
                return
            with revision_lock(target, whole) as alone:
                if not whole():
                    self._fetch_anyway(model, target, token, alone)

    def _fetch_anyway(self, model: ListedModel, target: Path, token: CancelToken, alone: bool) -> None:
        for attempt in range(_TAKEN_ATTEMPTS):
            try:
                return self._fetch(model, target, token, resume=alone and attempt == 0)
            except FileNotFoundError:
                # Where a lock does not reach (another machine), this staging directory may have been
                # taken for a dead one's. From now on leave everybody else's alone.
                logger.warning("the staging directory was removed", extra={"model": model.name})
        return self._fetch(model, target, token, resume=False)

    def _fetch(self, model: ListedModel, target: Path, token: CancelToken, *, resume: bool) -> None:
        self._disk.clear(left for left in stagings_of(target.parent) if revision_of(left) != target.name)
        staging = Staging(target)
        progress = Progress(model.name, model.revision, model.bytes)
        self._progress[target] = progress
        try:
            reused = staging.reuse(self._siblings(target), model.objects, token)
            progress.skip(sum(stored.size for stored in reused))
            wanted = [stored for stored in model.objects if stored not in reused]
            count = sum(stored.size for stored in wanted)
            with self._disk.reserved(model.name, target, staging.path, count):
                leftovers = stagings(target) if resume else []
                self._fill(wanted, leftovers, staging, progress, token)
                records = {stored.filename: self._record(stored, staging.path) for stored in model.objects}
                staging.seal(Manifest(records))
                self._put_in_place(staging.path, target, model)
        except Cancelled:
            staging.leave()
            _log(progress, "nobody waits for it any more")
            raise
        except (StoreUnavailable, KeyboardInterrupt):
            staging.leave()
            raise
        except BaseException:
            staging.discard()
            raise
        finally:
            del self._progress[target]
        _log(progress, "fetched")

    def _fill(
        self,
        wanted: list[StoredObject],
        leftovers: list[Path],
        staging: Staging,
        progress: Progress,
        token: CancelToken,
    ) -> None:
        """Fetch and verify the files `wanted`, but for what `leftovers` of this revision have of them."""
        files = {stored.filename: IncomingFile(stored, staging.path / stored.filename) for stored in wanted}
        covered = {name: Coverage() for name in files}
        try:
            for leftover in leftovers:
                if leftover != staging.path:
                    for stretch in staging.salvage(leftover, files, covered, token):
                        progress.skip(stretch.bytes)
            token.check()
        except BaseException:
            for file in files.values():
                file.close()
            raise
        spans = []
        for file in sorted(files.values(), key=lambda file: -file.stored.size):
            gaps = covered[file.name].gaps(file.stored.size)
            file.missing = sum(end - start for start, end in gaps)
            spans += [Span(file, start, end) for start, end in gaps]
        self._await(self._downloader.move(spans, progress, staging.note), progress, token)

    def _await(self, job: Job, progress: Progress, token: CancelToken) -> None:
        """Watch over the job until it has ended; raises its error, and Withdrawn once nobody wants it."""
        try:
            self._watch(job, progress, token)
        except BaseException as error:  # Withdrawn, or Ctrl-C
            self._downloader.stop(job, error)
            raise
        if job.error is not None:
            # Connections that are in the middle of a piece still have its file open: the disk gets its room
            # back when they have left.
            self._downloader.stop(job, job.error)
            raise job.error

    def _watch(self, job: Job, progress: Progress, token: CancelToken) -> None:
        poll = min(POLL_INTERVAL, self._downloader.config.stall_seconds / 4)
        logged = time.monotonic()
        while not job.ended.wait(poll):
            token.check()
            self._downloader.watch(job)
            if time.monotonic() - logged >= LOG_SECONDS:
                logged = time.monotonic()
                _log(progress, "fetching")

    def _put_in_place(self, staging: Path, target: Path, model: ListedModel) -> None:
        sync_directory(staging)
        try:
            # Another process may have been faster.
            if is_whole(target, model.objects):
                shutil.rmtree(staging, ignore_errors=True)
            else:
                self._disk.replace(target, staging)
        except OSError:
            if not is_whole(target, model.objects):
                raise
            shutil.rmtree(staging, ignore_errors=True)

    def _siblings(self, target: Path) -> list[Path]:
        """Other revisions of the model: what did not change need not come again."""
        return [path for path in self._layout.snapshots() if path.parent == target.parent and path != target]

    def _record(self, stored: StoredObject, staging: Path) -> FileRecord:
        modified_ns = (staging / stored.filename).stat().st_mtime_ns
        return FileRecord(
            stored.name, stored.generation, stored.size, self._store.checksum(stored), modified_ns
        )


def _call_in(loop: asyncio.AbstractEventLoop, callback: Callable[[], None]) -> None:
    with suppress(RuntimeError):  # the loop is closed: nobody waits there any more
        loop.call_soon_threadsafe(callback)


def _log(progress: Progress, message: str) -> None:
    described = progress.describe()
    described["mib_per_second"] = round(described.pop("bytes_per_second") / (1 << 20), 1)
    logger.info(message, extra=described)


@contextmanager
def _disk_errors(model: str, cache: Path) -> Iterator[None]:
    """Translate a failing cache directory (full, read-only) into an error with its path."""
    try:
        yield
    except ServiceError:
        raise
    except OSError as error:
        kind = DiskFull if error.errno in (errno.ENOSPC, errno.EDQUOT) else CacheError
        raise kind(
            f"The model '{model}' could not be stored in LOCAL_MODEL_CACHE ({cache}): "
            f"{error.strerror or error}. Nothing half-written was kept."
        ) from error
