"""Whether a fetch is still wanted: who waits for it, in the event loop, tells its threads by an order."""

import threading


class Cancelled(Exception):
    """Nobody waits for the fetch any more. No client ever sees it."""


class CancelToken:
    """What a fetch was begun for; it looks here at every step that may take its time."""

    def __init__(self) -> None:
        self._cancelled = threading.Event()

    @property
    def cancelled(self) -> bool:
        return self._cancelled.is_set()

    def cancel(self) -> None:
        """Nobody waits any more. Returns at once; for good."""
        self._cancelled.set()

    def check(self) -> None:
        """Raises Withdrawn once nobody waits."""
        if self.cancelled:
            raise Cancelled
