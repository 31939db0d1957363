"""Slots with their engines, the leases on them, and the waiters."""

import asyncio
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from inference_service.checkpoints.memory_profile import Footprint
from inference_service.checkpoints.snapshot import Snapshot
from inference_service.engines.base import Engine, Fingerprint, Swapped
from inference_service.errors import EngineDied
from inference_service.pool.adapters import Adapters, LoadedAdapter
from inference_service.pool.phases import Phases
from inference_service.storage.model import Checkpoint, Model


@dataclass(eq=False)
class Slot:
    """The slot of one engine with one model, from the decision to load it until its process is gone.

    The scheduler owns its state. `began` is on the pool's clock; `tasks` run for it: its load, the watch over
    its process, its teardown. `unloaded`: by the operator. `swapped`: its engine held another model before;
    `swap`: how that went. `measured_bytes`: what its engine took, None if unknown. `fingerprint`: the weight
    check's. `adapter_rank`: a fresh engine must take adapters of at least this rank. `sleeper`: the name of
    the engine while it sleeps, its model and `before`, a snapshot that is not held, then the last ones;
    `asleep_bytes`: what it keeps of its device.
    """

    model: Checkpoint
    footprint: Footprint
    began: float
    phases: Phases
    snapshot: Snapshot | None = None
    engine: Engine | None = None
    adapters: Adapters | None = None
    fingerprint: Fingerprint | None = None
    load_seconds: float | None = None
    unloaded: bool = False
    swapped: bool = False
    swap: Swapped | None = None
    measured_bytes: int | None = None
    adapter_rank: int = 0
    sleeper: str | None = None
    asleep_bytes: int | None = None
    before: Snapshot | None = None
    leases: set["Lease"] = field(default_factory=set)
    tasks: set[asyncio.Task[None]] = field(default_factory=set)
    gone: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def key(self) -> str:
        """Its engine's key in the scheduler."""
        return self.sleeper or self.model.reference


class Lease:
    """One request's hold on a ready engine, and on an adapter there, until `release`."""

    def __init__(self, slot: Slot, released: Callable[["Lease"], None]) -> None:
        self.slot = slot
        self.adapter: LoadedAdapter | None = None
        self._released = released

    @property
    def model(self) -> Model:
        """What serves the request: the adapter, or the engine's own model."""
        return self.slot.model if self.adapter is None else self.adapter.model

    @property
    def served_name(self) -> str:
        """Its name in the host."""
        return self.slot.model.name if self.adapter is None else self.adapter.served_name

    @property
    def engine(self) -> Engine:
        if self.slot.engine is None:
            raise EngineDied(f"The engine of '{self.model.name}' is gone. Send the request again.")
        return self.slot.engine

    def release(self) -> None:
        """Release the engine; synchronous, idempotent."""
        self._released(self)


@dataclass(eq=False)
class Waiter:
    """A request that waits for a lease, or an operator's load; `number` counts arrivals.

    `since` is on the pool's clock, `load_by` and `place_by` on the event loop's: when the request gives up
    waiting for a load, and for a place in its engine. `alarm` fires at the earlier of the two; an operator's
    load has none. `exact`: this very revision was requested.
    """

    number: int
    wanted: Model
    since: float
    lease: asyncio.Future[Lease]
    by_operator: bool = False
    exact: bool = False
    load_by: float = math.inf
    place_by: float = math.inf
    alarm: asyncio.TimerHandle | None = None

    def calm(self) -> None:
        """It no longer waits."""
        if self.alarm is not None:
            self.alarm.cancel()

    @property
    def model(self) -> Checkpoint:
        """The model whose engine serves it: the requested one, or an adapter's base."""
        return self.wanted.engine_model


@dataclass(frozen=True)
class LoadProgress:
    """Progress of a load: its phase, percent of that, and seconds until the model answers."""

    phase: str
    percent: int | None
    eta_seconds: float | None

    def describe(self) -> dict[str, Any]:
        """For /admin/stats."""
        eta = None if self.eta_seconds is None else round(self.eta_seconds, 1)
        return {"phase": self.phase, "percent": self.percent, "eta_seconds": eta}


# The engine has the request and has not sent a token yet.
ANSWERING = LoadProgress("answer", None, None)
