"""Snapshots: model files fetched into LOCAL_MODEL_CACHE (see layout.py), each verified as a whole.

Each revision is fetched once, in this process and across processes that share the directory. A lock
prevents duplicate fetches. Correctness does not depend on it: every fetch writes to its own directory, and
only a rename makes that a snapshot. A fetch is cancelled when no task waits for it, and the next one resumes
from what has arrived.
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
    Layout,
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
    """A running fetch and the number of tasks that wait for it. Used only in the event loop."""

    token: CancelToken
    work: Future[None]
    ended: asyncio.Event = field(default_factory=asyncio.Event)
    waiting: int = 0

    def cancel(self) -> None:
        self.token.cancel()
        self.work.cancel()  # work that no thread has started must not start


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
        # Separate pools: a fetch that hangs must not block listings or parsing.
        self._threads = ThreadPoolExecutor(FETCHES_AT_ONCE, thread_name_prefix="sync")
        self._lookers = ThreadPoolExecutor(1, thread_name_prefix="look")

    async def snapshot(self, model: ListedModel) -> Snapshot:
        """The verified snapshot of `model`, fetched if necessary; held until `release`.

        Raises StoreError, CacheError and DiskFull; a partial fetch never counts as a snapshot. Cancelling
        this task ends the fetch unless other tasks wait for it.
        """
        target = self._layout.snapshot(model.name, model.revision)
        for _ in range(_HOLD_ATTEMPTS):
            await self._fetched_with_room(model, target)
            if self._disk.hold(target):
                return Snapshot(model.name, model.revision, target, model.bytes)
            await asyncio.sleep(HOLD_AGAIN_SECONDS)  # another process was checking whether it can be evicted
        raise CacheError(
            f"The snapshot of '{model.name}' was fetched and removed {_HOLD_ATTEMPTS} times in a row. Does "
            "another process remove files from LOCAL_MODEL_CACHE?"
        )

    async def kept(self, model: ListedModel) -> Path | None:
        """The path of the model's snapshot, if it is on disk."""
        target = self._layout.snapshot(model.name, model.revision)
        loop = asyncio.get_running_loop()
        whole = await loop.run_in_executor(self._lookers, is_whole, target, model.objects)
        return target if whole else None

    def hold(self, snapshot: Snapshot) -> bool:
        """Hold a snapshot once more, until `release`; False if it is gone."""
        return self._disk.hold(snapshot.path)

    @property
    def in_memory(self) -> bool:
        """Whether the snapshots are in memory already."""
        return self._disk.in_memory

    def release(self, snapshot: Snapshot) -> None:
        """Release a snapshot returned by `snapshot`; it may then be evicted."""
        self._disk.release(snapshot.path)

    def progress(self) -> list[Progress]:
        """The fetches in progress."""
        return list(self._progress.values())

    def stats(self) -> dict[str, Any]:
        """Fetches in progress and disk usage. Walks the cache directory: call it in a thread."""
        return {
            "syncs": [progress.describe() for progress in self.progress()],
            "disk": {"quota_bytes": self._disk.quota, "used_bytes": self._disk.used()},
        }

    async def _fetched_with_room(self, model: ListedModel, target: Path) -> None:
        """Like `_fetched`, but waits for fetches being stopped, which still hold their disk space."""
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
        """Join or start the fetch and wait for it; cancels it if no other task waits."""
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
        # A fetch that is being stopped still writes; the next one resumes from what it leaves.
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
        """Blocks until the snapshot is there; raises like `snapshot`, and Cancelled once `token` is."""
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
                # Locks may not reach another machine, which may have removed this staging directory as a
                # leftover. Do not touch the staging directories of others from now on.
                logger.warning("the staging directory was removed", extra={"model": model.name})
        return self._fetch(model, target, token, resume=False)

    def _fetch(self, model: ListedModel, target: Path, token: CancelToken, *, resume: bool) -> None:
        self._disk.clear(left for left in stagings_of(target.parent) if revision_of(left) != target.name)
        staging = Staging(target)
        progress = Progress(model.name, model.revision, model.bytes)
        self._progress[target] = progress
        try:
            wanted = staging.reuse(self._siblings(target), model.objects, token)
            count = sum(stored.size for stored in wanted)
            progress.skip(model.bytes - count)
            with self._disk.reserved(model.name, target, staging.path, count):
                leftovers = stagings(target) if resume else []
                self._fill(wanted, leftovers, staging, progress, token)
                staging.seal()
                self._put_in_place(staging.path, target, model)
        except Cancelled:
            staging.leave()
            _log(progress, "fetch cancelled: no request waits for it")
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
        """Fetch and verify the `wanted` files, reusing what `leftovers` of this revision contain."""
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
        for file in files.values():
            if file.checksums is not None:
                staging.verified(file.stored, file.checksums)

    def _await(self, job: Job, progress: Progress, token: CancelToken) -> None:
        """Watch the job until it ends; raises its error, and Cancelled once `token` is."""
        try:
            self._watch(job, progress, token)
        except BaseException as error:  # Cancelled, or Ctrl-C
            self._downloader.stop(job, error)
            raise
        if job.error is not None:
            # Connections in the middle of a part still have its file open: the disk space is free only after
            # they have ended.
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
            # Another process may have finished first.
            if is_whole(target, model.objects):
                shutil.rmtree(staging, ignore_errors=True)
            else:
                self._disk.replace(target, staging)
        except OSError:
            if not is_whole(target, model.objects):
                raise
            shutil.rmtree(staging, ignore_errors=True)

    def _siblings(self, target: Path) -> list[Path]:
        """Other revisions of the model: unchanged files are not fetched again."""
        return [path for path in self._layout.snapshots() if path.parent == target.parent and path != target]


def _call_in(loop: asyncio.AbstractEventLoop, callback: Callable[[], None]) -> None:
    with suppress(RuntimeError):  # the loop is closed: nothing waits there
        loop.call_soon_threadsafe(callback)


def _log(progress: Progress, message: str) -> None:
    described = progress.describe()
    described["mib_per_second"] = round(described.pop("bytes_per_second") / (1 << 20), 1)
    logger.info(message, extra=described)


@contextmanager
def _disk_errors(model: str, cache: Path) -> Iterator[None]:
    """Translate errors of the cache directory (full, read-only) into one that names its path."""
    try:
        yield
    except ServiceError:
        raise
    except OSError as error:
        kind = DiskFull if error.errno in (errno.ENOSPC, errno.EDQUOT) else CacheError
        raise kind(
            f"The model '{model}' could not be stored in LOCAL_MODEL_CACHE ({cache}): "
            f"{error.strerror or error}. No partial files were kept."
        ) from error
