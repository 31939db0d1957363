"""Estimates of waits from the past: how fast requests are served, and how long a model takes to load.

Pure: the caller passes the time. For Retry-After, which is at most MAX_RETRY_SECONDS: OpenAI's client does
not wait longer.
"""

import math
from collections import deque

MAX_RETRY_SECONDS = 120
UNKNOWN_LOAD_SECONDS = 15.0
# Fraction of the time that an overdue load has already taken.
OVERDUE = 0.25
_KEPT = 64


class Estimates:
    """The most recently ended requests, and each model's last load."""

    def __init__(self) -> None:
        self._ended: deque[float] = deque(maxlen=_KEPT)
        self._loads: dict[str, float] = {}
        self._starts: dict[str, float] = {}

    def ended(self, now: float) -> None:
        """A request has released its lease."""
        self._ended.append(now)

    def loaded(self, model: str, seconds: float, start_seconds: float) -> None:
        """A load took `seconds`, of which its engine's start took `start_seconds`."""
        self._loads[model] = seconds
        self._starts[model] = start_seconds

    def start_seconds(self, model: str) -> float:
        """Expected seconds of the engine's start: as last time, or the average of the others."""
        others = self._starts.values()
        known = self._starts.get(model) or (sum(others) / len(others) if others else None)
        return max(0.1, known or UNKNOWN_LOAD_SECONDS)

    def load_seconds(self, model: str) -> float | None:
        """Seconds of the model's last load; None if it was never loaded."""
        return self._loads.get(model)

    def retry_after_queue(self, ahead: int) -> int:
        """Seconds until about this many requests have been served, at the recent rate."""
        if len(self._ended) < 2:
            return _bounded(min(ahead, UNKNOWN_LOAD_SECONDS))
        # Until the last one ended: an idle hour before a rush says nothing about the rate.
        seconds = max(1e-3, self._ended[-1] - self._ended[0])
        return _bounded(ahead * seconds / (len(self._ended) - 1))

    def retry_after_load(self, model: str, since: float, now: float) -> int:
        """Seconds until a load that began at `since` should be done; an overdue one is given longer."""
        spent = now - since
        return _bounded(max(self._loads.get(model, UNKNOWN_LOAD_SECONDS) - spent, OVERDUE * spent))


def _bounded(seconds: float) -> int:
    return min(MAX_RETRY_SECONDS, max(1, math.ceil(seconds)))
