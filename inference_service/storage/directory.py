"""A local directory as a store (file://): an object's name is its path below it."""

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from io import FileIO
from pathlib import Path

import google_crc32c

from inference_service.errors import BucketNotFound, StoreForbidden, StoreUnavailable
from inference_service.storage.store import Bytes, StoredObject, replaced

CHUNK_BYTES = 1 << 20


class DirectoryStore:
    """The directory `root`; a generation is a file's time, inode and size."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def list(self, prefix: str) -> list[StoredObject]:
        if not self.root.is_dir():
            raise BucketNotFound(
                f"The directory {self.root} named by GCS_BUCKET does not exist or is no directory."
            )
        with self._translated():
            return sorted(self._walk(prefix), key=lambda stored: stored.name)

    def read(self, stored: StoredObject, start: int = 0, end: int | None = None) -> Bytes:
        left = (stored.size if end is None else end) - start
        with self._translated(), self._open(stored) as source:
            self._check(source.fileno(), stored)
            source.seek(start)
            while left > 0 and (chunk := source.read(min(left, CHUNK_BYTES))):
                left -= len(chunk)
                yield chunk
            # A file is written in place: what was read before may be of another content.
            self._check(source.fileno(), stored)

    def checksum(self, stored: StoredObject) -> int:
        total = 0
        for chunk in self.read(stored):
            total = google_crc32c.extend(total, chunk)
        return total

    def _open(self, stored: StoredObject) -> FileIO:
        try:
            return (self.root / stored.name).open("rb", buffering=0)
        except FileNotFoundError as error:
            raise replaced(stored) from error

    def _check(self, descriptor: int, stored: StoredObject) -> None:
        if _generation(os.fstat(descriptor)) != stored.generation:
            raise replaced(stored)

    def _walk(self, prefix: str) -> Iterator[StoredObject]:
        for directory, below, names in os.walk(self.root / prefix, followlinks=True):
            below[:] = [name for name in below if not _leads_back(Path(directory, name))]
            for name in names:
                path = Path(directory, name)
                try:
                    status = path.stat()
                except OSError:  # removed meanwhile, or a link that leads nowhere
                    continue
                if not stat.S_ISREG(status.st_mode):  # reading a pipe would wait for ever
                    continue
                yield StoredObject(
                    path.relative_to(self.root).as_posix(),
                    status.st_size,
                    _generation(status),
                    None,
                    datetime.fromtimestamp(status.st_mtime, UTC),
                )

    @contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except PermissionError as error:
            raise StoreForbidden(f"{error.filename} cannot be read: permission denied.") from error
        except OSError as error:
            raise StoreUnavailable(f"The directory {self.root} cannot be read: {error}") from error


def _leads_back(directory: Path) -> bool:
    """A link to a directory that it lies in: following it would never end."""
    return directory.is_symlink() and directory.parent.resolve().is_relative_to(directory.resolve())


def _generation(status: os.stat_result) -> str:
    return f"{status.st_mtime_ns:x}-{status.st_ino:x}-{status.st_size:x}"
