"""What the pool holds: slots with their engines, the leases on them, and who waits for one."""

import asyncio
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from inference_service.checkpoints.memory_profile import Footprint
from inference_service.checkpoints.snapshot import Snapshot
from inference_service.engines.base import Engine, Fingerprint
from inference_service.errors import EngineDied
from inference_service.pool.adapters import Adapters, LoadedAdapter
from inference_service.pool.phases import Phases
from inference_service.storage.model import Checkpoint, Model


@dataclass(eq=False)
class Slot:
    """The place of one engine with one model, from the decision to load it until nothing of it is left.

    Its state is the scheduler's. `began` is on the pool's clock; `tasks` is what runs for it: its load and
    the watch over its process, then its teardown. `unloaded`: by the operator. `swapped`: its engine held
    another model before. `fingerprint`: the weight check's.
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
    adapter_rank: int = 0
    leases: set["Lease"] = field(default_factory=set)
    tasks: set[asyncio.Task[None]] = field(default_factory=set)
    gone: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def key(self) -> str:
        """Its engine's name in the scheduler."""
        return self.model.reference


class Lease:
    """One request's hold on a ready engine, and on an adapter there, until `release`."""

    def __init__(self, slot: Slot, released: Callable[["Lease"], None]) -> None:
        self.slot = slot
        self.adapter: LoadedAdapter | None = None
        self._released = released

    @property
    def model(self) -> Model:
        """What the request is served with: the adapter, or the engine's own model."""
        return self.slot.model if self.adapter is None else self.adapter.model

    @property
    def served_name(self) -> str:
        """The host's name of it."""
        return self.slot.model.name if self.adapter is None else self.adapter.served_name

    @property
    def engine(self) -> Engine:
        if self.slot.engine is None:
            raise EngineDied(f"The engine of '{self.model.name}' is gone. Send the request again.")
        return self.slot.engine

    def release(self) -> None:
        """Give the engine back; synchronous, idempotent."""
        self._released(self)


@dataclass(eq=False)
class Waiter:
    """A request that waits for a lease, or the operator's order; `number` counts arrivals.

    `since` is on the pool's clock, `load_by` and `place_by` on the event loop's: when the request gives up
    on a model that is not loaded, and on a place in its engine. `alarm` rings at the earlier of the two; an
    order has none.
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
        """It does not wait any more."""
        if self.alarm is not None:
            self.alarm.cancel()

    @property
    def model(self) -> Checkpoint:
        """The model whose engine serves it: what is wanted, or an adapter's base."""
        return self.wanted.engine_model


@dataclass(frozen=True)
class LoadProgress:
    """How far a model is on its way: what it waits for, percent of that, and seconds until it answers."""

    phase: str
    percent: int | None
    eta_seconds: float | None

    def describe(self) -> dict[str, Any]:
        """As /admin/stats shows it."""
        eta = None if self.eta_seconds is None else round(self.eta_seconds, 1)
        return {"phase": self.phase, "percent": self.percent, "eta_seconds": eta}


# The engine has the request; its first token has not come.
ANSWERING = LoadProgress("answer", None, None)
