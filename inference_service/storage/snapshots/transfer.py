"""One fetch as the mover sees it: the spans that are still to come and the parts that are on their way."""

import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from inference_service.storage.snapshots.progress import Progress
from inference_service.storage.snapshots.staging import IncomingFile, Stretch

_MIB = 1 << 20


@dataclass(frozen=True)
class TransferConfig:
    """How bytes are cut into spans, and how much trouble of the store is borne. Bytes and seconds.

    `stretch` is what a killed fetch may lose on each connection. `stall`: a part that gains fewer than
    `stall_bytes` in `stall_seconds` is broken off; `attempts` in a row without such a gain end the fetch,
    and so do `retries` altogether, less one for each `credit` that arrives.
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
    """Bytes `start` to `end` (exclusive) of one file that are still to come, not before `ready_at`."""

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
    """A span that a connection is fetching: `position` is the next byte, `end` may come closer.

    `writing`: the bytes before `position` are not all on the disk yet. `accounted`: what it brought has been
    counted. `abandoned`: nobody waits for its thread any more, and that writes nothing any more.
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
    """One fetch: its spans, and how it ends. Everything in it is guarded by the mover's lock."""

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
        """Seconds until a span may be taken; None where there is none."""
        return min((max(0.0, span.ready_at - now) for span in self.spans), default=None)
