"""Whether a fetch is still wanted: who waits for it, in the event loop, tells its threads by an order."""

import threading


class Withdrawn(Exception):
    """Nobody waits for the fetch any more. No client ever sees it."""


class Order:
    """What a fetch was begun for; it looks here at every step that may take its time."""

    def __init__(self) -> None:
        self._withdrawn = threading.Event()

    @property
    def withdrawn(self) -> bool:
        return self._withdrawn.is_set()

    def withdraw(self) -> None:
        """Nobody waits any more. Returns at once; for good."""
        self._withdrawn.set()

    def check(self) -> None:
        """Raises Withdrawn once nobody waits."""
        if self.withdrawn:
            raise Withdrawn
