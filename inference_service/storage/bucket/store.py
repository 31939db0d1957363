"""Where models lie: a bucket (gcs.py) or a local directory (directory.py), seen as objects and bytes.

Owns the words that both share. Knows no models. All methods block; callers run them in threads.
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
    """One object as a listing shows it.

    `name` is the full object name; `generation` changes with every write; `crc32c` is the checksum that
    the store holds of the whole object, None where it holds none (file://).
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
    """A readable place of objects."""

    def list(self, prefix: str) -> list[StoredObject]:
        """All objects under `prefix`; raises StoreError."""
        ...

    def read(self, stored: StoredObject, start: int = 0, end: int | None = None) -> Bytes:
        """The bytes `start` to `end` (exclusive; None: the last) of exactly the object's generation.

        They come as they arrive, one attempt, not verified. Raises StoreUnavailable where another
        attempt may help, ObjectReplaced where that generation is gone, StoreForbidden.
        """
        ...

    def checksum(self, stored: StoredObject) -> int:
        """crc32c of the whole object: what the listing said, else of the source itself."""
        ...


def replaced(stored: StoredObject) -> ObjectReplaced:
    """The error for an object that is not there any more as the listing showed it."""
    return ObjectReplaced(
        f"{stored.name} was replaced or deleted while it was fetched. Try again.",
        retry_after=RETRY_AFTER_SECONDS,
    )
