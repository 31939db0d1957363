"""Cancels a fetch: the event loop, where its waiters are, cancels a token that its threads check."""

import threading


class Cancelled(Exception):
    """No task waits for the fetch any more. Clients never see this error."""


class CancelToken:
    """Shared by a fetch and its waiters; the fetch checks it before every step that may take long."""

    def __init__(self) -> None:
        self._cancelled = threading.Event()

    @property
    def cancelled(self) -> bool:
        return self._cancelled.is_set()

    def cancel(self) -> None:
        """Cancel, for good. Returns at once."""
        self._cancelled.set()

    def check(self) -> None:
        """Raises Cancelled once cancelled."""
        if self.cancelled:
            raise Cancelled
