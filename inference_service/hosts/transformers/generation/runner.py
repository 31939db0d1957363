"""Runs sequences on a model: many together (continuous_batching.py) or one at a time (sequential.py)."""

from contextlib import AbstractContextManager
from typing import Any, Protocol

from inference_service.hosts.transformers.generation.sequence import Sequence


class RunnerDead(Exception):
    """The runner's thread has ended; the host is unusable."""


class Runner(Protocol):
    """Owns the thread in which the model runs, and all access to the model."""

    @property
    def running(self) -> int:
        """The number of sequences that are neither finished nor cancelled."""
        ...

    @property
    def steps(self) -> int:
        """A number that changes with every step of the model."""
        ...

    def is_alive(self) -> bool: ...

    def submit(self, sequence: Sequence) -> None:
        """Run a sequence. Raises RunnerDead."""
        ...

    def cancel(self, sequence: Sequence) -> None:
        """Drop a sequence and its cache before the next step; idempotent."""
        ...

    def exclusive(self) -> AbstractContextManager[Any]:
        """Exclusive access to the model for this thread, between two steps. Blocks. Raises RunnerDead."""
        ...

    def forget(self) -> None:
        """Drop the cache; running sequences fail. Only inside `exclusive`."""
        ...

    def close(self) -> None:
        """End the thread; running sequences fail."""
        ...
