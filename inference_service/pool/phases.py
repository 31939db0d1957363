"""The phases of a load, and how long each took.

The first three are the fetch's, `memory` is the wait for it, `start` to `warm-up` happen in the host.
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
    """What one load is at, since when (on the caller's clock), and the seconds of what lies behind it."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self.current: Phase | None = None
        self.began = clock()
        self.seconds: dict[str, float] = {}

    def enter(self, phase: Phase | None) -> None:
        """The phase before has ended; None: all have."""
        now = self._clock()
        if self.current is not None:
            self.add(self.current, now - self.began)
        self.current, self.began = phase, now

    def add(self, phase: str, seconds: float) -> None:
        self.seconds[phase] = self.seconds.get(phase, 0.0) + seconds

    def replace(self, phase: Phase, parts: Mapping[str, float], ended: float) -> None:
        """`phase` was several, which began at these moments and ended at `ended`, on a clock of their own."""
        self.seconds.pop(phase, None)
        moments = [*parts.values(), ended]
        for name, began, until in zip(parts, moments, moments[1:], strict=False):
            self.add(name, until - began)

    @property
    def start_seconds(self) -> float:
        """What an engine with its files at hand took."""
        return sum(seconds for phase, seconds in self.seconds.items() if phase not in FETCH_PHASES)

    def describe(self) -> dict[str, float]:
        """As the log and /admin/stats show them."""
        return {phase: round(seconds, 3) for phase, seconds in self.seconds.items()}
