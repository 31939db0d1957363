"""Carries out loads, swaps and teardowns: fetch, memory, start, weight check; then the watch; then the end.

One engine of a device starts or ends at a time, and none starts before its memory is measured to be free.
Makes no decisions; reports to the pool by returning or raising.
"""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from inference_service.checkpoints.memory_profile import Footprint
from inference_service.checkpoints.snapshot import Snapshot
from inference_service.engines.base import Engine, Fingerprint
from inference_service.errors import (
    DiskFull,
    EngineDied,
    EngineError,
    EngineStartFailed,
    LoadTimedOut,
    OutOfMemory,
    SwapFailed,
    readable_bytes,
)
from inference_service.pool.leases import LoadProgress, Slot
from inference_service.pool.phases import FETCH_PHASES, Phase
from inference_service.pool.prefetch import FetchModel, Prefetcher
from inference_service.pool.preparation import HostMemory
from inference_service.pool.weight_check import WeightChecks, implausible
from inference_service.storage.model import Checkpoint, Model
from inference_service.storage.snapshots.progress import Progress

logger = logging.getLogger(__name__)

LAST_GRACE_SECONDS = 0.6
# An engine falls asleep in less than one; it has the device's turn meanwhile.
SLEEP_SECONDS = 10.0
# The driver frees memory a moment after the process is gone.
MEMORY_SECONDS = 5.0
# A swap may take this many times ENGINE_STALL_TIMEOUT.
SWAP_STALLS = 2
_MEMORY_POLL_INTERVAL = 0.1
_HEARTBEAT_SECONDS = 1.0


async def _unknown_use(leader: int | None, free_before: int | None) -> None:
    """By default."""


async def _nothing_lacks(leader: int | None) -> int:
    """By default."""
    return 0


async def _nothing_to_do(snapshot: Snapshot) -> None:
    """By default."""


@dataclass(frozen=True)
class Parts:
    """The parts of a load. `free_bytes`: the device's free memory; None if unknown.

    `footprint`: the memory that a model's engine would take.
    `swap_key`: models with the same key can replace each other in an engine; None: it cannot be swapped.
    `weight_checks`: None if no fingerprints are kept. `host_memory`: for weights that are made ready
    ahead of a swap. `loaded` runs beside an engine that has just loaded a snapshot.
    `used_bytes`: what an engine has taken of its device, from the leader of its process group and what was
    free before its start. `asleep_bytes`: what a model's engine is expected to keep of its device while it
    sleeps; None: it cannot sleep. `lacking_beside`: bytes that the machine's memory lacks for another process
    group like the one with this leader.
    """

    fetch: FetchModel
    release: Callable[[Snapshot], None]
    make_engine: Callable[[Snapshot, Footprint], Engine]
    free_bytes: Callable[[], Awaitable[int | None]]
    footprint: Callable[[Checkpoint], Footprint]
    fetching: Callable[[Model], Progress | None] = lambda model: None
    swap_key: Callable[[Checkpoint], str | None] = lambda model: None
    weight_checks: WeightChecks | None = None
    host_memory: HostMemory = field(default_factory=HostMemory)
    used_bytes: Callable[[int | None, int | None], Awaitable[int | None]] = _unknown_use
    loaded: Callable[[Snapshot], Coroutine[Any, Any, None]] = _nothing_to_do
    asleep_bytes: Callable[[Checkpoint], int | None] = lambda model: None
    lacking_beside: Callable[[int | None], Awaitable[int]] = _nothing_lacks


class Timeouts(NamedTuple):
    """Seconds that a load may take, and that an engine with work may make no progress."""

    load: float
    stall: float


class EngineLoader:
    """The loads and teardowns of one device.

    `starting` is called when a slot has the device's turn, with its snapshot. `departure` waits for an engine
    that is already leaving, False if there is none. `make_room` is called if so many bytes on the disk, or
    memory (0), are missing: it stops one idle engine and returns once that is gone, or False if that would
    not help.
    """

    def __init__(
        self,
        parts: Parts,
        prefetcher: Prefetcher,
        *,
        timeouts: Timeouts,
        clock: Callable[[], float],
        starting: Callable[[Slot, Snapshot], None],
        departure: Callable[[], Awaitable[bool]],
        make_room: Callable[[int], Awaitable[bool]],
    ) -> None:
        self._parts = parts
        self._prefetcher = prefetcher
        self._load_timeout, self._stall_timeout = timeouts
        self._clock = clock
        self._starting = starting
        self._departure = departure
        self._make_room = make_room
        self._device_turn = asyncio.Lock()
        # Wakes that have begun and that have ended: they take memory without the device's turn.
        self._wakes = self._woken = 0

    async def load(self, slot: Slot) -> None:
        """Returns once the engine answers; raises what the fetch raised, EngineStartFailed, OutOfMemory."""
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(self._load_timeout) as limit:
                if slot.snapshot is None:
                    slot.snapshot = await self._fetched(slot)
                left = (limit.when() or 0.0) - loop.time()
                slot.phases.enter(Phase.MEMORY)
                while True:
                    limit.reschedule(None)  # the device's turn of other engines does not count
                    async with self._device_turn:
                        self._starting(slot, slot.snapshot)
                        missing = await self._missing_memory(slot)
                        if missing <= 0:
                            limit.reschedule(loop.time() + left)
                            return await self._start_and_try(slot, slot.snapshot)
                    # Outside the turn, which another engine's teardown needs.
                    await self._find_memory(slot, missing)
        except TimeoutError as error:
            raise LoadTimedOut(
                f"'{slot.model.name}' did not load within {self._load_timeout:g} s (LOAD_TIMEOUT); it was in "
                f"the phase '{_phase(slot)}'."
            ) from error

    async def swap(self, slot: Slot, before: Snapshot | None, fingerprint: Fingerprint | None) -> None:
        """Put the slot's model into its engine, which held the snapshot `before`, or sleeps.

        Raises SwapFailed, EngineDied, and what the fetch raises: the engine is unusable then.
        """
        try:
            if slot.asleep_bytes is None:
                slot.snapshot, fetched = await self._prefetcher.take(slot.model)
                slot.phases.seconds |= fetched.seconds
            else:
                slot.snapshot = await self._fetched(slot)
                await self._memory_to_wake(slot, slot.footprint.total - slot.asleep_bytes)
            # A host that hangs is replaced by a fresh one, which is faster.
            seconds = min(self._load_timeout, SWAP_STALLS * self._stall_timeout)
            async with asyncio.timeout(seconds):
                engine = slot.engine
                if engine is None:
                    raise SwapFailed("there is no engine")
                slot.phases.enter(Phase.WEIGHTS)
                with self._noted(slot):
                    swapped = await engine.swap(slot.snapshot)
        except TimeoutError as error:
            raise SwapFailed(f"it took longer than {seconds:g} s") from error
        slot.phases.enter(None)
        spent = slot.phases.seconds.pop(Phase.WEIGHTS)
        for phase, seconds in swapped.seconds.items():
            slot.phases.add(phase, seconds)
        slot.phases.add(Phase.WEIGHT_CHECK, max(0.0, spent - sum(swapped.seconds.values())))
        first, same = None, False
        if self._parts.weight_checks is not None:
            first, same = await self._parts.weight_checks.of_swap(before, slot.snapshot)
        # An engine wakes with the model that it slept with.
        again = before is not None and (before.model, before.revision) == (
            slot.snapshot.model,
            slot.snapshot.revision,
        )
        reason = implausible(swapped.fingerprint, first, fingerprint, same_weights=same or again)
        if reason is not None:
            raise SwapFailed(reason)
        slot.fingerprint = swapped.fingerprint
        slot.swap = swapped

    async def sleep(self, slot: Slot) -> int | None:
        """Put the slot's engine to sleep; returns the bytes that it keeps of its device, None if it cannot.

        Raises OutOfMemory, before anything was done, if the machine's memory does not allow another engine
        beside it; EngineError if the engine is unusable then.
        """
        engine, seconds = slot.engine, min(SLEEP_SECONDS, self._stall_timeout)
        if engine is None:
            raise EngineError("there is no engine")
        async with self._device_turn:
            lacking = await self._parts.lacking_beside(engine.process_id)
            if lacking > 0:
                raise OutOfMemory(
                    f"another beside it lacks {readable_bytes(lacking)} of the machine's memory"
                )
            try:
                async with asyncio.timeout(seconds):
                    freed = await engine.sleep()
            except TimeoutError as error:
                raise EngineError(f"it took longer than {seconds:g} s") from error
        taken = slot.measured_bytes or slot.footprint.total
        return None if freed is None else min(taken, max(0, taken - freed))

    def progress(self, slot: Slot, start_seconds: float) -> LoadProgress:
        """The progress of a load whose start takes `start_seconds`."""
        phase = _phase(slot)
        if phase in FETCH_PHASES or slot.phases.current is None:
            return self.fetch_progress(slot.model, start_seconds)
        if slot.phases.current is Phase.MEMORY:
            return LoadProgress(phase, None, start_seconds)
        spent = self._clock() - slot.phases.began
        percent = min(99, int(100 * spent / start_seconds))
        return LoadProgress(phase, percent, start_seconds - spent if spent < start_seconds else None)

    def fetch_progress(self, model: Model, start_seconds: float) -> LoadProgress:
        """The progress of a model's download."""
        fetch, under_way = self._prefetcher.get(model.reference), self._parts.fetching(model)
        phase = fetch.phases.current or Phase.VERIFY if fetch is not None else Phase.SYNC
        if under_way is None:
            return LoadProgress(phase, None, start_seconds)
        left = under_way.eta_seconds
        return LoadProgress(phase, under_way.percent, None if left is None else left + start_seconds)

    async def watch(self, slot: Slot, engine: Engine) -> str:
        """Returns, with the reason, once the engine is unusable: its process ended, or it hangs."""
        death = asyncio.ensure_future(engine.wait_dead())
        stall = asyncio.ensure_future(self._stall(slot, engine))
        try:
            await asyncio.wait({death, stall}, return_when=asyncio.FIRST_COMPLETED)
            return death.result() if death.done() else stall.result()
        finally:
            death.cancel()
            stall.cancel()

    async def end(self, slot: Slot, *, hurry: bool, last: bool) -> None:
        """Stop the slot's engine; returns when its process is gone.

        `hurry`: it is dead or hangs and is killed at once; `last`: the service itself ends. These, and
        engines that the operator unloads, do not wait for the device's turn.
        """
        try:
            if slot.engine is None:
                pass  # its files were still being fetched
            elif hurry or last:
                await slot.engine.close(0.0 if hurry else LAST_GRACE_SECONDS)
            elif slot.unloaded:
                await slot.engine.close()
            else:
                async with self._device_turn:
                    await slot.engine.close()
        except Exception:
            logger.exception("engine did not close cleanly", extra={"model": slot.model.name})
        # Not if the teardown was cancelled: it is then started again, with less time.
        if slot.snapshot is not None:
            self._parts.release(slot.snapshot)

    async def discard(self, slot: Slot) -> None:
        """Stop the slot's engine, whose swap failed, so that a fresh one can be loaded."""
        if slot.engine is not None:
            await slot.engine.close(0.0)
            slot.engine = None

    async def _fetched(self, slot: Slot) -> Snapshot:
        """The snapshot; if the disk is full of other snapshots, idle engines are stopped for theirs."""
        while True:
            try:
                snapshot, phases = await self._prefetcher.take(slot.model)
                slot.phases.seconds |= phases.seconds
                return snapshot
            except DiskFull as error:
                if error.missing is None:
                    raise
                if not await self._departure() and not await self._make_room(error.missing):
                    raise

    async def _start_and_try(self, slot: Slot, snapshot: Snapshot) -> None:
        slot.phases.enter(Phase.START)
        woken, free_before = self._woken, await self._parts.free_bytes()
        rank = max(snapshot.adapter_rank, slot.adapter_rank)
        slot.engine = self._parts.make_engine(replace(snapshot, adapter_rank=rank), slot.footprint)
        await slot.engine.start()
        slot.phases.enter(Phase.WEIGHT_CHECK)
        slot.phases.replace(Phase.START, slot.engine.phases, time.monotonic())
        try:
            slot.fingerprint = await slot.engine.weight_check()
        except SwapFailed as error:
            raise EngineStartFailed(
                f"The engine of '{slot.model.name}' does not compute: {error.message}", param="model"
            ) from error
        slot.phases.enter(None)
        used = await self._parts.used_bytes(slot.engine.process_id, free_before)
        slot.measured_bytes = used if woken == self._wakes else None
        if self._parts.weight_checks is None:
            return
        first = await self._parts.weight_checks.of_load(snapshot, slot.fingerprint)
        reason = implausible(slot.fingerprint, first, None, same_weights=True)
        if reason is not None:
            logger.warning("%s; the fresh load is trusted", reason, extra={"model": slot.model.name})

    async def _missing_memory(self, slot: Slot) -> int:
        """Bytes that the device lacks right now; 0 if that cannot be measured."""
        free = await self._parts.free_bytes()
        return 0 if free is None else max(0, slot.footprint.total - free)

    async def _find_memory(self, slot: Slot, missing: int) -> None:
        """Returns when it is worth measuring again: an engine has left, or memory was freed.

        Raises OutOfMemory if no engine of this service holds any.
        """
        if await self._departure():
            return
        loop = asyncio.get_running_loop()
        deadline = loop.time() + MEMORY_SECONDS
        while loop.time() < deadline:
            await asyncio.sleep(_MEMORY_POLL_INTERVAL)
            if await self._missing_memory(slot) == 0:
                return
        if not await self._make_room(0):
            raise _out_of_memory(slot, missing)

    @contextmanager
    def _noted(self, slot: Slot) -> Iterator[None]:
        """What is measured of another engine while this one wakes is not that engine's."""
        wakes = slot.asleep_bytes is not None
        self._wakes += wakes
        try:
            yield
        finally:
            self._woken += wakes

    async def _memory_to_wake(self, slot: Slot, needed: int) -> None:
        """Returns once the device has `needed` free bytes; raises SwapFailed."""
        slot.phases.enter(Phase.MEMORY)
        loop = asyncio.get_running_loop()
        deadline = loop.time() + MEMORY_SECONDS
        while (free := await self._parts.free_bytes()) is not None and free < needed:
            if loop.time() >= deadline:
                raise SwapFailed(f"the device lacks {readable_bytes(needed - free)} to wake the engine")
            await asyncio.sleep(_MEMORY_POLL_INTERVAL)

    async def _stall(self, slot: Slot, engine: Engine) -> str:
        """Returns once the engine has had work and made no step for `stall_timeout`."""
        steps, since = -1, self._clock()
        while True:
            await asyncio.sleep(min(1.0, self._stall_timeout / 8))
            found = await self._steps(engine) if slot.leases else 0
            if found is None or (found == steps and slot.leases):
                if self._clock() - since >= self._stall_timeout:
                    return f"it has made no progress for {self._stall_timeout:g} s (ENGINE_STALL_TIMEOUT)"
                continue
            steps, since = found or -1, self._clock()

    async def _steps(self, engine: Engine) -> int | None:
        """The steps of a busy engine, 0 for an idle one; None if it does not answer."""
        try:
            async with asyncio.timeout(min(_HEARTBEAT_SECONDS, self._stall_timeout)):
                heartbeat = await engine.heartbeat()
        except (TimeoutError, EngineDied, EngineError):
            return None
        return heartbeat.steps + 1 if heartbeat.running else 0


def _phase(slot: Slot) -> str:
    """The phase of the slot's load; while its engine starts, the engine's own."""
    if slot.phases.current is Phase.START and slot.engine is not None and slot.engine.phases:
        return list(slot.engine.phases)[-1]
    return slot.phases.current or Phase.SYNC


def _out_of_memory(slot: Slot, missing: int) -> OutOfMemory:
    return OutOfMemory(
        f"The engine of '{slot.model.name}' needs {slot.footprint}, of which the device lacks "
        f"{readable_bytes(missing)}: another program uses it. Free it, or lower "
        "GPU_MEMORY_UTILIZATION, and try again.",
        param="model",
    )
