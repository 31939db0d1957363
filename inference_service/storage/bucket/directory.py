"""A local directory as a store (file://): an object's name is its path below it."""

import errno
import logging
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from io import FileIO
from pathlib import Path

import google_crc32c

from inference_service.errors import BucketNotFound, StoreForbidden, StoreUnavailable
from inference_service.storage.bucket.store import Bytes, StoredObject, replaced

logger = logging.getLogger(__name__)

CHUNK_BYTES = 1 << 20
MAX_DEPTH = 16


class DirectoryStore:
    """The directory `root`; a generation is a file's time, inode and size."""

    has_checksums = False
    # Two for each processor; more only take turns, but a network may be behind the directory.
    connections = min(12, 2 * (os.cpu_count() or 1))

    def __init__(self, root: Path) -> None:
        self.root = root

    def list(self, prefix: str) -> list[StoredObject]:
        if not self.root.is_dir():
            raise BucketNotFound(
                f"The directory {self.root} named by GCS_BUCKET does not exist or is not a directory."
            )
        with self._translated():
            found = self._walk(self.root / prefix, frozenset())
            return sorted(found, key=lambda stored: stored.name)

    def read(self, stored: StoredObject, start: int = 0, end: int | None = None) -> Bytes:
        left = (stored.size if end is None else end) - start
        with self._translated(), self._open(stored) as source:
            self._check(source.fileno(), stored)
            source.seek(start)
            while left > 0 and (chunk := source.read(min(left, CHUNK_BYTES))):
                left -= len(chunk)
                yield chunk
            # A file was written in place: earlier reads may be of other content.
            self._check(source.fileno(), stored)

    def checksum(self, stored: StoredObject) -> int:
        total = 0
        for chunk in self.read(stored):
            total = google_crc32c.extend(total, chunk)
        return total

    def _open(self, stored: StoredObject) -> FileIO:
        try:
            # Do not wait for a writer if the file is a pipe.
            return FileIO(self.root / stored.name, "rb", opener=_open_at_once)
        except FileNotFoundError as error:
            raise replaced(stored) from error

    def _check(self, descriptor: int, stored: StoredObject) -> None:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode) or _generation(status) != stored.generation:
            raise replaced(stored)

    def _walk(self, directory: Path, above: frozenset[tuple[int, int]]) -> Iterator[StoredObject]:
        """Every file below; links to directories are followed, but never into a directory above."""
        try:
            status = directory.stat()
            entries = sorted(directory.iterdir())
        except (FileNotFoundError, NotADirectoryError):
            return
        here = (status.st_dev, status.st_ino)
        if here in above or len(above) >= MAX_DEPTH:
            return
        for path in entries:
            try:
                found = path.stat()
            except (FileNotFoundError, NotADirectoryError):  # removed meanwhile, or a dangling link
                continue
            except OSError as error:
                if error.errno != errno.ELOOP:
                    raise
                continue
            if stat.S_ISDIR(found.st_mode):
                yield from self._below(path, above | {here})
            elif stat.S_ISREG(found.st_mode):  # reading a pipe would block forever
                yield StoredObject(
                    path.relative_to(self.root).as_posix(),
                    found.st_size,
                    _generation(found),
                    None,
                    datetime.fromtimestamp(found.st_mtime, UTC),
                )

    def _below(self, directory: Path, above: frozenset[tuple[int, int]]) -> Iterator[StoredObject]:
        try:
            yield from list(self._walk(directory, above))
        except OSError as error:
            # One unreadable directory must not affect all other models.
            logger.warning("%s cannot be read and is left out: %s", error.filename, error.strerror)

    @contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except PermissionError as error:
            raise StoreForbidden(f"{error.filename} cannot be read: permission denied.") from error
        except OSError as error:
            raise StoreUnavailable(f"The directory {self.root} cannot be read: {error}") from error


def _open_at_once(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK)


def _generation(status: os.stat_result) -> str:
    return f"{status.st_mtime_ns:x}-{status.st_ino:x}-{status.st_size:x}"
