"""The pool carries out what the scheduler decides: loads, grants, evictions.

Owns slots, leases and waiters. `lease` is the only way to an engine; a lease is given back exactly once,
by `release`, which is synchronous. Nothing here knows HTTP.
"""

import asyncio
import itertools
import logging
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any

from inference_service.engines.base import Engine, EngineState, Snapshot
from inference_service.errors import (
    DiskFull,
    EngineDied,
    EngineError,
    EngineStartFailed,
    ModelNotServable,
    NoSlot,
    Overloaded,
    QueueTimedOut,
    ServiceError,
    ShuttingDown,
)
from inference_service.metrics import Metrics
from inference_service.pool.circuit import Circuits
from inference_service.pool.estimates import Estimates
from inference_service.pool.scheduler import (
    CancelLoad,
    Drain,
    EngineView,
    Evict,
    Grant,
    Load,
    Policy,
    WaiterView,
    decide,
    next_look,
    victims,
)
from inference_service.storage.model import Model

logger = logging.getLogger(__name__)

# So long a load goes on although nobody waits for it at the moment.
LINGER_SECONDS = 5.0
TICK_SECONDS = 0.005


@dataclass(frozen=True)
class Limits:
    """What a request bears: how many may wait before it, how long it waits, how long a load may take (s)."""

    queued: int
    queue_timeout: float
    load_timeout: float


class Lease:
    """One request's hold on a ready engine, until `release`."""

    def __init__(self, pool: "Pool", slot: "_Slot") -> None:
        self._pool = pool
        self._slot = slot

    @property
    def model(self) -> str:
        return self._slot.model.name

    @property
    def revision(self) -> str:
        return (self._slot.snapshot or self._slot.model).revision

    @property
    def engine(self) -> Engine:
        if self._slot.engine is None:
            raise EngineDied(f"The engine of '{self.model}' is gone. Send the request again.")
        return self._slot.engine

    def release(self) -> None:
        """Give the engine back; idempotent."""
        self._pool._released(self, self._slot)


@dataclass(eq=False)
class _Slot:
    model: Model
    state: EngineState = EngineState.STARTING
    snapshot: Snapshot | None = None
    engine: Engine | None = None
    leases: set[Lease] = field(default_factory=set)
    last_used: float = 0.0
    ready_at: float = 0.0
    awaited_until: float = 0.0
    load_seconds: float | None = None
    # What runs for this slot: its load, then the watch over its process, then its teardown.
    tasks: set[asyncio.Task[None]] = field(default_factory=set)
    gone: asyncio.Event = field(default_factory=asyncio.Event)


@dataclass(eq=False)
class _Waiter:
    number: int
    model: Model
    since: float
    lease: asyncio.Future[Lease]


class Pool:
    """At most `policy.slots` engines and `policy.concurrency` leases at once."""

    def __init__(
        self,
        fetch: Callable[[Model], Awaitable[Snapshot]],
        release: Callable[[Snapshot], None],
        make_engine: Callable[[Snapshot], Engine],
        metrics: Metrics,
        *,
        policy: Policy,
        limits: Limits,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._fetch = fetch
        self._release_snapshot = release
        self._make_engine = make_engine
        self._metrics = metrics
        self._policy = policy
        self._limits = limits
        self._clock = clock
        self._timer: asyncio.TimerHandle | None = None
        self._circuits = Circuits()
        self._estimates = Estimates()
        self._slots: dict[str, _Slot] = {}
        self._waiters: dict[int, _Waiter] = {}
        self._numbers = itertools.count(1)
        self._closing = False

    async def lease(self, model: Model) -> Lease:
        """A lease on the model's engine, loaded if need be.

        Raises Overloaded and ShuttingDown at once, and what the load raised (StoreError,
        EngineStartFailed) to everyone who waited for it.
        """
        self._admit(model)
        future: asyncio.Future[Lease] = asyncio.get_running_loop().create_future()
        waiter = _Waiter(next(self._numbers), model, self._clock(), future)
        self._waiters[waiter.number] = waiter
        self._step()
        try:
            async with asyncio.timeout(self._limits.queue_timeout):
                return _of_the_revision(await future, model)
        except TimeoutError as error:
            raise self._waited_too_long(waiter) from error
        except asyncio.CancelledError:
            self._abandon(waiter, LINGER_SECONDS)
            raise

    def holds(self, name: str) -> bool:
        """Whether a slot is the model's, in whatever state."""
        return name in self._slots

    def loaded_revision(self, name: str) -> str | None:
        """The revision that the model's ready engine serves; None where it has none."""
        slot = self._slots.get(name)
        if slot is None or slot.state is not EngineState.READY or slot.snapshot is None:
            return None
        return slot.snapshot.revision

    async def unload(self, name: str) -> bool:
        """Tear the model's engine down once its leases are back; False if it has none."""
        slot = self._slots.get(name)
        if slot is None:
            return False
        if slot.state is EngineState.STARTING:
            self._fail_waiters(slot, EngineError(f"'{name}' was unloaded by the operator."))
        if slot.state in (EngineState.STARTING, EngineState.READY):
            slot.state = EngineState.DRAINING
            self._tear_down_if_idle(slot)
        await slot.gone.wait()
        return True

    def stop_admission(self) -> None:
        """Refuse every further lease and every waiter with ShuttingDown; leases go on."""
        self._closing = True
        for waiter in list(self._waiters.values()):
            self._fail(waiter, _shutting_down())

    async def close(self) -> None:
        """Tear every engine down, busy or not; returns when no process is left."""
        self.stop_admission()
        if self._timer is not None:
            self._timer.cancel()
        slots = list(self._slots.values())
        for slot in slots:
            if slot.state is not EngineState.STOPPING:
                self._tear_down(slot)
        await asyncio.gather(*(slot.gone.wait() for slot in slots))

    def count_by_state(self) -> dict[str, int]:
        """Number of engines in each state, zeros included."""
        found = Counter(slot.state for slot in self._slots.values())
        return {state.value: found[state] for state in EngineState if state is not EngineState.STOPPED}

    async def stats(self) -> dict[str, Any]:
        """Slots, states, leases and waiters, for the operator."""
        now = self._clock()
        slots = list(self._slots.values())
        return {
            "slots": {"total": self._policy.slots, "used": len(slots)},
            "engines": await asyncio.gather(*(_describe(slot) for slot in slots)),
            "leases": sum(len(slot.leases) for slot in slots),
            "max_concurrent_requests": self._policy.concurrency,
            "circuits": self._circuits.describe(now),
            "victims": victims(self._views(), self._policy, now),
            "waiters": [
                {"model": waiter.model.name, "age_seconds": round(now - waiter.since, 3)}
                for waiter in self._waiters.values()
            ],
        }

    def __repr__(self) -> str:
        engines = " ".join(f"{key}:{slot.state}({len(slot.leases)})" for key, slot in self._slots.items())
        waiting = " ".join(waiter.model.name for waiter in self._waiters.values())
        return f"<Pool {engines or 'empty'} | waiting: {waiting or 'nobody'}>"

    def _admit(self, model: Model) -> None:
        if self._closing:
            raise _shutting_down()
        name = model.name
        no_slot = self._no_slot_for(name)
        if no_slot is not None:
            raise no_slot
        refusal = self._circuits.refusal(name, model.revision, self._clock())
        if refusal is not None and name not in self._slots:
            raise refusal
        running = sum(len(slot.leases) for slot in self._slots.values())
        slot = self._slots.get(name)
        if slot is not None and slot.state is EngineState.READY and running < self._policy.concurrency:
            return  # it runs at once, however many wait for other models
        waiting, now = len(self._waiters), self._clock()
        if waiting >= self._limits.queued:
            retry_after = self._estimates.retry_after_queue(waiting, now)
            raise Overloaded(
                f"{waiting} requests wait already, the most that this service takes (MAX_QUEUED_REQUESTS="
                f"{self._limits.queued}), and {running} run (MAX_CONCURRENT_REQUESTS="
                f"{self._policy.concurrency}). Try again in {retry_after} s.",
                retry_after=retry_after,
            )

    def _no_slot_for(self, name: str) -> NoSlot | None:
        """The error for a model without an engine while every engine is pinned to another."""
        serving = (EngineState.STARTING, EngineState.READY)
        pinned = [
            key for key, slot in self._slots.items() if slot.model.serving.pinned and slot.state in serving
        ]
        if name in self._slots or len(pinned) < self._policy.slots:
            return None
        return NoSlot(
            f"There is no room for the model '{name}': all {self._policy.slots} engines "
            f"(MAX_CACHED_MODELS) are pinned, by {', '.join(pinned)}. Unpin one in its serving.json "
            "and unload it.",
            param="model",
        )

    def _step(self) -> None:
        """Ask the scheduler and carry out its actions; the only place where state moves on."""
        if self._closing:
            return
        now, waiters = self._clock(), self._waiting()
        for action in decide(self._views(), waiters, self._policy, now):
            match action:
                case Grant(number, key):
                    self._grant(self._waiters.pop(number), self._slots[key])
                case Load(key):
                    self._load(key)
                case Evict(key):
                    self._evict(self._slots[key])
                case Drain(key):
                    self._drain(self._slots[key])
                case CancelLoad(key):
                    logger.info("nobody waits for the load any more", extra={"model": key})
                    self._tear_down(self._slots[key])
        for waiter in list(self._waiters.values()):
            no_slot = self._no_slot_for(waiter.model.name)
            if no_slot is not None:
                self._fail(waiter, no_slot)
        self._look_again()

    def _look_again(self) -> None:
        """Come back when time alone may have changed what is to be done."""
        if self._timer is not None:
            self._timer.cancel()
        now = self._clock()
        at = next_look(self._views(), self._waiting(), self._policy, now)
        loop = asyncio.get_running_loop()
        self._timer = None if at is None else loop.call_later(at - now + TICK_SECONDS, self._step)

    def _views(self) -> list[EngineView]:
        return [
            EngineView(
                key,
                slot.state,
                len(slot.leases),
                slot.last_used,
                pinned=slot.model.serving.pinned,
                ready_at=slot.ready_at,
                load_seconds=slot.load_seconds or 0.0,
                awaited_until=slot.awaited_until,
            )
            for key, slot in self._slots.items()
        ]

    def _waiting(self) -> list[WaiterView]:
        return [WaiterView(each.number, each.model.name, each.since) for each in self._waiters.values()]

    def _drain(self, slot: _Slot) -> None:
        """It has kept others waiting for long enough: its requests finish, and then it gives way."""
        logger.info("draining for a model that waits", extra={"model": slot.model.name})
        self._metrics.evictions.labels(slot.model.name).inc()
        slot.state = EngineState.DRAINING
        self._tear_down_if_idle(slot)

    def _grant(self, waiter: _Waiter, slot: _Slot) -> None:
        if waiter.lease.done():  # cancelled, and its task has not run since
            return
        lease = Lease(self, slot)
        slot.leases.add(lease)
        slot.last_used = self._clock()
        waiter.lease.set_result(lease)

    def _released(self, lease: Lease, slot: _Slot) -> None:
        if lease not in slot.leases:
            return
        slot.leases.discard(lease)
        slot.last_used = self._clock()
        self._estimates.ended(slot.last_used)
        self._tear_down_if_idle(slot)
        self._step()

    def _waited_too_long(self, waiter: _Waiter) -> QueueTimedOut:
        """The client is told to come again, and its load goes on until then."""
        name, now = waiter.model.name, self._clock()
        slot = self._slots.get(name)
        loading = slot is not None and slot.state is EngineState.STARTING
        since = slot.last_used if slot is not None and loading else now
        retry_after = self._estimates.retry_after_load(name, since, now)
        self._abandon(waiter, retry_after + LINGER_SECONDS)
        state = "is being loaded" if loading else "waits for an engine"
        return QueueTimedOut(
            f"The model '{name}' {state}, for longer than QUEUE_TIMEOUT "
            f"({self._limits.queue_timeout:g} s). Try again in {retry_after} s.",
            retry_after=retry_after,
        )

    def _abandon(self, waiter: _Waiter, linger: float) -> None:
        """The waiter's request is gone, perhaps in the moment in which its lease was granted."""
        self._waiters.pop(waiter.number, None)
        slot = self._slots.get(waiter.model.name)
        if slot is not None and slot.state is EngineState.STARTING:
            # A client that was told to come again, or tries again by itself, shall find the load there.
            slot.awaited_until = max(slot.awaited_until, self._clock() + linger)
        lease = waiter.lease
        if lease.done() and not lease.cancelled() and lease.exception() is None:
            lease.result().release()
        self._step()

    def _fail(self, waiter: _Waiter, error: ServiceError) -> None:
        self._waiters.pop(waiter.number, None)
        if not waiter.lease.done():
            waiter.lease.set_exception(error)

    def _fail_waiters(self, slot: _Slot, error: ServiceError) -> None:
        for waiter in [w for w in self._waiters.values() if w.model.name == slot.model.name]:
            self._fail(waiter, error)

    def _load(self, key: str) -> None:
        model = next(w.model for w in self._waiters.values() if w.model.name == key)
        slot = _Slot(model, last_used=self._clock())
        self._slots[key] = slot
        self._run(slot, self._start(slot))

    async def _start(self, slot: _Slot) -> None:
        name, started = slot.model.name, time.monotonic()
        logger.info("loading", extra={"model": name, "revision": slot.model.revision})
        try:
            async with asyncio.timeout(self._limits.load_timeout):
                slot.snapshot = await self._fetch_with_room(slot)
                slot.engine = self._make_engine(slot.snapshot)
                await slot.engine.start()
        except TimeoutError:
            seconds = f"{self._limits.load_timeout:g} s (LOAD_TIMEOUT)"
            self._load_failed(slot, EngineStartFailed(f"'{name}' did not load within {seconds}."))
            return
        except Exception as error:
            self._load_failed(slot, error)
            return
        if slot.state is not EngineState.STARTING:  # unloaded in the very moment it was ready
            return
        slot.load_seconds = round(time.monotonic() - started, 3)
        self._estimates.loaded(name, slot.load_seconds)
        slot.state = EngineState.READY
        slot.ready_at = slot.last_used = self._clock()
        self._circuits.succeeded(name)
        self._metrics.loads.labels(name, "ok").inc()
        self._metrics.load_seconds.labels(name).observe(slot.load_seconds)
        logger.info("loaded", extra={"model": name, "seconds": slot.load_seconds})
        self._run(slot, self._watch(slot, slot.engine))
        self._step()

    async def _fetch_with_room(self, slot: _Slot) -> Snapshot:
        """The snapshot; where the disk is full of others', idle engines give theirs up."""
        while True:
            try:
                return await self._fetch(slot.model)
            except DiskFull as error:
                idle = self._idle_unpinned()
                held = sum(other.snapshot.bytes for other in idle if other.snapshot is not None)
                if error.missing is None or held < error.missing or not idle:
                    raise
                self._evict(idle[0])
                await idle[0].gone.wait()

    def _idle_unpinned(self) -> list[_Slot]:
        """Slots that could be torn down at once, the least recently used first."""
        wanted = {waiter.model.name for waiter in self._waiters.values()}
        idle = [
            slot
            for slot in self._slots.values()
            if slot.state is EngineState.READY
            and not slot.leases
            and not slot.model.serving.pinned
            and slot.model.name not in wanted
        ]
        return sorted(idle, key=lambda slot: slot.last_used)

    def _evict(self, slot: _Slot) -> None:
        self._metrics.evictions.labels(slot.model.name).inc()
        logger.info("evicting", extra={"model": slot.model.name})
        self._tear_down(slot)

    def _load_failed(self, slot: _Slot, error: Exception) -> None:
        name = slot.model.name
        if slot.state is not EngineState.STARTING:  # it failed because it was being unloaded
            return
        self._metrics.loads.labels(name, "failed").inc()
        expected = isinstance(error, ServiceError)
        logger.error("load failed: %s", error, extra={"model": name}, exc_info=not expected)
        slot.state = EngineState.FAILED
        told = error if isinstance(error, ServiceError) else _unexplained(name, error)
        if isinstance(told, EngineStartFailed):  # a bucket or a disk may be well again a moment later
            self._circuits.failed(name, slot.model.revision, told, self._clock())
        self._fail_waiters(slot, told)
        self._tear_down(slot)

    async def _watch(self, slot: _Slot, engine: Engine) -> None:
        reason = await engine.wait_dead()
        if slot.state in (EngineState.READY, EngineState.DRAINING):
            logger.error("engine died: %s", reason, extra={"model": slot.model.name})
            slot.state = EngineState.FAILED
            self._tear_down(slot)

    def _tear_down_if_idle(self, slot: _Slot) -> None:
        if slot.state is EngineState.DRAINING and not slot.leases:
            self._tear_down(slot)

    def _tear_down(self, slot: _Slot) -> None:
        """Once per slot: whoever calls has looked that it is not being torn down already."""
        slot.state = EngineState.STOPPING
        running = set(slot.tasks)
        self._run(slot, self._end(slot, running))

    async def _end(self, slot: _Slot, running: set[asyncio.Task[None]]) -> None:
        """End what runs for the slot, then its engine; only then is the slot free."""
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)
        try:
            if slot.engine is not None:
                await slot.engine.close()
        except Exception:
            logger.exception("engine did not close cleanly", extra={"model": slot.model.name})
        finally:
            if slot.snapshot is not None:
                self._release_snapshot(slot.snapshot)
            del self._slots[slot.model.name]
            slot.engine = None
            slot.gone.set()
            logger.info("unloaded", extra={"model": slot.model.name})
            self._step()

    def _run(self, slot: _Slot, work: Coroutine[Any, Any, None]) -> None:
        task: asyncio.Task[None] = asyncio.create_task(work)
        slot.tasks.add(task)
        task.add_done_callback(slot.tasks.discard)


def _of_the_revision(lease: Lease, model: Model) -> Lease:
    """The lease, unless the client named a revision and the engine is of another."""
    if not model.exact or lease.revision == model.revision:
        return lease
    lease.release()
    raise ModelNotServable(
        model.name,
        f"its revision {lease.revision} is loaded and not {model.revision}. POST /admin/unload/{model.name}, "
        "and the next request loads the newer one.",
    )


async def _describe(slot: _Slot) -> dict[str, Any]:
    return {
        "model": slot.model.name,
        "revision": (slot.snapshot or slot.model).revision,
        "pinned": slot.model.serving.pinned,
        "state": slot.state.value,
        "leases": len(slot.leases),
        "running": await _running(slot.engine) if slot.state is EngineState.READY else None,
        "process_id": None if slot.engine is None else slot.engine.process_id,
        "load_seconds": slot.load_seconds,
        "bytes": slot.model.bytes,
    }


async def _running(engine: Engine | None) -> int | None:
    """The engine's own count; None where it does not answer in time."""
    if engine is None:
        return None
    try:
        async with asyncio.timeout(1.0):
            return await engine.running()
    except (EngineError, TimeoutError):
        return None


def _shutting_down() -> ShuttingDown:
    return ShuttingDown("The service is shutting down. Try again.", retry_after=5)


def _unexplained(name: str, error: Exception) -> EngineStartFailed:
    return EngineStartFailed(
        f"The model '{name}' could not be loaded: {type(error).__name__}: {error}", param="model"
    )
