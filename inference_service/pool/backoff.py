"""Backoff: a model whose load has failed is not loaded again at once, and less and less often.

One per model and revision. Pure: the caller passes the time.
"""

import math
from dataclasses import dataclass

from inference_service.errors import ServiceError
from inference_service.pool.estimates import MAX_RETRY_SECONDS

FIRST_PAUSE_SECONDS = 5.0
LONGEST_PAUSE_SECONDS = 300.0


@dataclass(frozen=True)
class _Failures:
    revision: str
    count: int
    error: ServiceError
    until: float


class LoadBackoff:
    """Recently failed loads, by model."""

    def __init__(self) -> None:
        self._failures: dict[str, _Failures] = {}

    def failed(self, model: str, revision: str, error: ServiceError, now: float) -> int:
        """Record a failed load; seconds until the next try, doubled with each failure of a revision."""
        before = self._failures.get(model)
        count: int = before.count + 1 if before is not None and before.revision == revision else 1
        pause: float = min(LONGEST_PAUSE_SECONDS, FIRST_PAUSE_SECONDS * 2 ** (count - 1))
        # A copy: the error itself keeps the first request alive.
        kept = error.again(error.message, retry_after=None)
        self._failures[model] = _Failures(revision, count, kept, now + pause)
        return min(MAX_RETRY_SECONDS, math.ceil(pause))

    def succeeded(self, model: str, revision: str) -> None:
        failures = self._failures.get(model)
        if failures is not None and failures.revision == revision:
            del self._failures[model]

    def refusal(self, model: str, revision: str, now: float) -> ServiceError | None:
        """The last load's error while no retry is due; None otherwise, and for another revision."""
        failures = self._failures.get(model)
        if failures is None or failures.revision != revision or now >= failures.until:
            return None
        wait = math.ceil(failures.until - now)
        times = "once" if failures.count == 1 else f"{failures.count} times in a row"
        error = failures.error
        stop = "" if error.message.endswith((".", "!", "?")) else "."
        again = f"It failed {times}; it is tried again in {wait} s, or with a new upload."
        return error.again(f"{error.message}{stop} {again}", retry_after=min(MAX_RETRY_SECONDS, wait))

    def describe(self, now: float) -> dict[str, dict[str, object]]:
        """Models that are held back, for /admin/stats."""
        return {
            model: {
                "revision": failures.revision,
                "failures": failures.count,
                "retry_in_seconds": round(failures.until - now, 1),
                "reason": failures.error.message,
            }
            for model, failures in self._failures.items()
            if failures.until > now
        }
