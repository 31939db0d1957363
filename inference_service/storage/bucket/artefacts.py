"""Files by name in a directory or under a bucket's prefix, read and written whole. All methods block."""

import shutil
import uuid
from pathlib import Path
from typing import Protocol

from inference_service.errors import StoreError

FILE_SCHEME = "file://"
GCS_SCHEME = "gs://"


class Artefacts(Protocol):
    """Raises StoreError if the store cannot be read or written."""

    def get(self, name: str, target: Path) -> bool:
        """Write the file's content to `target`; False if there is none."""
        ...

    def put(self, name: str, source: Path) -> None:
        """Replace the file at once: no reader sees a part of it."""
        ...


class DirectoryArtefacts:
    """Files in the directory `root`."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def get(self, name: str, target: Path) -> bool:
        try:
            shutil.copyfile(self._root / name, target)
        except FileNotFoundError:
            return False
        except OSError as error:
            raise StoreError(f"{self._root / name} cannot be read: {error.strerror}") from error
        return True

    def put(self, name: str, source: Path) -> None:
        try:
            self._root.mkdir(parents=True, exist_ok=True)
            # With the mode that the operator's umask gives: other users' services read it too.
            written = self._root / f".{name}-{uuid.uuid4().hex}"
            try:
                shutil.copyfile(source, written)
                written.replace(self._root / name)
            finally:
                written.unlink(missing_ok=True)
        except OSError as error:
            raise StoreError(f"{self._root / name} cannot be written: {error.strerror}") from error


def open_artefacts(place: str) -> Artefacts:
    """A directory, or `gs://bucket/prefix`; nothing is contacted yet."""
    if not place.startswith(GCS_SCHEME):
        return DirectoryArtefacts(Path(place.removeprefix(FILE_SCHEME)).absolute())
    # Imported only here: half a second that a directory does not need.
    from inference_service.storage.bucket.gcs import GcsArtefacts

    bucket, _, prefix = place.removeprefix(GCS_SCHEME).partition("/")
    return GcsArtefacts(bucket, prefix)
