"""Verifies snapshots on the disk before an engine loads them, and reads them into the page cache.

Files that were verified on arrival, or earlier by this process, and have not changed since are only read into
the page cache. The checksums of the tensors are written again if those on the disk differ. Owns the threads
for it.
"""

import asyncio
import logging
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from inference_service.checkpoints.snapshot import Snapshot
from inference_service.checkpoints.tensor_checksums import TENSOR_CHECKSUMS, dump, parse
from inference_service.errors import CacheError, SnapshotCorrupt
from inference_service.storage.bucket.documents import WEIGHTS
from inference_service.storage.snapshots import checksums
from inference_service.storage.snapshots.layout import FileRecord, Manifest, write_durably
from inference_service.storage.snapshots.page_lock import PageLock

logger = logging.getLogger(__name__)

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
            found = {
                name: self._verify_file(snapshot.path / name, record, arrived_now=arrived_now)
                for name, record in sorted(manifest.files.items())
            }
            self.page_lock.keep(snapshot.path, [name for name in manifest.files if name.endswith(WEIGHTS)])
        except OSError as error:
            raise CacheError(f"{error.filename} cannot be read: {error.strerror}") from error
        _keep(snapshot.path, {name: tensors for name, tensors in found.items() if tensors})

    def _verify_file(self, path: Path, record: FileRecord, *, arrived_now: bool) -> dict[str, str]:
        """The checksums of the file's tensors, as far as its bytes had to be read."""
        tensors: dict[str, str] = {}
        with path.open("rb", buffering=0) as file:
            status = os.fstat(file.fileno())
            identity = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)
            if not arrived_now and identity not in self._known:
                found = checksums.of_file(file.fileno(), path.name, status.st_size)
                if found.crc32c != record.crc32c:
                    raise SnapshotCorrupt(
                        f"{path} is damaged: crc32c {found.crc32c:08x}, fetched were {record.crc32c:08x}.",
                        retry_after=1,
                    )
                tensors = found.tensors
            elif hasattr(os, "posix_fadvise"):
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_WILLNEED)
        self._known[identity] = None
        while len(self._known) > MAX_KNOWN:
            del self._known[next(iter(self._known))]
        return tensors


def _keep(snapshot: Path, found: dict[str, dict[str, str]]) -> None:
    """Write the tensors' checksums if they differ from those on the disk (an earlier version wrote none)."""
    path = snapshot / TENSOR_CHECKSUMS
    try:
        kept = dict(parse(path.read_bytes())) if path.exists() else {}
        if found.items() <= kept.items():
            return
        new = path.with_name(f"{TENSOR_CHECKSUMS}.{os.getpid()}-{threading.get_ident()}")
        try:
            write_durably(new, dump(kept | found))
            new.replace(path)
        finally:
            new.unlink(missing_ok=True)  # the disk may be full
    except OSError as error:
        # Without them a swap copies every tensor.
        logger.warning("%s cannot be written: %s", path, error)
