"""The small JSON files of a model (config.json, serving.json, ...).

Owns their size limits and how they are read; model.py and preflight.py interpret them.
"""

import json
import random
import threading
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any, Protocol

import google_crc32c

from inference_service.errors import CacheError, SnapshotCorrupt, StoreUnavailable
from inference_service.storage.bucket.store import RETRY_AFTER_SECONDS, Bytes, Store, StoredObject

_MIB = 1 << 20
# A file that a tokenizer needs may be large; anything else of more than 16 MiB is no configuration.
_LARGE = frozenset(
    {"tokenizer.json", "vocab.json", "vocab.txt", "merges.txt", "tokenizer.model", "tekken.json"}
)
MAX_TOKENIZER_BYTES = 256 * _MIB
MAX_JSON_BYTES = 16 * _MIB
MAX_SERVING_BYTES = 256 << 10
ATTEMPTS = 3
RETRY_SECONDS = 0.2
READ_SECONDS = 30.0
WEIGHTS = ".safetensors"


class BadDocument(ValueError):
    """A file is not the JSON object that it should be; says which file and why."""


class Reader(Protocol):
    """Where documents and headers are read from."""

    def read(self, stored: StoredObject) -> bytes:
        """The content of the object, its checksum verified; raises StoreError."""
        ...

    def read_range(self, stored: StoredObject, start: int, end: int) -> bytes:
        """The bytes `start` to `end` (exclusive), which no checksum covers; raises StoreError."""
        ...


class Documents:
    """Reads small objects of one store. Blocks for at most READ_SECONDS each time; keeps nothing."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def read(self, stored: StoredObject) -> bytes:
        return _retried(lambda: self._verified(stored))

    def read_range(self, stored: StoredObject, start: int, end: int) -> bytes:
        return _retried(lambda: self._whole(stored, start, end))

    def _verified(self, stored: StoredObject) -> bytes:
        content, expected = self._whole(stored, 0, stored.size), self._store.checksum(stored)
        found = google_crc32c.value(content)
        if found != expected:
            raise SnapshotCorrupt(
                f"{stored.name} arrived damaged: crc32c {found:08x}, the store holds {expected:08x}.",
                retry_after=RETRY_AFTER_SECONDS,
            )
        return content

    def _whole(self, stored: StoredObject, start: int, end: int) -> bytes:
        """In a thread that is abandoned if it hangs: socket timeouts do not catch slowly dripping bytes."""
        answer: SimpleQueue[bytes | Exception] = SimpleQueue()

        def fetch() -> None:
            try:
                answer.put(_joined(self._store.read(stored, start, end), end - start))
            except Exception as error:
                answer.put(error)

        threading.Thread(target=fetch, name="document", daemon=True).start()
        try:
            content = answer.get(timeout=READ_SECONDS)
        except Empty:
            content = StoreUnavailable(f"{stored.name} did not arrive within {READ_SECONDS:g} s.")
        if isinstance(content, Exception):
            raise content
        if len(content) != end - start:
            raise StoreUnavailable(f"{stored.name} broke off.", retry_after=RETRY_AFTER_SECONDS)
        return content


class SnapshotDocuments:
    """Reads the same from a verified snapshot, without the bucket."""

    def __init__(self, snapshot: Path) -> None:
        self._snapshot = snapshot

    def read(self, stored: StoredObject) -> bytes:
        return self.read_range(stored, 0, stored.size)

    def read_range(self, stored: StoredObject, start: int, end: int) -> bytes:
        try:
            with (self._snapshot / stored.filename).open("rb") as file:
                file.seek(start)
                return file.read(end - start)
        except OSError as error:
            raise CacheError(f"{error.filename} cannot be read: {error.strerror}") from error


def _joined(chunks: Bytes, most: int) -> bytes:
    """The chunks, no more than `most` bytes of them."""
    content = bytearray()
    with closing(chunks):
        for chunk in chunks:
            content += chunk
            if len(content) >= most:
                break
    return bytes(content[:most])


def _retried(read: Callable[[], bytes]) -> bytes:
    started = time.monotonic()
    for attempt in range(1, ATTEMPTS):
        try:
            return read()
        except (StoreUnavailable, SnapshotCorrupt):
            if time.monotonic() - started >= READ_SECONDS:
                raise
            time.sleep(RETRY_SECONDS * attempt * random.uniform(0.5, 1.0))  # noqa: S311
    return read()


def parse_object(name: str, content: bytes) -> dict[str, Any]:
    """The JSON object in a file; raises BadDocument."""
    try:
        value = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise BadDocument(f"{name} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise BadDocument(f"{name} is not a JSON object")
    return value


def oversized(stored: StoredObject) -> str | None:
    """Why a file is too large for what its name says; None if it is not."""
    limit = MAX_TOKENIZER_BYTES if stored.filename in _LARGE else MAX_JSON_BYTES
    if stored.filename == "serving.json":
        limit = MAX_SERVING_BYTES
    if stored.size <= limit or stored.filename.endswith(WEIGHTS):
        return None
    return f"{stored.filename} has {stored.size} bytes, more than the {limit} that are read."
