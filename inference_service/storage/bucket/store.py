"""The store of models: a bucket (gcs.py) or a local directory (directory.py), as objects and bytes.

Defines the types that both share; knows nothing about models. All methods block; callers run them in threads.
"""

from collections.abc import Generator
from dataclasses import dataclass
from datetime import datetime
from typing import Protocol

from inference_service.errors import ObjectReplaced

# Closing it closes the connection behind it.
Bytes = Generator[bytes, None, None]

RETRY_AFTER_SECONDS = 5


@dataclass(frozen=True)
class StoredObject:
    """One object in a listing.

    `name` is the full object name; `generation` changes with every write; `crc32c` is the store's checksum of
    the whole object, None if it has none (file://).
    """

    name: str
    size: int
    generation: str
    crc32c: int | None
    created: datetime

    @property
    def filename(self) -> str:
        """The last part of the name."""
        return self.name.rpartition("/")[2]


class Store(Protocol):
    """Read access to objects.

    `has_checksums`: its listings have the crc32c of every object. `connections`: how many reads at once pay.
    """

    has_checksums: bool
    connections: int

    def list(self, prefix: str) -> list[StoredObject]:
        """All objects under `prefix`; raises StoreError."""
        ...

    def read(self, stored: StoredObject, start: int = 0, end: int | None = None) -> Bytes:
        """The bytes `start` to `end` (exclusive; None: to the end) of exactly this generation.

        Streams them as they arrive, in one attempt, unverified. Raises StoreUnavailable if a retry may help,
        ObjectReplaced if that generation is gone, and StoreForbidden.
        """
        ...

    def checksum(self, stored: StoredObject) -> int:
        """crc32c of the whole object, from the listing or else computed from the source."""
        ...


def replaced(stored: StoredObject) -> ObjectReplaced:
    """The error for an object that no longer exists as listed."""
    return ObjectReplaced(
        f"{stored.name} was replaced or deleted while it was being fetched. Try again.",
        retry_after=RETRY_AFTER_SECONDS,
    )
