"""A Google Cloud Storage bucket as a store, with Application Default Credentials.

Owns the client libraries and the translation of their errors. The listing is google-cloud-storage's; the
bytes come over its documented download URL, because every reader of the library copies 8 KiB at a time
in Python (docs/storage.md has the measurement).
"""

import base64
import os
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote

import google.auth
import requests
from google.api_core import exceptions as api
from google.auth import exceptions as auth
from google.auth.credentials import AnonymousCredentials
from google.auth.transport.requests import AuthorizedSession
from google.cloud import storage
from google.cloud.storage.exceptions import DataCorruption
from google.cloud.storage.retry import DEFAULT_RETRY
from requests.adapters import HTTPAdapter
from urllib3.exceptions import HTTPError

from inference_service.errors import BucketNotFound, StoreError, StoreForbidden, StoreUnavailable
from inference_service.storage.bucket.store import RETRY_AFTER_SECONDS, Bytes, StoredObject, replaced

# A fast stream is read in large pieces, to wake up rarely; for a slow one large buffers would be wasted.
MIN_CHUNK_BYTES = 64 << 10
MAX_CHUNK_BYTES = 2 << 20
CONNECT_SECONDS = 5.0
READ_SECONDS = 30.0
LIST_RETRY_SECONDS = 20.0
MAX_ERROR_BYTES = 16 << 10
MAX_ERROR_CHARACTERS = 500
_CONNECTIONS = 64
_READ_ONLY = "https://www.googleapis.com/auth/devstorage.read_only"
_READ_WRITE = "https://www.googleapis.com/auth/devstorage.read_write"
_ENDPOINT = "https://storage.googleapis.com"
_TRY_AGAIN = frozenset({408, 429, 500, 502, 503, 504})
_CONTENT_RANGE = re.compile(r"bytes (\d+)-(\d+)/(?:\d+|\*)")
_LISTED = "items(name,size,generation,crc32c,timeCreated),nextPageToken"


class GcsStore:
    """The bucket `bucket`. Nothing is contacted before the first call."""

    has_checksums = True
    connections = 12

    def __init__(
        self, bucket: str, *, page_size: int | None = None, read_seconds: float = READ_SECONDS
    ) -> None:
        self._name = bucket
        self._page_size = page_size
        self._timeout = (CONNECT_SECONDS, read_seconds)
        self._connecting = threading.Lock()
        self._client: storage.Client | None = None
        self._session: AuthorizedSession | None = None

    def list(self, prefix: str) -> list[StoredObject]:
        with self._translated(f"list gs://{self._name}/{prefix}", "storage.objects.list"):
            client, _ = self._connect()
            blobs = client.bucket(self._name).list_blobs(
                prefix=prefix,
                page_size=self._page_size,
                fields=_LISTED,
                timeout=self._timeout,
                retry=DEFAULT_RETRY.with_timeout(LIST_RETRY_SECONDS),
            )
            return [_stored(blob) for blob in blobs if not blob.name.endswith("/")]

    def read(self, stored: StoredObject, start: int = 0, end: int | None = None) -> Bytes:
        end = stored.size if end is None else end
        if start >= end:
            return
        with (
            self._translated(f"read gs://{self._name}/{stored.name}", "storage.objects.get"),
            self._get(stored, start, end) as response,
        ):
            self._check(response, stored, start, end)
            room = MIN_CHUNK_BYTES
            while chunk := response.raw.read1(room, decode_content=False):
                room = min(MAX_CHUNK_BYTES, max(MIN_CHUNK_BYTES, 2 * len(chunk)))
                yield chunk

    def checksum(self, stored: StoredObject) -> int:
        if stored.crc32c is None:
            raise StoreError(f"gs://{self._name}/{stored.name} has no crc32c; it cannot be verified.")
        return stored.crc32c

    def _get(self, stored: StoredObject, start: int, end: int) -> requests.Response:
        _, session = self._connect()
        response: requests.Response = session.get(
            f"{_endpoint()}/download/storage/v1/b/{self._name}/o/{quote(stored.name, safe='')}",
            params={"alt": "media", "generation": stored.generation},
            # gzip: an object that is stored compressed comes as it is stored, not unpacked on the way.
            headers={"Range": f"bytes={start}-{end - 1}", "Accept-Encoding": "gzip"},
            timeout=self._timeout,
            stream=True,
        )
        return response

    def _check(self, response: requests.Response, stored: StoredObject, start: int, end: int) -> None:
        """Only the wanted range of the wanted generation passes."""
        status = response.status_code
        if status in (404, 412, 416) or _other_generation(response, stored):
            raise replaced(stored)
        if status == 200 and (start, end) != (0, stored.size):
            raise StoreError(f"gs://{self._name}/{stored.name}: the store ignores ranges; it must not.")
        if status not in (200, 206):
            raise _refusal(response)
        found = _CONTENT_RANGE.fullmatch(response.headers.get("Content-Range", ""))
        if status == 206 and (found is None or (int(found[1]), int(found[2])) != (start, end - 1)):
            raise StoreUnavailable(
                f"gs://{self._name}/{stored.name}: another range came than bytes {start}-{end - 1}: "
                f"{response.headers.get('Content-Range')!r}",
                retry_after=RETRY_AFTER_SECONDS,
            )

    def _connect(self) -> tuple[storage.Client, AuthorizedSession]:
        with self._connecting:
            if self._client is None or self._session is None:
                credentials = _credentials()
                self._client = storage.Client(project=None, credentials=credentials)
                self._session = AuthorizedSession(credentials)
                adapter = HTTPAdapter(pool_maxsize=_CONNECTIONS)
                for scheme in ("https://", "http://"):
                    self._session.mount(scheme, adapter)
            return self._client, self._session

    @contextmanager
    def _translated(self, action: str, permission: str) -> Iterator[None]:
        bucket = f"gs://{self._name}"
        try:
            yield
        except api.NotFound as error:
            raise BucketNotFound(
                f"The bucket {bucket} named by GCS_BUCKET does not exist: {error.message}"
            ) from error
        except (api.Forbidden, api.Unauthorized) as error:
            raise StoreForbidden(
                f"The service may not {action}: it lacks {permission}. Grant its service account "
                f"roles/storage.objectViewer on {bucket}. Google says: {error.message}"
            ) from error
        except auth.DefaultCredentialsError as error:
            raise StoreForbidden(
                f"No Google credentials were found for {bucket}: {error} Run `gcloud auth "
                "application-default login`, or give the service a service account."
            ) from error
        except api.GoogleAPICallError as error:
            if error.code not in _TRY_AGAIN:
                raise StoreError(f"Cannot {action}: {error}") from error
            raise StoreUnavailable(
                f"Cannot {action}: {error}", retry_after=_asked_for(error) or RETRY_AFTER_SECONDS
            ) from error
        except (api.GoogleAPIError, auth.GoogleAuthError, requests.RequestException, HTTPError) as error:
            raise StoreUnavailable(
                f"Cannot {action}: {_reason(error)}", retry_after=RETRY_AFTER_SECONDS
            ) from error


class GcsArtefacts:
    """Files under a prefix of a bucket (storage/bucket/artefacts.py), with credentials that may write."""

    def __init__(self, bucket: str, prefix: str) -> None:
        self._bucket = bucket
        self._prefix = f"{prefix.strip('/')}/" if prefix.strip("/") else ""

    def get(self, name: str, target: Path) -> bool:
        with self._translated("read", name):
            try:
                self._blob(name).download_to_filename(str(target), checksum="crc32c")
            except api.NotFound:
                return False
            return True

    def put(self, name: str, source: Path) -> None:
        with self._translated("write", name):
            self._blob(name).upload_from_filename(str(source), checksum="crc32c")

    def _blob(self, name: str) -> "storage.Blob":
        client = storage.Client(project=None, credentials=_credentials(_READ_WRITE))
        return client.bucket(self._bucket).blob(f"{self._prefix}{name}")

    @contextmanager
    def _translated(self, action: str, name: str) -> Iterator[None]:
        try:
            yield
        except (
            api.GoogleAPIError,
            auth.GoogleAuthError,
            requests.RequestException,
            HTTPError,
            DataCorruption,
            OSError,
        ) as error:
            raise StoreError(f"Cannot {action} gs://{self._bucket}/{self._prefix}{name}: {error}") from error


def _credentials(scope: str = _READ_ONLY) -> Any:
    if os.environ.get("STORAGE_EMULATOR_HOST"):
        return AnonymousCredentials()
    credentials, _ = google.auth.default(scopes=[scope])
    return credentials


def _endpoint() -> str:
    """As google-cloud-storage chooses it."""
    host = os.environ.get("STORAGE_EMULATOR_HOST") or _ENDPOINT
    return host if "://" in host else f"http://{host}"


def _other_generation(response: requests.Response, stored: StoredObject) -> bool:
    generation: str = response.headers.get("x-goog-generation", stored.generation)
    return bool(response.ok) and generation != stored.generation


def _reason(error: BaseException) -> str:
    """What the libraries have wrapped up in one another."""
    while True:
        wrapped = (getattr(error, "cause", None), getattr(error, "reason", None), *error.args)
        inner = next((each for each in wrapped if isinstance(each, Exception)), None)
        if inner is None:
            return str(error)
        error = inner


def _asked_for(error: api.GoogleAPICallError) -> int | None:
    """Seconds that the store itself wants to be left alone, where it says so."""
    value = "" if error.response is None else error.response.headers.get("Retry-After", "")
    return int(value) if re.fullmatch(r"[0-9]{1,3}", value) else None


def _refusal(response: requests.Response) -> api.GoogleAPICallError:
    """The error of a response that is none of the object's bytes; no more of it is read than is shown."""
    said = response.raw.read1(MAX_ERROR_BYTES, decode_content=True) or b""
    words = " ".join(said.decode(errors="replace").split())[:MAX_ERROR_CHARACTERS]
    return api.from_http_status(response.status_code, words or response.reason, response=response)


def _stored(blob: "storage.Blob") -> StoredObject:
    return StoredObject(blob.name, int(blob.size), str(blob.generation), _crc32c(blob), blob.time_created)


def _crc32c(blob: "storage.Blob") -> int | None:
    try:
        content = base64.b64decode(blob.crc32c or "", validate=True)
    except ValueError:
        return None
    return int.from_bytes(content, "big") if len(content) == 4 else None
