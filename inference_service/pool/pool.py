"""The pool: slots, leases and waiters; carries out what the scheduler decides.

`lease` is the only way to an engine; a lease is given back exactly once, by `release`, which is
synchronous. How an engine is loaded and torn down is loading.py's. Nothing here knows HTTP.
"""

import asyncio
import itertools
import logging
import time
from collections import Counter, deque
from collections.abc import Callable, Coroutine
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from inference_service.engines.base import Engine, EngineState, Footprint, Snapshot
from inference_service.errors import (
    DiskFull,
    EngineDied,
    EngineError,
    EngineStartFailed,
    LoadTimedOut,
    OutOfMemory,
    QueueTimedOut,
    ServiceError,
    SnapshotCorrupt,
)
from inference_service.metrics import Metrics
from inference_service.pool import refusals
from inference_service.pool.adapters import Adapter, Adapters
from inference_service.pool.circuit import Circuits
from inference_service.pool.estimates import Estimates
from inference_service.pool.events import (
    Action,
    CancelLoad,
    Died,
    Drain,
    Event,
    Evict,
    Failed,
    Fetched,
    FetchFailed,
    Gone,
    Grant,
    Left,
    Load,
    Loaded,
    Pinned,
    Reason,
    Reject,
    Released,
    Request,
    Starting,
    Swap,
    TimePassed,
    Unload,
)
from inference_service.pool.fetches import Fetches
from inference_service.pool.loading import Loading, Parts
from inference_service.pool.phases import Phases
from inference_service.pool.scheduler import Policy, Scheduler
from inference_service.pool.slot import Lease, LoadProgress, Slot, Waiter
from inference_service.storage.model import Model, ModelKind

logger = logging.getLogger(__name__)

# So long a load goes on although nobody waits for it at the moment.
LINGER_SECONDS = 2.0
TICK_SECONDS = 0.005
# Errors of a load that are no better a moment later; those of a bucket or a disk may be.
_LASTING = (EngineStartFailed, OutOfMemory, SnapshotCorrupt)
SUSPECT_SECONDS = 0.5


@dataclass(frozen=True)
class Limits:
    """In seconds: how long a request waits, how long a load may take, how long an engine may do nothing.

    `adapters`: how many an engine knows at once.
    """

    queue_timeout: float
    load_timeout: float
    stall_timeout: float = 60.0
    adapters: int = 64


class Superseded(ServiceError):
    """Another revision of the model serves from now on: resolve it anew. No client meets it."""


class Pool:
    """At most `policy.slots` engines and `policy.concurrency` leases at once.

    `footprint` tells what a model's engine would take on its device. Engines are known by their models'
    references; an adapter is served on the engine of its carrier.
    """

    def __init__(
        self,
        parts: Parts,
        footprint: Callable[[Model], Footprint],
        metrics: Metrics,
        *,
        policy: Policy,
        limits: Limits,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._footprint = footprint
        self._metrics = metrics
        self._limits = limits
        self._clock = clock
        self._scheduler = Scheduler(policy)
        self._parts = parts
        self._fetches = Fetches(parts.fetch, parts.release, clock, self._fetched)
        self._loading = Loading(
            parts,
            self._fetches,
            (limits.load_timeout, limits.stall_timeout),
            clock,
            self._starting,
            self._departure,
            self._make_room,
        )
        self._timer: asyncio.TimerHandle | None = None
        self._circuits = Circuits()
        self._estimates = Estimates()
        self._slots: dict[str, Slot] = {}
        self._waiters: dict[int, Waiter] = {}
        self._pins: dict[str, bool] = {}
        self._numbers = itertools.count(1)
        self._events: deque[Event] = deque()
        self._telling = False
        self._told_at = clock()
        self._closing = False
        self._ending = False
        self._orders: dict[str, asyncio.Task[None]] = {}
        self._ready: dict[str, asyncio.Future[None]] = {}
        # What the waiters of a failed load are told.
        self._load_errors: dict[str, ServiceError] = {}

    def order(self, model: Model, *, instead_of: str | None = None) -> asyncio.Task[None]:
        """Load the model for the operator: one order a model, beside the clients' queue and its timeout.

        The task is done once the engine is ready, and raises as `lease` does. Raises ShuttingDown, and the
        error of a load that failed lately, at once. `instead_of`: the reference that it is to replace.
        """
        order = self._orders.get(model.reference)
        if order is None:
            self._admit(_carrier(model))
            order = asyncio.create_task(self._until_ready(model, instead_of))
            self._orders[model.reference] = order
            order.add_done_callback(lambda done: self._ordered(model.reference, done))
        return order

    async def _until_ready(self, model: Model, instead_of: str | None) -> None:
        if model.carrier is not None:
            (await self.lease(model)).release()
            return
        if self.state(model.reference) is EngineState.READY:
            return
        ready = self._ready.setdefault(model.reference, asyncio.get_running_loop().create_future())
        asked = asyncio.create_task(self._lease(model, None, order=True, instead_of=instead_of))
        either: set[asyncio.Future[Any]] = {asked, ready}
        try:
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
            if asked.done():
                asked.result().release()
        finally:
            asked.cancel()

    def _ordered(self, reference: str, order: asyncio.Task[None]) -> None:
        del self._orders[reference]
        if not order.cancelled():
            order.exception()  # whoever ordered it may have gone

    async def lease(self, model: Model) -> Lease:
        """A lease on the model's engine, loaded if need be; an adapter is added to that.

        Raises Overloaded, NoRoom and ShuttingDown at once, QueueTimedOut, Superseded, and what the load
        raised (StoreError, EngineStartFailed, OutOfMemory, AdapterRefused) to everyone who waited for it.
        """
        if model.carrier is None:
            return await self._lease(model, self._limits.queue_timeout)
        adapter = self.adapter(model)
        fetching = None if adapter is not None else asyncio.ensure_future(self._parts.fetch(model, _unheard))
        try:
            if fetching is not None and self.state(model.carrier.reference) is EngineState.READY:
                await asyncio.shield(fetching)  # no lease is held for the time of a download
            lease = await self._lease(model.carrier, self._limits.queue_timeout)
            return await self._with_adapter(lease, model)
        finally:
            if fetching is not None:
                fetching.add_done_callback(self._let_go)
                if not fetching.done():
                    fetching.cancel()

    async def _with_adapter(self, lease: Lease, model: Model) -> Lease:
        """The lease, with the adapter on its engine; given back where that fails."""
        try:
            if lease.slot.adapters is None:
                raise refusals.died(lease.slot.model.name, "it went while the adapter was added")
            lease.adapter = await lease.slot.adapters.hold(model)
        except BaseException:
            lease.release()
            raise
        return lease

    def _let_go(self, fetching: asyncio.Future[Snapshot]) -> None:
        if not fetching.cancelled() and fetching.exception() is None:
            self._parts.release(fetching.result())

    async def _lease(
        self,
        model: Model,
        queue_timeout: float | None,
        *,
        order: bool = False,
        instead_of: str | None = None,
    ) -> Lease:
        self._admit(model)
        future: asyncio.Future[Lease] = asyncio.get_running_loop().create_future()
        waiter = Waiter(next(self._numbers), model, self._clock(), future, order)
        self._waiters[waiter.number] = waiter
        self._tell(self._request(waiter, instead_of))
        if waiter.number in self._waiters and model.reference not in self._slots:
            self._fetches.begin(model)
        try:
            async with asyncio.timeout(queue_timeout):
                return await future
        except TimeoutError as error:
            raise self._waited_too_long(waiter) from error
        except asyncio.CancelledError:
            self._abandon(waiter, LINGER_SECONDS)
            raise

    def _request(self, waiter: Waiter, instead_of: str | None) -> Request:
        """The scheduler's view of a waiter."""
        model = waiter.model
        fetch = self._fetches.get(model.reference)
        return Request(
            waiter.number,
            model.reference,
            self._footprint(model).total,
            self.pinned(model),
            waiter.order,
            self._parts.swap_key(model),
            model.rank,
            model.reference in self._slots or (fetch is not None and fetch.fetched),
            instead_of,
        )

    def _fetched(self, model: Model, error: Exception | None) -> None:
        """A fetch ahead of the engine has ended; what a slot waits for is the slot's own concern."""
        key = model.reference
        if key in self._slots:
            return
        if self._scheduler.waiting_for(key) == 0:
            self._fetches.drop(key)
            return
        # A disk that is full may have room once an engine has given its snapshot up.
        full = isinstance(error, DiskFull) and error.missing is not None
        if error is None or full:
            self._tell(Fetched(key))
            return
        logger.error("fetch failed: %s", error, extra={"model": model.name})
        self._load_errors[key] = self._told_of(model, error)
        self._tell(FetchFailed(key))
        del self._load_errors[key]

    def live(self, name: str) -> list[Model]:
        """What serves under this name: models with a ready engine, adapters on one."""
        ready = [slot for key, slot in self._slots.items() if self.state(key) is EngineState.READY]
        engines = [slot.model for slot in ready if slot.model.name == name]
        adapters = [each for slot in ready if slot.adapters is not None for each in slot.adapters.models()]
        return engines + [each for each in adapters if each.name == name]

    def is_live(self, model: Model) -> bool:
        """Whether a ready engine serves this very revision."""
        return any(each.reference == model.reference for each in self.live(model.name))

    def names(self) -> set[str]:
        """Models, adapters included, that an engine holds in whatever state."""
        adapters = (slot.adapters.names() for slot in self._slots.values() if slot.adapters is not None)
        return {slot.model.name for slot in self._slots.values()}.union(*adapters)

    def adapter(self, model: Model) -> Adapter | None:
        """The adapter on its carrier's engine, if that has it."""
        slot = None if model.carrier is None else self._slots.get(model.carrier.reference)
        return None if slot is None or slot.adapters is None else slot.adapters.get(model.reference)

    def state(self, reference: str) -> EngineState:
        """The state of an engine."""
        engine = self._scheduler.engines.get(reference)
        return EngineState.STOPPED if engine is None else engine.state

    def standing(self, model: Model) -> EngineState:
        """The state of the engine of a model, whatever its revision; of an adapter's carrier's."""
        if model.kind is ModelKind.ADAPTER:
            return EngineState.READY if self.is_live(model) else EngineState.STOPPED
        exact = self.state(model.reference)
        others = [self.state(key) for key, slot in self._slots.items() if slot.model.name == model.name]
        return exact if exact is not EngineState.STOPPED or not others else others[-1]

    def pinned(self, model: Model) -> bool:
        """What the operator last said, else what the model's serving.json says."""
        return self._pins.get(model.name, model.serving.pinned)

    def pin(self, model: Model, *, pinned: bool) -> None:
        """A pinned model's engine is never torn down for another's; in effect until the service ends."""
        self._pins[model.name] = pinned
        waited_for = {waiter.model.reference for waiter in self._waiters.values()}
        for key in {*self._slots, *waited_for}:
            if key.partition("@")[0] == model.name:
                self._tell(Pinned(key, pinned))

    async def unload(self, name: str, *, force: bool = False) -> bool:
        """Tear the model's engine down once its leases are back, or at once; False if it has none.

        Of an adapter that nobody uses its engine is rid.
        """
        slots = [slot for slot in self._slots.values() if slot.model.name == name]
        for slot in slots:
            slot.unloaded = True
            if force:
                self._cut(slot, refusals.unloaded(name))
            self._tell(Unload(slot.key, force))
        await asyncio.gather(*(slot.gone.wait() for slot in slots))
        return await self._remove_adapters(name) or bool(slots)

    async def _remove_adapters(self, name: str) -> bool:
        on = [slot.adapters for slot in self._slots.values() if slot.adapters is not None]
        found = [(each, model) for each in on for model in each.models() if model.name == name]
        return any([await adapters.remove(model.reference) for adapters, model in found])

    def retire(self, reference: str) -> None:
        """Another revision has taken over: the engine ends with its last lease, and who waits is told."""
        self._supersede(reference)
        slot = self._slots.get(reference)
        if slot is not None:
            slot.unloaded = True
            self._tell(Unload(reference))

    def _supersede(self, reference: str) -> None:
        for waiter in list(self._waiters.values()):
            if waiter.model.reference == reference and not waiter.model.exact:
                self._fail(waiter, Superseded("another revision serves"))
                self._tell(Left(waiter.number, 0.0))

    def progress(self, model: Model) -> LoadProgress:
        """How far a model that is waited for is on its way."""
        model = _carrier(model)
        slot, state = self._slots.get(model.reference), self.state(model.reference)
        start_seconds = self._estimates.start_seconds(model.name)
        if slot is None:
            fetch = self._fetches.get(model.reference)
            if fetch is not None and not fetch.fetched:
                return self._loading.fetch_progress(model, start_seconds)
            return LoadProgress("queue", None, self._estimates.load_seconds(model.name))
        if state is not EngineState.STARTING:
            return LoadProgress("queue" if state is EngineState.READY else "drain", None, None)
        return self._loading.progress(slot, start_seconds)

    def look(self) -> None:
        """It is later, which alone may change what is to be done; the pool's own timer calls it in time."""
        self._tell(TimePassed())

    def stop_admission(self) -> None:
        """Refuse every further lease and every waiter with ShuttingDown; leases go on."""
        self._closing = True
        for waiter in list(self._waiters.values()):
            self._fail(waiter, refusals.shutting_down())
            self._tell(Left(waiter.number, LINGER_SECONDS))

    async def close(self) -> None:
        """Tear every engine down, busy or not; returns when no process is left."""
        self.stop_admission()
        slots = list(self._slots.values())
        if not self._ending:
            self._ending = True
            if self._timer is not None:
                self._timer.cancel()
            for slot in slots:
                self._cut(slot, refusals.shutting_down())
                # Those that are ending already get less time for it.
                self._tear_down(slot)
            self._fetches.close()
        await asyncio.gather(*(slot.gone.wait() for slot in slots))

    async def suspect(self, lease: Lease) -> EngineDied | None:
        """A request met an error of its engine's: if that is dead, nobody else is sent to it.

        Returns what is to be told of an engine that is dead.
        """
        slot = lease.slot
        if lease not in slot.leases or slot.engine is None:
            return None
        try:
            async with asyncio.timeout(SUSPECT_SECONDS):
                await slot.engine.pulse()
        except TimeoutError:
            return None  # it hangs, or has much to do: the watch over it will tell
        except EngineError:
            return self._died(slot, "its process ended or its core is dead; the log has the reason")
        return None

    def count_by_state(self) -> dict[str, int]:
        """Number of engines in each state, zeros included."""
        found = Counter(engine.state for engine in self._scheduler.engines.values())
        return {state.value: found[state] for state in EngineState if state is not EngineState.STOPPED}

    async def stats(self) -> dict[str, Any]:
        """Slots, budget, engines, waiters and what would give way, for the operator."""
        now, policy = self._clock(), self._scheduler.policy
        engines = self._scheduler.engines
        slots = list(self._slots.values())
        # All at this moment: an engine may be gone when the others have told what they run.
        described = [self._describe(slot) for slot in slots]
        ready = [slot.engine if self.state(slot.key) is EngineState.READY else None for slot in slots]
        reserved = sum(engine.bytes for engine in engines.values())
        running = await asyncio.gather(*(_running(engine) for engine in ready))
        return {
            "slots": {"total": policy.slots, "used": len(slots)},
            "budget": {
                "total_bytes": policy.memory,
                "reserved_bytes": reserved,
            },
            "engines": [{**each, "running": count} for each, count in zip(described, running, strict=True)],
            "leases": self._scheduler.running,
            "max_concurrent_requests": policy.concurrency,
            "max_queued_requests": policy.queued,
            "circuits": self._circuits.describe(now),
            "victims": [self._slots[key].model.name for key in self._scheduler.victims(now)],
            "pins": self._pins,
            "waiters": [
                {
                    "model": waiter.model.name,
                    "order": waiter.order,
                    "age_seconds": round(now - waiter.since, 3),
                    **self.progress(waiter.model).describe(),
                }
                for waiter in self._waiters.values()
            ],
        }

    def __repr__(self) -> str:
        engines = " ".join(
            f"{slot.model.name}:{self.state(key)}({len(slot.leases)})" for key, slot in self._slots.items()
        )
        waiting = " ".join(waiter.model.name for waiter in self._waiters.values())
        return f"<Pool {engines or 'empty'} | waiting: {waiting or 'nobody'}>"

    def _describe(self, slot: Slot) -> dict[str, Any]:
        view = self._scheduler.engines[slot.key]
        described = {
            "model": slot.model.name,
            "revision": slot.model.revision,
            "pinned": view.pinned,
            "state": view.state.value,
            "leases": len(slot.leases),
            "process_id": None if slot.engine is None else slot.engine.process_id,
            "load_seconds": slot.load_seconds,
            "phases": slot.phases.describe(),
            "swapped": slot.swapped,
            "swap_key": view.swap,
            "adapter_rank": view.adapters,
            "adapters": [] if slot.adapters is None else slot.adapters.describe(),
            "idle_seconds": None if slot.leases else round(self._clock() - view.last_used, 3),
            "bytes": slot.model.bytes,
            "memory": asdict(slot.footprint),
        }
        if view.state is EngineState.STARTING:
            described["loading"] = self.progress(slot.model).describe()
        return described

    def _admit(self, model: Model) -> None:
        if self._closing:
            raise refusals.shutting_down()
        if self.state(model.reference) in (EngineState.STOPPED, EngineState.STOPPING, EngineState.FAILED):
            refusal = self._circuits.refusal(model.name, model.revision, self._clock())
            if refusal is not None:
                raise refusal

    def _tell(self, event: Event) -> None:
        """Tell the scheduler and carry out its actions; the only place where state moves on.

        What the carrying out brings about is told after it, in order.
        """
        self._events.append(event)
        if self._telling:
            return
        self._telling = True
        try:
            while self._events:
                self._told_at = self._clock()
                for action in self._scheduler.handle(self._events.popleft(), self._told_at):
                    if not self._ending:
                        self._carry_out(action)
        finally:
            self._telling = False
        self._look_again()

    def _carry_out(self, action: Action) -> None:
        match action:
            case Grant(number, key):
                self._grant(self._waiters.pop(number), self._slots[key])
            case Reject(number, reason):
                waiter = self._waiters[number]
                self._fail(waiter, self._rejection(waiter.model, reason))
            case Load(key):
                self._load(key)
            case Swap(key, old):
                self._swap(key, self._slots.pop(old))
            case Drain(key):
                logger.info("draining for a model that waits", extra={"model": self._slots[key].model.name})
                if self._scheduler.engines[key].successor is not None:
                    self._supersede(key)
            case Evict(key):
                name = self._slots[key].model.name
                self._metrics.evictions.labels(name).inc()
                logger.info("evicting", extra={"model": name})
                self._tear_down(self._slots[key])
            case CancelLoad(key):
                name = self._slots[key].model.name
                logger.info("nobody waits for the load any more", extra={"model": name})
                self._tear_down(self._slots[key])

    def _look_again(self) -> None:
        """Come back when time alone may have changed what is to be done."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        # As of the last event: what has become due since then is not to be missed.
        at = None if self._ending else self._scheduler.next_look(self._told_at)
        if at is not None:
            loop = asyncio.get_running_loop()
            self._timer = loop.call_later(max(0.0, at - self._clock()) + TICK_SECONDS, self.look)

    def _rejection(self, model: Model, reason: Reason) -> ServiceError:
        scheduler, name = self._scheduler, model.name
        match reason:
            case Reason.OVERLOADED:
                retry_after = self._estimates.retry_after_queue(scheduler.waiting)
                return refusals.overloaded(
                    scheduler.policy, scheduler.running, scheduler.waiting, retry_after
                )
            case Reason.NO_ROOM:
                engines = list(scheduler.engines.values())
                return refusals.no_room(name, self._footprint(model), scheduler.policy, engines)
            case Reason.UNLOADED:
                return refusals.load_unloaded(name)
            case Reason.LOAD_FAILED:
                error = self._load_errors[model.reference]
                return error.again(error.message, retry_after=error.retry_after)

    def _grant(self, waiter: Waiter, slot: Slot) -> None:
        if waiter.lease.done():  # cancelled, and its task has not run since
            self._tell(Released(slot.key))
            return
        lease = Lease(slot, self._released)
        slot.leases.add(lease)
        waiter.lease.set_result(lease)

    def _released(self, lease: Lease) -> None:
        if lease not in lease.slot.leases:
            return
        lease.slot.leases.discard(lease)
        if lease.adapter is not None and lease.slot.adapters is not None:
            lease.slot.adapters.give_back(lease.adapter)
        self._estimates.ended(self._clock())
        self._tell(Released(lease.slot.key))

    def _waited_too_long(self, waiter: Waiter) -> QueueTimedOut:
        """The client is told to come again, and its load goes on until it is done."""
        name, now, timeout = waiter.model.name, self._clock(), self._limits.queue_timeout
        scheduler, state = self._scheduler, self.state(waiter.model.reference)
        if state is EngineState.READY:
            retry_after = self._estimates.retry_after_queue(scheduler.waiting)
            told = refusals.still_busy(name, scheduler.running, scheduler.policy, timeout, retry_after)
            self._abandon(waiter, 0.0)
            return told
        loading = state is EngineState.STARTING
        since = self._slots[waiter.model.reference].began if loading else now
        retry_after = self._estimates.retry_after_load(name, since, now)
        self._abandon(waiter, self._limits.load_timeout)
        return refusals.still_loading(name, loading=loading, queue_timeout=timeout, retry_after=retry_after)

    def _abandon(self, waiter: Waiter, linger: float) -> None:
        """The waiter's request is gone, perhaps in the moment in which its lease was granted.

        A client that was told to come again, or tries again by itself, shall find its load there.
        """
        self._waiters.pop(waiter.number, None)
        lease = waiter.lease
        if lease.done() and not lease.cancelled() and lease.exception() is None:
            lease.result().release()
        self._tell(Left(waiter.number, linger))
        if self._fetches.get(waiter.model.reference) is not None:
            forget = partial(self._forget_fetch, waiter.model.reference)
            asyncio.get_running_loop().call_later(linger, forget)

    def _forget_fetch(self, reference: str) -> None:
        """The files of a model are not wanted any more, unless somebody has come who waits for them."""
        if reference not in self._slots and self._scheduler.waiting_for(reference) == 0:
            self._fetches.drop(reference)

    def _fail(self, waiter: Waiter, error: ServiceError) -> None:
        self._waiters.pop(waiter.number, None)
        if not waiter.lease.done():
            waiter.lease.set_exception(error)
        if self._fetches.get(waiter.model.reference) is not None:
            asyncio.get_running_loop().call_soon(self._forget_fetch, waiter.model.reference)

    def _load(self, key: str) -> None:
        # The last who asked knows the newest revision.
        waiting = reversed(self._waiters.values())
        model = next(waiter.model for waiter in waiting if waiter.model.reference == key)
        slot = Slot(model, self._footprint(model), self._clock(), Phases(self._clock))
        self._slots[key] = slot
        self._run(slot, self._serve(slot, self._loading.load(slot)))

    def _swap(self, key: str, old: Slot) -> None:
        """The engine of `old`, which nobody uses, is to serve `key`."""
        waiting = reversed(self._waiters.values())
        model = next(waiter.model for waiter in waiting if waiter.model.reference == key)
        slot = Slot(model, old.footprint, self._clock(), Phases(self._clock), swapped=True)
        slot.engine, old.engine = old.engine, None
        self._slots[key] = slot
        for watch in old.tasks:
            watch.cancel()
        if old.adapters is not None:
            old.adapters.close()
        self._run(slot, self._serve(slot, self._swapped_or_loaded(slot, old)))
        old.gone.set()

    async def _swapped_or_loaded(self, slot: Slot, old: Slot) -> None:
        """The slot's model in the engine of `old`, or in a fresh one where that fails."""
        name = slot.model.name
        fields = {"model": name, "revision": slot.model.revision, "instead_of": old.model.reference}
        logger.info("swapping", extra=fields)
        try:
            await self._loading.swap(slot, old.snapshot, old.fingerprint)
        except Exception as error:
            self._metrics.swaps.labels(name, "failed").inc()
            logger.warning("swap failed, loading afresh: %s", error, extra={"model": name})
            slot.swapped = False
            await self._loading.discard(slot)
            await self._loading.load(slot)
        else:
            self._metrics.swaps.labels(name, "ok").inc()
        finally:
            if old.snapshot is not None:
                self._parts.release(old.snapshot)

    async def _serve(self, slot: Slot, loading: Coroutine[Any, Any, None]) -> None:
        """An engine's life: its load, and the watch over it until it is torn down or dies."""
        name, started = slot.model.name, time.monotonic()
        logger.info("loading", extra={"model": name, "revision": slot.model.revision})
        try:
            await loading
        except Exception as error:
            self._load_failed(slot, error)
            return
        if self._is(slot, EngineState.STARTING) and slot.engine is not None:
            self._loaded(slot, slot.engine, round(time.monotonic() - started, 3))
            reason = await self._loading.watch(slot, slot.engine)
            self._died(slot, reason)

    def _starting(self, slot: Slot, snapshot: Snapshot) -> None:
        self._tell(Starting(slot.key, slot.footprint.total))

    def _loaded(self, slot: Slot, engine: Engine, seconds: float) -> None:
        name = slot.model.name
        slot.load_seconds = seconds
        slot.adapters = Adapters(
            engine,
            lambda model: self._parts.fetch(model, _unheard),
            self._parts.release,
            self._limits.adapters,
            self._clock,
        )
        start_seconds = slot.phases.start_seconds
        if not slot.swapped:
            self._estimates.loaded(name, seconds, start_seconds)
        self._circuits.succeeded(name, slot.model.revision)
        self._metrics.loaded(name, seconds, slot.phases.seconds)
        fields = {"revision": slot.model.revision, "seconds": seconds, "swapped": slot.swapped}
        logger.info("loaded", extra={"model": name, **fields, **slot.phases.describe()})
        if slot.key in self._ready:
            self._ready.pop(slot.key).set_result(None)
        self._tell(Loaded(slot.key, start_seconds))

    def _load_failed(self, slot: Slot, error: Exception) -> None:
        name = slot.model.name
        if not self._is(slot, EngineState.STARTING):  # it failed because it was being unloaded
            return
        expected = isinstance(error, ServiceError)
        logger.error("load failed: %s", error, extra={"model": name}, exc_info=not expected)
        told = self._load_errors[slot.key] = self._told_of(slot.model, error)
        self._tell(Failed(slot.key))
        del self._load_errors[slot.key]
        self._tear_down(slot, hurry=isinstance(told, LoadTimedOut))

    def _told_of(self, model: Model, error: Exception) -> ServiceError:
        """What those who waited for a load, or a fetch, are told that failed."""
        self._metrics.loads.labels(model.name, "failed").inc()
        told = error if isinstance(error, ServiceError) else refusals.unexplained(model.name, error)
        if isinstance(told, _LASTING):
            told.retry_after = self._circuits.failed(model.name, model.revision, told, self._clock())
        return told

    def _died(self, slot: Slot, reason: str) -> EngineDied | None:
        name = slot.model.name
        if not self._is(slot, EngineState.READY, EngineState.DRAINING):
            return None
        logger.error("engine died: %s", reason, extra={"model": name})
        self._metrics.deaths.labels(name).inc()
        told = refusals.died(name, reason)
        self._cut(slot, told)
        self._tell(Died(slot.key))
        self._tear_down(slot, hurry=True)
        return told

    def _is(self, slot: Slot, *states: EngineState) -> bool:
        """Whether this very slot is still the model's, in one of these states."""
        return self._slots.get(slot.key) is slot and self.state(slot.key) in states

    def _cut(self, slot: Slot, error: ServiceError) -> None:
        """Void the leases on a slot and end their replies with `error`."""
        slot.leases.clear()
        if slot.engine is not None:
            slot.engine.cut(error)

    async def _departure(self) -> bool:
        """Wait until an engine that is leaving anyway has left; False where none is."""
        leaving = (EngineState.DRAINING, EngineState.STOPPING, EngineState.FAILED)
        gone = [
            asyncio.ensure_future(slot.gone.wait())
            for key, slot in self._slots.items()
            if self.state(key) in leaving
        ]
        if not gone:
            return False
        try:
            await asyncio.wait(gone, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for waiting in gone:
                waiting.cancel()
        return True

    async def _make_room(self, missing: int) -> bool:
        """Tear an idle engine down for the sake of its snapshot or memory; False where it would not help."""
        idle = [self._slots[key] for key in self._scheduler.idle()]
        if sum(slot.snapshot.bytes for slot in idle if slot.snapshot is not None) < missing:
            return False
        evict = None if self._ending else self._scheduler.give_way()
        if evict is None:
            return False
        slot = self._slots[evict.key]
        self._carry_out(evict)
        await slot.gone.wait()
        return True

    def _tear_down(self, slot: Slot, *, hurry: bool = False) -> None:
        self._run(slot, self._end(slot, set(slot.tasks), hurry=hurry))

    async def _end(self, slot: Slot, running: set[asyncio.Task[None]], *, hurry: bool) -> None:
        """End what runs for the slot, then its engine; only then is the slot free."""
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)
        name = slot.model.name
        if slot.adapters is not None:
            slot.adapters.close()
        await self._loading.end(slot, hurry=hurry, last=self._ending)
        del self._slots[slot.key]
        slot.engine = None
        slot.gone.set()
        logger.info("unloaded", extra={"model": name})
        self._tell(Gone(slot.key))

    def _run(self, slot: Slot, work: Coroutine[Any, Any, None]) -> None:
        task: asyncio.Task[None] = asyncio.create_task(work)
        slot.tasks.add(task)
        task.add_done_callback(slot.tasks.discard)


def _carrier(model: Model) -> Model:
    """The model whose engine serves it: its own, or an adapter's base."""
    return model.carrier or model


def _unheard(phase: str) -> None:
    """An adapter is there in a moment: nobody is told its phases."""


async def _running(engine: Engine | None) -> int | None:
    """The engine's own count; None where it does not answer in time."""
    if engine is None:
        return None
    try:
        async with asyncio.timeout(1.0):
            return (await engine.pulse()).running
    except (EngineError, TimeoutError):
        return None
