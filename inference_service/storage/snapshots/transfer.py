"""One fetch as the downloader sees it: the spans still to fetch, and the parts being fetched."""

import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from inference_service.storage.snapshots.progress import Progress
from inference_service.storage.snapshots.staging import IncomingFile, Stretch

_MIB = 1 << 20


@dataclass(frozen=True)
class TransferConfig:
    """How bytes are cut into spans, and how many errors of the store are tolerated. Bytes and seconds.

    `stretch` is what a killed fetch may lose on each connection. A part that gains fewer than `stall_bytes`
    in `stall_seconds` is broken off. The fetch fails after `attempts` in a row without such a gain, or after
    `retries` in total, less one for every `credit` bytes that arrive.
    """

    connections: int = 12
    min_span: int = 4 * _MIB
    max_span: int = 64 * _MIB
    stretch: int = _MIB
    stall_seconds: float = 30.0
    stall_bytes: int = 64 << 10
    attempts: int = 6
    retries: int = 96
    credit: int = 8 * _MIB
    first_delay: float = 0.5
    longest_delay: float = 16.0
    damaged_attempts: int = 3


@dataclass(frozen=True)
class Span:
    """Bytes `start` to `end` (exclusive) of one file that are still to be fetched, not before `ready_at`."""

    file: IncomingFile
    start: int
    end: int
    ready_at: float = 0.0
    failures: int = 0

    @property
    def bytes(self) -> int:
        return self.end - self.start


@dataclass(eq=False)
class Part:
    """A span that a connection is fetching: `position` is the next byte, `end` may decrease.

    `writing`: not all bytes before `position` are on the disk yet. `accounted`: its bytes have been counted.
    `abandoned`: its thread is no longer waited for and writes nothing more.
    """

    file: IncomingFile
    start: int
    end: int
    failures: int
    position: int
    watched_at: float
    watched_from: int
    writing: bool = False
    accounted: bool = False
    abandoned: bool = False

    @property
    def left(self) -> int:
        return self.end - self.position

    @property
    def gained(self) -> int:
        return self.position - self.start


@dataclass(eq=False)
class Job:
    """One fetch: its spans, and how it ends. Guarded by the downloader's lock."""

    progress: Progress
    note: Callable[[Stretch], None]
    spans: deque[Span]
    files: frozenset[IncomingFile]
    files_left: int
    retries_left: float
    parts: set[Part] = field(default_factory=set)
    error: BaseException | None = None
    ended: threading.Event = field(default_factory=threading.Event)

    def ready_in(self, now: float) -> float | None:
        """Seconds until a span may be taken; None if there is none."""
        return min((max(0.0, span.ready_at - now) for span in self.spans), default=None)
