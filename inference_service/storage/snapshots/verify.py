"""Verifies snapshots on the disk before an engine loads them, and reads them into the page cache.

Files that were verified on arrival, or earlier by this process, and have not changed since are only read into
the page cache. Owns the threads for it.
"""

import asyncio
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import google_crc32c

from inference_service.checkpoints.snapshot import Snapshot
from inference_service.errors import CacheError, SnapshotCorrupt
from inference_service.storage.bucket.documents import WEIGHTS
from inference_service.storage.snapshots.layout import FileRecord, Manifest
from inference_service.storage.snapshots.page_lock import PageLock

CHUNK_BYTES = 1 << 20
READS_AT_ONCE = 2
MAX_KNOWN = 10_000

# Device, inode, size and ctime of a file.
_Identity = tuple[int, int, int, int]


class Verifier:
    """Verifies snapshots against their manifests and keeps the recently used in `page_lock`."""

    def __init__(self, page_lock: PageLock) -> None:
        self.page_lock = page_lock
        self._known: dict[_Identity, None] = {}
        self._threads = ThreadPoolExecutor(READS_AT_ONCE, thread_name_prefix="verify")

    async def verify(self, snapshot: Snapshot, *, arrived_now: bool = False) -> None:
        """Returns once every byte is verified; raises SnapshotCorrupt and CacheError.

        `arrived_now`: it was verified on arrival.
        """
        loop = asyncio.get_running_loop()
        await loop.run_in_executor(self._threads, self._verify, snapshot, arrived_now)

    def _verify(self, snapshot: Snapshot, arrived_now: bool) -> None:
        manifest = Manifest.read(snapshot.path)
        if manifest is None:
            raise SnapshotCorrupt(f"The snapshot of '{snapshot.model}' was removed while it was read.")
        try:
            for name, record in sorted(manifest.files.items()):
                self._verify_file(snapshot.path / name, record, arrived_now=arrived_now)
            self.page_lock.keep(snapshot.path, [name for name in manifest.files if name.endswith(WEIGHTS)])
        except OSError as error:
            raise CacheError(f"{error.filename} cannot be read: {error.strerror}") from error

    def _verify_file(self, path: Path, record: FileRecord, *, arrived_now: bool) -> None:
        with path.open("rb", buffering=0) as file:
            status = os.fstat(file.fileno())
            identity = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)
            if not arrived_now and identity not in self._known:
                found = _checksum(file.fileno())
                if found != record.crc32c:
                    raise SnapshotCorrupt(
                        f"{path} is damaged: crc32c {found:08x}, fetched were {record.crc32c:08x}.",
                        retry_after=1,
                    )
            elif hasattr(os, "posix_fadvise"):
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_WILLNEED)
        self._known[identity] = None
        while len(self._known) > MAX_KNOWN:
            del self._known[next(iter(self._known))]


def _checksum(descriptor: int) -> int:
    total = 0
    while chunk := os.read(descriptor, CHUNK_BYTES):
        total = google_crc32c.extend(total, chunk)
    return total
