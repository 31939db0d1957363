"""The phases of a load, and how long each took.

The first three belong to the fetch, `memory` is the wait for it, `start` to `warm-up`
happen in the host, which may name others between and after them.
"""

from collections.abc import Callable, Mapping
from enum import StrEnum


class Phase(StrEnum):
    LIST = "list"
    SYNC = "sync"
    VERIFY = "verify"
    MEMORY = "memory"
    START = "start"
    WEIGHTS = "weights"
    WARM_UP = "warm-up"
    WEIGHT_CHECK = "weight-check"


FETCH_PHASES = frozenset({Phase.LIST, Phase.SYNC, Phase.VERIFY})


class Phases:
    """The current phase of a load, since when (on the caller's clock), and seconds of earlier phases."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self.current: Phase | None = None
        self.began = clock()
        self.seconds: dict[str, float] = {}

    def enter(self, phase: Phase | None) -> None:
        """Enter a phase; None: all have ended."""
        now = self._clock()
        if self.current is not None:
            self.add(self.current, now - self.began)
        self.current, self.began = phase, now

    def add(self, phase: str, seconds: float) -> None:
        self.seconds[phase] = self.seconds.get(phase, 0.0) + seconds

    def replace(self, phase: Phase, parts: Mapping[str, float], ended: float) -> None:
        """Replace `phase` by several that began at these times and ended at `ended`, on another clock."""
        self.seconds.pop(phase, None)
        moments = [*parts.values(), ended]
        for name, began, until in zip(parts, moments, moments[1:], strict=False):
            self.add(name, until - began)

    @property
    def start_seconds(self) -> float:
        """Seconds of the engine's start without the fetch."""
        return sum(seconds for phase, seconds in self.seconds.items() if phase not in FETCH_PHASES)

    def describe(self) -> dict[str, float]:
        """For the log and /admin/stats."""
        return {phase: round(seconds, 3) for phase, seconds in self.seconds.items()}
