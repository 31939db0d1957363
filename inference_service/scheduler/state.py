"""What the scheduler knows: the operator's bounds, the engines, and who waits for which model."""

from dataclasses import dataclass, field
from enum import StrEnum

from inference_service.scheduler.events import Request

# Engines that were last used within the same such stretch of seconds are equally old: the one that is
# cheapest to load again goes first.
EQUALLY_OLD_SECONDS = 1.0
NEVER = float("inf")


class EngineState(StrEnum):
    """`stopped -> starting -> ready -> draining -> stopping -> stopped`, and `failed`."""

    STOPPED = "stopped"
    STARTING = "starting"
    READY = "ready"
    DRAINING = "draining"
    STOPPING = "stopping"
    FAILED = "failed"


@dataclass(frozen=True)
class Policy:
    """The operator's bounds. Seconds; `memory` in bytes on each device.

    None for `idle_ttl`: an idle engine stays; for `memory`: it is not known, slots alone count.
    """

    slots: int
    concurrency: int
    queued: int = 1_000_000
    fairness_wait: float = 10.0
    min_residency: float = 5.0
    idle_ttl: float | None = None
    memory: int | None = None


@dataclass
class EngineView:
    """What a decision needs of one engine; times on the caller's clock.

    `bytes`: what it takes on its device. `ready_at`: since when it serves; `load_seconds`: what its load
    took. A `pinned` engine is never torn down for another. A load is `awaited_until` then also where
    nobody waits for it at the moment. `gives_way`: it drains for a waiter, not for the operator.
    `has_turn`: it is being started, and no other of its device starts or ends meanwhile. `swap` and
    `adapters`: see Request. `successor`: what it drains for is its own next revision.
    """

    key: str
    bytes: int = 0
    pinned: bool = False
    state: EngineState = EngineState.STARTING
    leases: int = 0
    last_used: float = 0.0
    ready_at: float = 0.0
    load_seconds: float = 0.0
    awaited_until: float = 0.0
    gives_way: bool = False
    has_turn: bool = False
    swap: str | None = None
    adapters: int = 0
    successor: str | None = None

    @property
    def idle(self) -> bool:
        """It serves nobody, and may be torn down for another."""
        return self.state is EngineState.READY and self.leases == 0 and not self.pinned

    @property
    def leaving(self) -> bool:
        """Its room is promised already."""
        return self.state in (EngineState.DRAINING, EngineState.STOPPING, EngineState.FAILED)

    @property
    def age(self) -> tuple[float, float, float]:
        """Who gives way first has the least."""
        return (self.last_used // EQUALLY_OLD_SECONDS, self.load_seconds, self.last_used)


@dataclass
class Waiting:
    """One request in a queue; `adapter`: see Request."""

    number: int
    since: float
    by_operator: bool
    adapter: str | None


@dataclass
class Queue:
    """Who waits for one model, in order of arrival, and what its engine would take."""

    request: Request
    waiters: dict[int, Waiting] = field(default_factory=dict)
    pinned: bool = False
    fetched: bool = True

    @property
    def bytes(self) -> int:
        return self.request.bytes

    @property
    def oldest(self) -> Waiting:
        return next(iter(self.waiters.values()))

    @property
    def first(self) -> Waiting | None:
        """Who is next to be served: the oldest that has all its files."""
        return next((waiter for waiter in self.waiters.values() if waiter.adapter is None), None)

    def fits_into(self, engine: EngineView) -> bool:
        """Whether the engine could take these weights."""
        same = self.request.swap is not None and self.request.swap == engine.swap
        return self.fetched and same and engine.adapters >= self.request.adapters
