"""The small JSON files of a model (config.json, serving.json, ...).

Owns their size limits and the reading; what they say is judged by catalog.py and preflight.py.
"""

import json
import random
import time
from collections.abc import Callable
from typing import Any

import google_crc32c

from inference_service.errors import StoreUnavailable
from inference_service.storage.store import RETRY_AFTER_SECONDS, Store, StoredObject

_MIB = 1 << 20
# A file that a tokenizer needs may be large; anything else of more than 16 MiB is no configuration.
_LARGE = frozenset({"tokenizer.json", "vocab.json", "vocab.txt", "merges.txt", "tokenizer.model"})
MAX_TOKENIZER_BYTES = 256 * _MIB
MAX_JSON_BYTES = 16 * _MIB
MAX_SERVING_BYTES = 256 << 10
ATTEMPTS = 3
RETRY_SECONDS = 0.2
WEIGHTS = ".safetensors"


class BadDocument(ValueError):
    """A file is not the JSON object that it should be; says which file and why."""


class Documents:
    """Reads small objects of one store. Blocks; used from threads. Keeps nothing."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def read(self, stored: StoredObject) -> bytes:
        """The content of the object, its checksum verified; raises StoreError."""
        return _retried(lambda: self._verified(stored))

    def read_range(self, stored: StoredObject, start: int, end: int) -> bytes:
        """The bytes `start` to `end` (exclusive), which no checksum covers; raises StoreError."""
        return _retried(lambda: self._whole(stored, start, end))

    def _verified(self, stored: StoredObject) -> bytes:
        content = self._whole(stored, 0, stored.size)
        if google_crc32c.value(content) != self._store.checksum(stored):
            raise StoreUnavailable(f"{stored.name} arrived damaged.", retry_after=RETRY_AFTER_SECONDS)
        return content

    def _whole(self, stored: StoredObject, start: int, end: int) -> bytes:
        content = b"".join(self._store.read(stored, start, end))
        if len(content) != end - start:
            raise StoreUnavailable(f"{stored.name} broke off.", retry_after=RETRY_AFTER_SECONDS)
        return content


def _retried(read: Callable[[], bytes]) -> bytes:
    for attempt in range(1, ATTEMPTS):
        try:
            return read()
        except StoreUnavailable:
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
    """Why a file is too large to be what its name says; None where it is not."""
    limit = MAX_TOKENIZER_BYTES if stored.filename in _LARGE else MAX_JSON_BYTES
    if stored.filename == "serving.json":
        limit = MAX_SERVING_BYTES
    if stored.size <= limit or stored.filename.endswith(WEIGHTS):
        return None
    return f"{stored.filename} has {stored.size} bytes, more than the {limit} that are read."
