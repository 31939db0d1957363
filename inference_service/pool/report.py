"""The pool's own report: progress of loads, and the operator's statistics."""

import asyncio
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

from inference_service.engines.base import About, Engine
from inference_service.errors import EngineError
from inference_service.pool.leases import LoadProgress, Slot, Waiter
from inference_service.pool.lifecycle import EngineLifecycle
from inference_service.scheduler.scheduler import Scheduler
from inference_service.scheduler.state import EngineState
from inference_service.storage.model import Model

HEARTBEAT_SECONDS = 1.0


class Report:
    """Reads the scheduler, the engines and the waiters (by number); changes nothing."""

    def __init__(
        self,
        scheduler: Scheduler,
        lifecycle: EngineLifecycle,
        waiters: Mapping[int, Waiter],
        pins: Mapping[str, bool],
        clock: Callable[[], float],
    ) -> None:
        self._scheduler = scheduler
        self._lifecycle = lifecycle
        self._waiters = waiters
        self._pins = pins
        self._clock = clock

    def progress(self, model: Model) -> LoadProgress:
        """The progress of a requested model; of an adapter, first its engine's, then its files'."""
        engine = model.engine_model
        slot, state = self._lifecycle.slots.get(engine.reference), self._lifecycle.state(engine.reference)
        start_seconds = self._lifecycle.estimates.start_seconds(engine.name)
        if slot is None:
            if self._lifecycle.prefetcher.is_under_way(engine.reference):
                return self._lifecycle.loading.fetch_progress(engine, start_seconds)
            return LoadProgress("queue", None, self._lifecycle.estimates.load_seconds(engine.name))
        if state is EngineState.STARTING:
            return self._lifecycle.loading.progress(slot, start_seconds)
        if state is EngineState.READY and self._lifecycle.prefetcher.is_under_way(model.reference):
            return self._lifecycle.loading.fetch_progress(model, 0.0)
        return LoadProgress("queue" if state is EngineState.READY else "drain", None, None)

    def count_by_state(self) -> dict[str, int]:
        """Number of engines in each state, zeros included."""
        found = Counter(engine.state for engine in self._scheduler.engines.values())
        return {state.value: found[state] for state in EngineState if state is not EngineState.STOPPED}

    def notes(self) -> dict[str, list[str]]:
        """The hosts' notes about how their models run."""
        by_model = {
            slot.model.name: slot.engine.about.notes for slot in self._lifecycle.ready() if slot.engine
        }
        return {name: list(notes) for name, notes in by_model.items() if notes}

    async def stats(self) -> dict[str, Any]:
        """Slots, budget, engines, waiters and the next evictions, for the operator."""
        now, policy = self._clock(), self._scheduler.policy
        slots = list(self._lifecycle.slots.values())
        # All at once: an engine may be gone by the time the others have answered.
        described = [self._engine(slot, now) for slot in slots]
        ready = self._lifecycle.ready()
        reserved = sum(engine.bytes for engine in self._scheduler.engines.values())
        running = await asyncio.gather(*(_running(slot.engine if slot in ready else None) for slot in slots))
        awake = [engine for engine in self._scheduler.engines.values() if engine.slept is None]
        return {
            "slots": {"total": policy.slots, "used": len(awake)},
            "budget": {"total_bytes": policy.memory, "reserved_bytes": reserved},
            "engines": [{**each, "running": count} for each, count in zip(described, running, strict=True)],
            "leases": self._scheduler.running,
            "max_concurrent_requests": policy.concurrency,
            "max_queued_requests": policy.queued,
            "backoff": self._lifecycle.backoff.describe(now),
            "victims": [
                self._lifecycle.slots[key].model.name for key in self._scheduler.capacity.victims(now)
            ],
            "pins": dict(self._pins),
            "prepared": self._lifecycle.prepared(),
            "waiters": [self._waiter(waiter, now) for waiter in self._waiters.values()],
        }

    def __str__(self) -> str:
        lifecycle = self._lifecycle
        engines = [
            f"{slot.model.name}:{lifecycle.state(key)}({len(slot.leases)})"
            for key, slot in lifecycle.slots.items()
        ]
        waiting = " ".join(waiter.wanted.name for waiter in self._waiters.values())
        return f"{' '.join(engines) or 'empty'} | waiting: {waiting or 'none'}"

    def _waiter(self, waiter: Waiter, now: float) -> dict[str, Any]:
        return {
            "model": waiter.wanted.name,
            "operator": waiter.by_operator,
            "age_seconds": round(now - waiter.since, 3),
            **self.progress(waiter.wanted).describe(),
        }

    def _engine(self, slot: Slot, now: float) -> dict[str, Any]:
        view = self._scheduler.engines[slot.key]
        about = About() if slot.engine is None else slot.engine.about
        described = {
            "model": slot.model.name,
            "revision": slot.model.revision,
            "pinned": view.pinned,
            "state": view.state.value,
            "leases": len(slot.leases),
            "process_id": None if slot.engine is None else slot.engine.process_id,
            "backend": about.backend,
            "notes": list(about.notes),
            "load_seconds": slot.load_seconds,
            "phases": slot.phases.describe(),
            "swapped": slot.swapped,
            "copied_bytes": None if slot.swap is None else slot.swap.copied_bytes,
            "copied_from": {} if slot.swap is None else dict(slot.swap.copied_from),
            "swap_key": view.swap,
            "adapter_rank": view.adapters,
            "adapters": [] if slot.adapters is None else slot.adapters.describe(),
            "idle_seconds": None if slot.leases else round(now - view.last_used, 3),
            "bytes": slot.model.bytes,
            "memory": asdict(slot.footprint),
            "measured_bytes": slot.measured_bytes,
            "asleep_bytes": slot.asleep_bytes,
        }
        if view.state is EngineState.STARTING:
            described["loading"] = self.progress(slot.model).describe()
        return described


async def _running(engine: Engine | None) -> int | None:
    """The engine's own count; None if it does not answer in time."""
    if engine is None:
        return None
    try:
        async with asyncio.timeout(HEARTBEAT_SECONDS):
            return (await engine.heartbeat()).running
    except (EngineError, TimeoutError):
        return None
