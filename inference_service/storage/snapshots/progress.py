"""The progress of a fetch: bytes, rate and time left, for the log, /admin/stats and a terminal."""

import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any

WINDOW_SECONDS = 10.0
_SAMPLE_SECONDS = 0.25


class Progress:
    """Counts the bytes of one fetch; many threads advance it.

    `total` in bytes. The rate is that of the last WINDOW_SECONDS, so that a stall shows.
    """

    def __init__(
        self, model: str, revision: str, total: int, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.model = model
        self.revision = revision
        self.total = total
        self.done = 0
        self.retries = 0
        self._clock = clock
        self._started = clock()
        self._samples: deque[tuple[float, int]] = deque([(self._started, 0)])
        self._lock = threading.Lock()

    def advance(self, count: int) -> None:
        """Add `count` bytes, or (negative) take back bytes that must be fetched again."""
        with self._lock:
            self.done += count
            now = self._clock()
            if now - self._samples[-1][0] < _SAMPLE_SECONDS:
                return
            self._samples.append((now, self.done))
            while now - self._samples[0][0] > WINDOW_SECONDS:
                self._samples.popleft()

    def skip(self, count: int) -> None:
        """Add `count` bytes that were already there: they do not count towards the rate."""
        with self._lock:
            self.done += count
            self._samples = deque([(self._clock(), self.done)])

    def retried(self) -> None:
        with self._lock:
            self.retries += 1

    @property
    def seconds(self) -> float:
        return self._clock() - self._started

    @property
    def bytes_per_second(self) -> float:
        with self._lock:
            since, done = self._samples[0]
            return max(0, self.done - done) / max(1e-3, self._clock() - since)

    @property
    def percent(self) -> int:
        return 100 if self.total <= 0 else min(100, max(0, 100 * self.done // self.total))

    @property
    def eta_seconds(self) -> float | None:
        """Seconds left at the current rate; None during a stall."""
        rate = self.bytes_per_second
        return (self.total - self.done) / rate if rate >= 1 else None

    def describe(self) -> dict[str, Any]:
        """As shown by /admin/stats; `eta_seconds` is None during a stall."""
        eta = self.eta_seconds
        return {
            "model": self.model,
            "revision": self.revision,
            "bytes": self.done,
            "total_bytes": self.total,
            "percent": self.percent,
            "bytes_per_second": round(self.bytes_per_second),
            "eta_seconds": None if eta is None else round(eta, 1),
            "seconds": round(self.seconds, 1),
            "retries": self.retries,
        }
