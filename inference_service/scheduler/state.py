"""The scheduler's state: the operator's limits, the engines, and the queue of each model."""

from dataclasses import dataclass, field
from enum import StrEnum

from inference_service.scheduler.events import Request

# Engines that were last used within the same stretch of this many seconds are equally old: the one that is
# cheapest to load again is evicted first.
EQUALLY_OLD_SECONDS = 1.0
NEVER = float("inf")


class EngineState(StrEnum):
    """`stopped -> starting -> ready -> draining -> stopping -> stopped`; `sleeping`, and `failed`."""

    STOPPED = "stopped"
    STARTING = "starting"
    READY = "ready"
    DRAINING = "draining"
    STOPPING = "stopping"
    SLEEPING = "sleeping"
    FAILED = "failed"


@dataclass(frozen=True)
class Policy:
    """The operator's limits. Seconds; `memory` in bytes on each device.

    `idle_ttl` None: an idle engine stays; `memory` None: unknown, only slots count. `sleepers`: engines that
    may sleep at once, beside the slots.
    """

    slots: int
    concurrency: int
    queued: int = 1_000_000
    fairness_wait: float = 10.0
    min_residency: float = 5.0
    idle_ttl: float | None = None
    memory: int | None = None
    sleepers: int = 0


@dataclass(eq=False)
class EngineView:
    """What a decision needs of one engine; times on the caller's clock.

    `bytes`: its memory on the device. `ready_at`: since when it serves; `load_seconds`: duration of its load.
    A `pinned` engine is never evicted for another. A load counts as awaited until `awaited_until`, also while
    no request waits for it. `gives_way`: it drains for a waiter, not for the operator. `has_turn`: it is
    being started, and no other engine of its device starts or ends meanwhile. `swap` and `adapters`: see
    Request. `successor`: the next revision that it drains for.

    `asleep_bytes`: see Request. `goes_to_sleep`: it is stopping, but not for good. `slept`: the model that it
    held last; it sleeps, or ends from its sleep, has no slot, and would take `awake_bytes`.
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
    asleep_bytes: int | None = None
    goes_to_sleep: bool = False
    slept: str | None = None
    awake_bytes: int = 0

    @property
    def idle(self) -> bool:
        """It has no leases and may be evicted."""
        return self.state is EngineState.READY and self.leases == 0 and not self.pinned

    @property
    def full_bytes(self) -> int:
        """Its memory on the device while it serves."""
        return self.awake_bytes or self.bytes

    @property
    def leaving(self) -> bool:
        """Its capacity is already assigned."""
        return self.state in (EngineState.DRAINING, EngineState.STOPPING, EngineState.FAILED)

    @property
    def age(self) -> tuple[float, float, float]:
        """The engine with the least is evicted first."""
        return (self.last_used // EQUALLY_OLD_SECONDS, self.load_seconds, self.last_used)


@dataclass
class Claims:
    """What the models that have waited longer need: as many slots, and bytes."""

    models: int = 0
    bytes: int = 0


@dataclass
class Waiting:
    """One request in a queue; `adapter`: see Request."""

    number: int
    since: float
    by_operator: bool
    adapter: str | None


@dataclass
class Queue:
    """The requests that wait for one model, in order of arrival, and what its engine would take.

    `prepared_in`: the engine that prepares to take its weights.
    """

    request: Request
    waiters: dict[int, Waiting] = field(default_factory=dict)
    pinned: bool = False
    fetched: bool = True
    prepared_in: str | None = None

    @property
    def bytes(self) -> int:
        return self.request.bytes

    @property
    def oldest(self) -> Waiting:
        return next(iter(self.waiters.values()))

    @property
    def first(self) -> Waiting | None:
        """The next request to serve: the oldest one whose files are all there."""
        return next((waiter for waiter in self.waiters.values() if waiter.adapter is None), None)

    def fits_into(self, engine: EngineView) -> bool:
        """Whether the engine could take these weights."""
        return self.fetched and self.is_of_kind(engine)

    def is_of_kind(self, engine: EngineView) -> bool:
        """Whether the engine could take these weights once they are there."""
        same = self.request.swap is not None and self.request.swap == engine.swap
        return same and engine.adapters >= self.request.adapters
