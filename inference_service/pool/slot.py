"""What the pool holds: slots with their engines, the leases on them, and who waits for one."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from inference_service.engines.base import Engine, Footprint, Snapshot
from inference_service.errors import EngineDied
from inference_service.storage.model import Model


class Phase(StrEnum):
    """How far a load is."""

    FETCH = "fetch"
    MEMORY = "memory"
    START = "start"


@dataclass(eq=False)
class Slot:
    """The place of one engine, from the decision to load it until nothing of it is left.

    Its state is the scheduler's. `began` and `phase_began` are on the pool's clock; `tasks` is what runs for
    it: its load and the watch over its process, then its teardown. `unloaded`: by the operator.
    """

    model: Model
    footprint: Footprint
    began: float
    phase: Phase = Phase.FETCH
    phase_began: float = 0.0
    snapshot: Snapshot | None = None
    engine: Engine | None = None
    load_seconds: float | None = None
    unloaded: bool = False
    leases: set["Lease"] = field(default_factory=set)
    tasks: set[asyncio.Task[None]] = field(default_factory=set)
    gone: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def revision(self) -> str:
        return (self.snapshot or self.model).revision


class Lease:
    """One request's hold on a ready engine, until `release`."""

    def __init__(self, slot: Slot, released: Callable[["Lease"], None]) -> None:
        self.slot = slot
        self._released = released

    @property
    def model(self) -> str:
        return self.slot.model.name

    @property
    def revision(self) -> str:
        return self.slot.revision

    @property
    def engine(self) -> Engine:
        if self.slot.engine is None:
            raise EngineDied(f"The engine of '{self.model}' is gone. Send the request again.")
        return self.slot.engine

    def release(self) -> None:
        """Give the engine back; synchronous, idempotent."""
        self._released(self)


@dataclass(eq=False)
class Waiter:
    """A request that waits for a lease, or the operator's order; `number` counts arrivals."""

    number: int
    model: Model
    since: float
    lease: asyncio.Future[Lease]
    order: bool = False


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
