"""Where models lie: a Google Cloud Storage bucket (gs://) or a local directory (file://).

Owns the client libraries and the translation of their errors. Knows objects and bytes, not models.
All methods block; callers run them in threads.
"""

import base64
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Protocol

from inference_service.errors import ObjectReplaced, StoreError, StoreForbidden

if TYPE_CHECKING:
    from google.cloud import storage

CHUNK_BYTES = 4 << 20
CONNECT_READ_SECONDS = (5.0, 30.0)
RETRY_SECONDS = 20.0
RETRY_AFTER_SECONDS = 5
_FILE_SCHEME = "file://"


@dataclass(frozen=True)
class StoredObject:
    """One object as a listing shows it.

    `name` is the full object name; `generation` changes with every write; `crc32c` is the checksum that
    the store holds of the whole object, None where it holds none (file://).
    """

    name: str
    size: int
    generation: str
    crc32c: int | None
    created: datetime


class Store(Protocol):
    """A readable place of objects."""

    def list(self, prefix: str) -> list[StoredObject]:
        """All objects under `prefix`; raises StoreError."""
        ...

    def read(self, stored: StoredObject) -> Iterator[bytes]:
        """The object's bytes, of exactly its generation; raises StoreError."""
        ...


def open_store(bucket: str) -> Store:
    """The store that GCS_BUCKET names; nothing is contacted yet."""
    if bucket.startswith(_FILE_SCHEME):
        return FileStore(Path(bucket.removeprefix(_FILE_SCHEME)))
    return GcsStore(bucket)


class FileStore:
    """A local directory; an object's name is its path below it."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def list(self, prefix: str) -> list[StoredObject]:
        if not self._root.is_dir():
            raise StoreForbidden(
                f"The directory {self._root} named by GCS_BUCKET does not exist or is no directory."
            )
        with self._translated():
            return sorted(self._walk(prefix), key=lambda stored: stored.name)

    def read(self, stored: StoredObject) -> Iterator[bytes]:
        with self._translated(), (self._root / stored.name).open("rb") as source:
            if _generation(os.fstat(source.fileno())) != stored.generation:
                raise _replaced_error(stored)
            while chunk := source.read(CHUNK_BYTES):
                yield chunk

    def _walk(self, prefix: str) -> Iterator[StoredObject]:
        for directory, below, names in os.walk(self._root / prefix, followlinks=True):
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
                    path.relative_to(self._root).as_posix(),
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
            raise StoreError(f"The directory {self._root} cannot be read: {error}") from error


class GcsStore:
    """A Google Cloud Storage bucket, with Application Default Credentials."""

    def __init__(self, bucket: str) -> None:
        # Imported here and not with the module: half a second that file:// does not need.
        from google.cloud import storage

        self._storage = storage
        self._name = bucket
        self._client: storage.Client | None = None

    def list(self, prefix: str) -> list[StoredObject]:
        with self._translated():
            blobs = self._bucket().list_blobs(
                prefix=prefix,
                fields="items(name,size,generation,crc32c,timeCreated),nextPageToken",
                timeout=CONNECT_READ_SECONDS,
                retry=self._retry(),
            )
            return [_stored(blob) for blob in blobs if not blob.name.endswith("/")]

    def read(self, stored: StoredObject) -> Iterator[bytes]:
        with self._translated():
            blob = self._bucket().blob(stored.name, generation=int(stored.generation))
            reader: BinaryIO = blob.open(
                "rb",
                chunk_size=CHUNK_BYTES,
                timeout=CONNECT_READ_SECONDS,
                retry=self._retry(),
            )
            with reader, _replaced(stored):
                while chunk := reader.read(CHUNK_BYTES):
                    yield chunk

    def _bucket(self) -> "storage.Bucket":
        if self._client is None:
            self._client = self._storage.Client()
        return self._client.bucket(self._name)

    def _retry(self) -> object:
        from google.cloud.storage.retry import DEFAULT_RETRY

        return DEFAULT_RETRY.with_timeout(RETRY_SECONDS)

    @contextmanager
    def _translated(self) -> Iterator[None]:
        from google.api_core import exceptions as api
        from google.auth import exceptions as auth
        from requests import exceptions as transport

        try:
            yield
        except api.NotFound as error:
            raise StoreForbidden(f"The bucket gs://{self._name} does not exist: {error.message}") from error
        except (api.Forbidden, api.Unauthorized) as error:
            raise StoreForbidden(
                f"The service may not read gs://{self._name}: {error.message} "
                "It needs storage.objects.list and storage.objects.get "
                "(roles/storage.objectViewer)."
            ) from error
        except auth.DefaultCredentialsError as error:
            raise StoreForbidden(
                f"No Google credentials were found for gs://{self._name}: {error}"
            ) from error
        except (api.GoogleAPIError, auth.GoogleAuthError, transport.RequestException) as error:
            raise StoreError(
                f"The bucket gs://{self._name} cannot be reached: {error}",
                retry_after=RETRY_AFTER_SECONDS,
            ) from error


@contextmanager
def _replaced(stored: StoredObject) -> Iterator[None]:
    """An object that the listing showed and that is not there in that generation any more."""
    from google.api_core import exceptions as api

    try:
        yield
    except api.NotFound as error:
        raise _replaced_error(stored) from error


def _replaced_error(stored: StoredObject) -> ObjectReplaced:
    return ObjectReplaced(
        f"{stored.name} was replaced or deleted while it was fetched. Try again.",
        retry_after=RETRY_AFTER_SECONDS,
    )


def _stored(blob: "storage.Blob") -> StoredObject:
    crc32c = int.from_bytes(base64.b64decode(blob.crc32c), "big") if blob.crc32c else None
    return StoredObject(blob.name, int(blob.size), str(blob.generation), crc32c, blob.time_created)


def _leads_back(directory: Path) -> bool:
    """A link to a directory that it lies in: following it would never end."""
    return directory.is_symlink() and directory.parent.resolve().is_relative_to(directory.resolve())


def _generation(status: os.stat_result) -> str:
    return f"{status.st_mtime_ns:x}-{status.st_ino:x}-{status.st_size:x}"
