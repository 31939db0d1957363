"""What runs sequences on a model: many together (continuous.py) or one at a time (single.py)."""

from contextlib import AbstractContextManager
from typing import Any, Protocol

from inference_service.hosts.transformers.generation.sequence import Sequence


class RunnerDead(Exception):
    """The runner's thread has ended; the host is of no use any more."""


class Runner(Protocol):
    """Owns the thread in which the model runs, and with it every use of the model."""

    @property
    def running(self) -> int:
        """Sequences that are neither finished nor cancelled."""
        ...

    @property
    def steps(self) -> int:
        """A number that changes with every step of the model."""
        ...

    def is_alive(self) -> bool: ...

    def submit(self, sequence: Sequence) -> None:
        """Run a sequence; raises RunnerDead."""
        ...

    def cancel(self, sequence: Sequence) -> None:
        """Drop a sequence and its cache before the next step; idempotent."""
        ...

    def exclusive(self) -> AbstractContextManager[Any]:
        """The model to the caller's thread alone, between two steps. Blocks; raises RunnerDead."""
        ...

    def forget(self) -> None:
        """Drop what the cache holds; sequences that run fail. Only inside `exclusive`."""
        ...

    def close(self) -> None:
        """End the thread; sequences that run fail."""
        ...
