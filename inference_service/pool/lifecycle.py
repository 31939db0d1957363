"""The life of each engine: its load or its swap, the watch over it, its end.

Carries out the pool's actions on one engine and reports the outcome as events. loader.py performs loads and
teardowns.
"""

import asyncio
import itertools
import logging
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any

from inference_service.checkpoints.snapshot import Snapshot
from inference_service.config import WaitLimit
from inference_service.engines.base import Engine
from inference_service.errors import (
    DiskFull,
    EngineDied,
    EngineError,
    EngineStartFailed,
    LoadTimedOut,
    OutOfMemory,
    ServiceError,
    SnapshotCorrupt,
)
from inference_service.metrics import Metrics
from inference_service.pool import refusals
from inference_service.pool.adapters import Adapters
from inference_service.pool.backoff import LoadBackoff
from inference_service.pool.estimates import Estimates
from inference_service.pool.leases import Lease, Slot
from inference_service.pool.loader import EngineLoader, Parts, Timeouts
from inference_service.pool.phases import Phases
from inference_service.pool.prefetch import Prefetcher
from inference_service.pool.preparation import Preparation
from inference_service.scheduler.events import (
    Asleep,
    Died,
    Event,
    Failed,
    Gone,
    Loaded,
    RoomWanted,
    Starting,
)
from inference_service.scheduler.scheduler import Scheduler
from inference_service.scheduler.state import EngineState
from inference_service.storage.model import Adapter, Checkpoint, Model

logger = logging.getLogger(__name__)

# Errors of a load that a quick retry does not fix; those of a bucket or a disk may pass.
_LASTING = (EngineStartFailed, OutOfMemory, SnapshotCorrupt)
SUSPECT_SECONDS = 0.5
_LEAVING = (EngineState.DRAINING, EngineState.STOPPING, EngineState.FAILED)


@dataclass(frozen=True)
class Limits:
    """Limits on a request's wait for a load and for a place in a loaded engine; seconds of a load, and of an
    engine without progress.

    `adapters`: the maximum number that an engine keeps.
    """

    load_wait: WaitLimit
    place_wait: WaitLimit
    load_timeout: float
    stall_timeout: float = 60.0
    adapters: int = 64


@dataclass(frozen=True)
class Hooks:
    """Callbacks into the pool: for events, for fetches that end ahead of their engine, and what it knows.

    `wanted`: whether a request waits for a reference.
    """

    dispatch: Callable[[Event], None]
    fetched: Callable[[Model, Exception | None], None]
    wanted: Callable[[str], bool]
    pinned: Callable[[Model], bool]


class EngineLifecycle:
    """The slots in use, by their models' references.

    The scheduler owns the state of each engine.
    """

    def __init__(
        self,
        parts: Parts,
        metrics: Metrics,
        scheduler: Scheduler,
        limits: Limits,
        clock: Callable[[], float],
        hooks: Hooks,
    ) -> None:
        self.footprint = parts.footprint
        self.slots: dict[str, Slot] = {}
        self._preparation = Preparation(parts.host_memory, metrics)
        self.prefetcher = Prefetcher(
            self._fetch,
            parts.release,
            clock=clock,
            ended=hooks.fetched,
            wanted=hooks.wanted,
            dropped=self._preparation.unwanted,
            seconds=limits.load_timeout,
        )
        self.backoff = LoadBackoff()
        self.estimates = Estimates()
        self.ending = False
        self._sleepers = itertools.count(1)
        # What engines keep while they sleep, as measured, by swap key.
        self._kept: dict[str | None, int] = {}
        self._parts = parts
        self._metrics = metrics
        self._scheduler = scheduler
        self._limits = limits
        self._clock = clock
        self._dispatch = hooks.dispatch
        self._pinned = hooks.pinned
        self.loading = EngineLoader(
            parts,
            self.prefetcher,
            timeouts=Timeouts(limits.load_timeout, limits.stall_timeout),
            clock=clock,
            starting=self._starting,
            departure=self._departure,
            make_room=self._make_room,
        )

    def asleep_bytes(self, model: Checkpoint) -> int | None:
        """What the model's engine would keep of its device while it sleeps; None: it cannot sleep."""
        expected = self._parts.asleep_bytes(model)
        return None if expected is None else self._kept.get(self._parts.swap_key(model), expected)

    async def _fetch(self, model: Model, entered: Callable[[str], None]) -> Snapshot:
        """The model's files; on a full disk they take the place of what engines only hold ready."""
        while True:
            try:
                return await self._parts.fetch(model, entered)
            except DiskFull as error:
                if error.missing is None or not await self._preparation.give_up():
                    raise

    def state(self, reference: str) -> EngineState:
        """The state of an engine."""
        engine = self._scheduler.engines.get(reference)
        return EngineState.STOPPED if engine is None else engine.state

    def ready(self) -> list[Slot]:
        """The slots with ready engines."""
        return [slot for key, slot in self.slots.items() if self.state(key) is EngineState.READY]

    def load(self, model: Checkpoint) -> None:
        """Start to load the model into a free slot."""
        slot = Slot(model, self.footprint(model), self._clock(), Phases(self._clock))
        self.slots[slot.key] = slot
        self._run(slot, self._serve(slot, self.loading.load(slot)))

    def swap(self, model: Checkpoint, key: str) -> None:
        """Start to swap the model into the unused or sleeping engine of the slot `key`."""
        old = self.slots.pop(key)
        slot = Slot(model, old.footprint, self._clock(), Phases(self._clock), swapped=True)
        # If the swap fails, the fresh engine must take the adapters that the scheduler counts on.
        slot.adapter_rank = self._scheduler.engines[slot.key].adapters
        slot.engine, old.engine = old.engine, None
        slot.measured_bytes = old.measured_bytes
        slot.asleep_bytes = old.asleep_bytes
        self.slots[slot.key] = slot
        for watch in old.tasks:
            watch.cancel()
        if old.adapters is not None:
            old.adapters.close()
        self._run(slot, self._serve(slot, self._swapped_or_loaded(slot, old)))
        old.gone.set()

    def prepare(self, reference: str, key: str) -> None:
        """Have the engine of the slot `key` make ready the weights of a requested model."""
        engine, snapshot = self.slots[key].engine, self.prefetcher.snapshot(reference)
        if engine is not None and snapshot is not None:
            self._preparation.prepare(engine, snapshot, reference)

    def prepared(self) -> list[dict[str, Any]]:
        """The weights that engines hold ready, for the operator."""
        return self._preparation.describe()

    def evict(self, key: str) -> None:
        """Stop an engine without leases, or one that sleeps."""
        slot = self.slots[key]
        if slot.sleeper is None:
            self._metrics.evictions.labels(slot.model.name).inc()
        logger.info("evicting", extra={"model": slot.model.name, "asleep": slot.sleeper is not None})
        self._tear_down(slot)

    def sleep(self, key: str) -> None:
        """Put an engine without leases to sleep; one that cannot is stopped."""
        slot = self.slots[key]
        self._metrics.evictions.labels(slot.model.name).inc()
        self._run(slot, self._sleep_or_end(slot, set(slot.tasks)))

    def cancel(self, key: str) -> None:
        """Cancel a load that no request waits for."""
        logger.info(
            "cancelling the load: no request waits for it", extra={"model": self.slots[key].model.name}
        )
        self._tear_down(self.slots[key])

    def abort_all(self, slot: Slot, error: ServiceError) -> None:
        """Void the leases on a slot and end their replies with `error`."""
        slot.leases.clear()
        if slot.engine is not None:
            slot.engine.abort_all(error)

    def failed(self, model: Model, error: Exception) -> ServiceError:
        """Count a failed load, or a failed fetch ahead of one; returns the error to report."""
        self._metrics.loads.labels(model.name, "failed").inc()
        failure = error if isinstance(error, ServiceError) else refusals.unexplained(model.name, error)
        if isinstance(failure, _LASTING):
            failure.retry_after = self.backoff.failed(model.name, model.revision, failure, self._clock())
        return failure

    def refusal(self, model: Model) -> ServiceError | None:
        """The error if a load of the model failed recently and is not retried yet."""
        return self.backoff.refusal(model.name, model.revision, self._clock())

    async def suspect(self, lease: Lease) -> EngineDied | None:
        """Check an engine that returned an error: if it is dead, no further request is sent to it.

        Returns the error to report if the engine is dead.
        """
        slot = lease.slot
        if lease not in slot.leases or slot.engine is None:
            return None
        try:
            async with asyncio.timeout(SUSPECT_SECONDS):
                await slot.engine.heartbeat()
        except TimeoutError:
            return None  # it hangs or is busy: the watch over it decides
        except EngineError:
            return self._died(slot, "its process ended or its core is dead; the log has the reason")
        return None

    async def close(self) -> None:
        """Stop every engine, busy or not; returns when no process is left."""
        slots = list(self.slots.values())
        if not self.ending:
            self.ending = True
            for slot in slots:
                self.abort_all(slot, refusals.shutting_down())
                # Engines that are already stopping get less time for it.
                self._tear_down(slot)
            self.prefetcher.close()
        await asyncio.gather(*(slot.gone.wait() for slot in slots))
        await self._preparation.close()

    async def _swapped_or_loaded(self, slot: Slot, old: Slot) -> None:
        """The slot's model in the engine of `old`, or in a fresh one if the swap fails."""
        name = slot.model.name
        fields = {"model": name, "revision": slot.model.revision, "instead_of": old.model.reference}
        logger.info("swapping" if old.sleeper is None else "waking", extra=fields)
        try:
            await self.loading.swap(slot, old.snapshot or old.before, old.fingerprint)
        except Exception as error:
            self._metrics.swaps.labels(name, "failed").inc()
            logger.warning("swap failed, loading into a fresh engine: %s", error, extra={"model": name})
            slot.swapped, slot.swap, slot.asleep_bytes = False, None, None
            await self._discard(slot)
            await self.loading.load(slot)
        else:
            self._swapped(slot, old)
        finally:
            if old.snapshot is not None:
                self._parts.release(old.snapshot)

    def _swapped(self, slot: Slot, old: Slot) -> None:
        name, done = slot.model.name, slot.swap
        self._metrics.swaps.labels(name, "ok").inc()
        if done is not None and done.copied_bytes is not None and done.total_bytes is not None:
            ways = {**done.copied_from, "unchanged": done.total_bytes - done.copied_bytes}
            for way, count in ways.items():
                self._metrics.swap_bytes.labels(name, way).inc(count)
        if slot.engine is not None and slot.snapshot is not None:
            before = None if old.snapshot is None else (old.snapshot, old.key)
            self._preparation.swapped(slot.engine, before, (slot.snapshot, slot.key))
        if slot.asleep_bytes is not None:
            self._metrics.sleeps.labels(name, "woken").inc()
            slot.asleep_bytes = None

    async def _discard(self, slot: Slot) -> None:
        engine = slot.engine
        await self.loading.discard(slot)
        if engine is not None:
            self._preparation.ended(engine)

    async def _serve(self, slot: Slot, loading: Coroutine[Any, Any, None]) -> None:
        """An engine's life: its load, then the watch over it until it is stopped or dies."""
        name, started = slot.model.name, time.monotonic()
        logger.info("loading", extra={"model": name, "revision": slot.model.revision})
        try:
            await loading
        except Exception as error:
            self._load_failed(slot, error)
            return
        finally:
            # Another engine may have prepared for it, whichever way it went.
            self._preparation.unwanted(slot.key)
        if self._is(slot, EngineState.STARTING) and slot.engine is not None:
            self._loaded(slot, slot.engine, round(time.monotonic() - started, 3))
            reason = await self.loading.watch(slot, slot.engine)
            self._died(slot, reason)

    def _starting(self, slot: Slot, snapshot: Snapshot) -> None:
        self._dispatch(Starting(slot.key, slot.footprint.total))

    def _loaded(self, slot: Slot, engine: Engine, seconds: float) -> None:
        name = slot.model.name
        slot.load_seconds = seconds
        slot.adapters = Adapters(
            engine,
            take=self.prefetcher.take,
            release=self._parts.release,
            added=self._adapter_added,
            pinned=self._pinned,
            limit=self._limits.adapters,
            clock=self._clock,
        )
        start_seconds = slot.phases.start_seconds
        if not slot.swapped:
            self.estimates.loaded(name, seconds, start_seconds)
            if slot.snapshot is not None:
                self._run(slot, self._parts.loaded(slot.snapshot))
        self.backoff.succeeded(name, slot.model.revision)
        self._metrics.loaded(name, seconds, slot.phases.seconds)
        fields = {"revision": slot.model.revision, "seconds": seconds, "swapped": slot.swapped}
        fields |= {"reserved_bytes": slot.footprint.total, "measured_bytes": slot.measured_bytes}
        if slot.swap is not None and slot.swap.copied_bytes is not None:
            fields |= {"copied_bytes": slot.swap.copied_bytes, "copied_from": dict(slot.swap.copied_from)}
        logger.info("loaded", extra={"model": name, **fields, **slot.phases.describe()})
        self._dispatch(Loaded(slot.key, start_seconds))

    def _adapter_added(self, model: Adapter, phases: Phases) -> None:
        self.backoff.succeeded(model.name, model.revision)
        seconds = round(sum(phases.seconds.values()), 3)
        self._metrics.loaded(model.name, seconds, phases.seconds)
        fields = {"model": model.name, "revision": model.revision, "seconds": seconds}
        logger.info("adapter added", extra={**fields, **phases.describe()})

    def _load_failed(self, slot: Slot, error: Exception) -> None:
        name = slot.model.name
        if not self._is(slot, EngineState.STARTING):  # it failed because it was unloaded
            return
        expected = isinstance(error, ServiceError)
        logger.error("load failed: %s", error, extra={"model": name}, exc_info=not expected)
        failure = self.failed(slot.model, error)
        self._dispatch(Failed(slot.key, failure))
        self._tear_down(slot, hurry=isinstance(failure, LoadTimedOut))

    def _died(self, slot: Slot, reason: str) -> EngineDied | None:
        name = slot.model.name
        if not self._is(slot, EngineState.READY, EngineState.DRAINING, EngineState.SLEEPING):
            return None
        logger.error("engine died: %s", reason, extra={"model": name})
        self._metrics.deaths.labels(name).inc()
        error = refusals.died(name, reason)
        self.abort_all(slot, error)
        self._dispatch(Died(slot.key))
        self._tear_down(slot, hurry=True)
        return error

    def _is(self, slot: Slot, *states: EngineState) -> bool:
        """Whether this very slot is still the model's, in one of these states."""
        return self.slots.get(slot.key) is slot and self.state(slot.key) in states

    async def _departure(self) -> bool:
        """Wait until an engine that is already leaving is gone; False if there is none."""
        leaving = [slot for key, slot in self.slots.items() if self.state(key) in _LEAVING]
        gone = [asyncio.ensure_future(slot.gone.wait()) for slot in leaving]
        if not gone:
            return False
        try:
            await asyncio.wait(gone, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for waiting in gone:
                waiting.cancel()
        return True

    async def _make_room(self, missing: int) -> bool:
        """Stop an engine to free its memory (0) or its snapshot on the disk; False if that would not help."""
        capacity, disk = self._scheduler.capacity, missing > 0
        idle = [self.slots[key] for key in capacity.idle()]
        held = sum(slot.snapshot.bytes for slot in idle if slot.snapshot is not None)
        if not disk:
            idle = [*(self.slots[engine.key] for engine in capacity.sleeping()), *idle]
        if self.ending or not idle or held < missing:
            return False
        self._dispatch(RoomWanted(disk))
        await idle[0].gone.wait()
        return True

    async def _sleep_or_end(self, slot: Slot, running: set[asyncio.Task[None]]) -> None:
        await self._cancelled(running)
        if slot.adapters is not None:
            slot.adapters.close()
        name, unusable = slot.model.name, False
        try:
            kept = await self.loading.sleep(slot)
        except OutOfMemory as error:
            self._metrics.sleeps.labels(name, "no_memory").inc()
            logger.warning("the engine ends instead of sleeping: %s", error, extra={"model": name})
        except Exception as error:
            unusable = True
            self._metrics.sleeps.labels(name, "failed").inc()
            logger.warning("the engine ends, it could not sleep: %s", error, extra={"model": name})
        else:
            # The operator may have unloaded it meanwhile.
            if kept is not None and not slot.unloaded:
                self._asleep(slot, kept)
                return
        await self._end(slot, set(), hurry=unusable)

    def _asleep(self, slot: Slot, kept: int) -> None:
        """The slot is free; its engine keeps `kept` bytes and is watched under a name of its own."""
        name = slot.model.name
        sleeper = Slot(slot.model, slot.footprint, self._clock(), Phases(self._clock))
        sleeper.sleeper, sleeper.asleep_bytes = f"asleep-{next(self._sleepers)}", kept
        sleeper.adapter_rank, sleeper.measured_bytes = slot.adapter_rank, slot.measured_bytes
        sleeper.before, sleeper.fingerprint = slot.snapshot, slot.fingerprint
        self._kept[self._parts.swap_key(slot.model)] = kept
        sleeper.engine, slot.engine = slot.engine, None
        del self.slots[slot.key]
        self.slots[sleeper.key] = sleeper
        if sleeper.engine is not None:
            self._run(sleeper, self._watch_asleep(sleeper, sleeper.engine))
            if slot.snapshot is not None:
                self._preparation.dropped(sleeper.engine, slot.snapshot, slot.key)
                self._parts.release(slot.snapshot)
        self._metrics.sleeps.labels(name, "asleep").inc()
        logger.info("asleep", extra={"model": name, "kept_bytes": kept})
        slot.gone.set()
        self._dispatch(Asleep(slot.key, sleeper.key, kept))

    async def _watch_asleep(self, slot: Slot, engine: Engine) -> None:
        self._died(slot, await self.loading.watch(slot, engine))

    def _tear_down(self, slot: Slot, *, hurry: bool = False) -> None:
        self._run(slot, self._end(slot, set(slot.tasks), hurry=hurry))

    async def _end(self, slot: Slot, running: set[asyncio.Task[None]], *, hurry: bool) -> None:
        """Cancel the slot's tasks, then stop its engine; only then is the slot free."""
        await self._cancelled(running)
        name = slot.model.name
        if slot.adapters is not None:
            slot.adapters.close()
        await self.loading.end(slot, hurry=hurry, last=self.ending)
        if slot.engine is not None:
            self._preparation.ended(slot.engine)
        del self.slots[slot.key]
        slot.engine = None
        slot.gone.set()
        logger.info("unloaded", extra={"model": name})
        self._dispatch(Gone(slot.key))

    async def _cancelled(self, running: set[asyncio.Task[None]]) -> None:
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)

    def _run(self, slot: Slot, work: Coroutine[Any, Any, None]) -> None:
        task: asyncio.Task[None] = asyncio.create_task(work)
        slot.tasks.add(task)
        task.add_done_callback(slot.tasks.discard)
