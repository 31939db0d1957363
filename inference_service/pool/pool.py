"""The pool: leases and waiters; carries out the scheduler's decisions.

`lease` is the only way to an engine; a lease is released exactly once, by `release`, which is synchronous.
lifecycle.py runs each engine. Nothing here knows HTTP.
"""

import asyncio
import itertools
import logging
import math
import time
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Any, cast

from inference_service.errors import DiskFull, EngineDied, QueueTimedOut, ServiceError
from inference_service.metrics import Metrics
from inference_service.pool import refusals
from inference_service.pool.adapters import LoadedAdapter
from inference_service.pool.leases import Lease, LoadProgress, Slot, Waiter
from inference_service.pool.lifecycle import EngineLifecycle, Hooks, Limits
from inference_service.pool.loader import Parts
from inference_service.pool.operator_loads import OperatorLoads
from inference_service.pool.report import Report
from inference_service.scheduler.events import (
    Action,
    CancelLoad,
    Drain,
    Event,
    Evict,
    Failed,
    Fetched,
    FetchFailed,
    Grant,
    Left,
    Load,
    Loaded,
    Pinned,
    Prepare,
    Reason,
    Reject,
    RejectFailed,
    Released,
    Request,
    Sleep,
    Swap,
    TimePassed,
    Unload,
)
from inference_service.scheduler.scheduler import Scheduler
from inference_service.scheduler.state import EngineState, Policy
from inference_service.storage.bucket.model import ModelKind
from inference_service.storage.model import Adapter, AnyModel, Checkpoint, Model

logger = logging.getLogger(__name__)

# How long a load goes on while no request waits for it.
LINGER_SECONDS = 2.0
TICK_SECONDS = 0.005


class Superseded(ServiceError):
    """Another revision of the model serves from now on: resolve the name again. Never sent to a client."""


class Pool:
    """At most `policy.slots` engines and `policy.concurrency` leases at once.

    Engines are known by their models' references; an adapter is served on its base's engine.
    """

    def __init__(
        self,
        parts: Parts,
        metrics: Metrics,
        *,
        policy: Policy,
        limits: Limits,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._parts = parts
        self._limits = limits
        self._clock = clock
        self._scheduler = Scheduler(policy)
        hooks = Hooks(self._dispatch, self._fetched, self._is_waited_for, self.pinned)
        self._lifecycle = EngineLifecycle(parts, metrics, self._scheduler, limits, clock, hooks)
        self._waiters: dict[int, Waiter] = {}
        self._numbers = itertools.count(1)
        self._pins: dict[str, bool] = {}
        self._operator_loads = OperatorLoads(partial(self._lease, None, by_operator=True), self.is_live)
        self._report = Report(self._scheduler, self._lifecycle, self._waiters, self._pins, clock)
        self._events: deque[Event] = deque()
        self._dispatching = False
        self._dispatched_at = clock()
        self._timer: asyncio.TimerHandle | None = None
        self._closing = False

    def operator_load(self, model: Model, *, instead_of: str | None = None) -> asyncio.Task[None]:
        """Load the model for the operator: one load per model, beside the clients' queue and its timeout.

        The task is done once the engine is ready, and raises as `lease` does. Raises ShuttingDown, and the
        error of a load that failed recently, at once. `instead_of`: the reference that it replaces.
        """
        load = self._operator_loads.get(model.reference)
        if load is None:
            self._admit(model)
            load = self._operator_loads.begin(model, instead_of)
        return load

    async def lease(self, model: Model, waited: float = 0.0, *, exact: bool = False) -> Lease:
        """A lease on the model's engine, loaded if need be; an adapter is added to that.

        `waited`: seconds of the request so far; `exact`: it asks for this very revision. Raises Overloaded,
        NoRoom and ShuttingDown at once, QueueTimedOut, Superseded, and to every request that waited for a
        load what that raised (StoreError, EngineStartFailed, OutOfMemory, AdapterRefused).
        """
        return await self._lease(waited, model, exact=exact)

    async def _lease(
        self,
        waited: float | None,
        wanted: Model,
        instead_of: str | None = None,
        *,
        by_operator: bool = False,
        exact: bool = False,
    ) -> Lease:
        self._admit(wanted)
        future: asyncio.Future[Lease] = asyncio.get_running_loop().create_future()
        waiter = Waiter(next(self._numbers), wanted, self._clock(), future, by_operator, exact)
        self._waiters[waiter.number] = waiter
        self._dispatch(self._request(waiter, instead_of))
        self._begin_fetches(waiter)
        if waited is not None:
            self._limit(waiter, waited)
        try:
            lease = await future
        except asyncio.CancelledError:
            self._abandon(waiter, LINGER_SECONDS)
            raise
        finally:
            waiter.calm()
        return await self._with_adapter(lease, wanted) if isinstance(wanted, Adapter) else lease

    def _limit(self, waiter: Waiter, waited: float) -> None:
        """Limit the wait: for the load since the request arrived, for a place from now on."""
        now = asyncio.get_running_loop().time()
        waiter.load_by = now - waited + self._limits.load_wait.seconds
        waiter.place_by = now + self._limits.place_wait.seconds
        self._set_alarm(waiter)

    def _set_alarm(self, waiter: Waiter) -> None:
        """Never fires at once: the pool may be in the middle of an event."""
        waiter.calm()
        if not waiter.lease.done() and waiter.load_by < math.inf:
            loop = asyncio.get_running_loop()
            waiter.alarm = loop.call_at(self._gives_up_at(waiter), self._ring, waiter)

    def _ring(self, waiter: Waiter) -> None:
        if waiter.lease.done():
            return
        if self._gives_up_at(waiter) > asyncio.get_running_loop().time():
            self._set_alarm(waiter)  # its engine has gone since, and it waits for a load again
        else:
            waiter.lease.set_exception(self._waited_too_long(waiter))

    def _gives_up_at(self, waiter: Waiter) -> float:
        return min(waiter.load_by, waiter.place_by) if self._is_there(waiter) else waiter.load_by

    def _is_there(self, waiter: Waiter) -> bool:
        """Whether the requested model is loaded, so that the request lacks only a place."""
        is_ready = self.state(waiter.model.reference) is EngineState.READY
        return is_ready and not self._lifecycle.prefetcher.is_under_way(waiter.wanted.reference)

    def _came(self, reference: str) -> None:
        """An engine is ready, or an adapter's files are there: from now on its waiters lack only a place."""
        place_by = asyncio.get_running_loop().time() + self._limits.place_wait.seconds
        for waiter in list(self._waiters.values()):
            if reference in (waiter.model.reference, waiter.wanted.reference):
                waiter.place_by = place_by
                self._set_alarm(waiter)

    async def _with_adapter(self, lease: Lease, model: Adapter) -> Lease:
        """The lease, with the adapter on its engine; released if that fails."""
        try:
            if lease.slot.adapters is None:
                raise refusals.died(lease.slot.model.name, "it went while the adapter was added")
            lease.adapter = await lease.slot.adapters.hold(model)
            if self.pinned(model) and lease in lease.slot.leases:
                self._dispatch(Pinned(lease.slot.key, True))
        except BaseException:
            lease.release()
            raise
        finally:
            self._lifecycle.prefetcher.drop(model.reference)
        return lease

    def _request(self, waiter: Waiter, instead_of: str | None) -> Request:
        """The scheduler's view of a waiter."""
        model, wanted, prefetcher = waiter.model, waiter.wanted, self._lifecycle.prefetcher
        there = wanted is model or self._has(wanted) or prefetcher.is_there(wanted.reference)
        return Request(
            waiter.number,
            model.reference,
            bytes=self._lifecycle.footprint(model).total,
            pinned=self._wants_pinned(waiter),
            by_operator=waiter.by_operator,
            swap=self._parts.swap_key(model),
            adapters=model.adapter_rank,
            fetched=model.reference in self._lifecycle.slots or prefetcher.is_there(model.reference),
            instead_of=instead_of,
            adapter=None if there else wanted.reference,
            asleep_bytes=self._lifecycle.asleep_bytes(model),
        )

    def _begin_fetches(self, waiter: Waiter) -> None:
        """Start the fetches that an admitted waiter needs, whatever serves until then."""
        if waiter.number not in self._waiters:
            return
        if waiter.model.reference not in self._lifecycle.slots:
            self._lifecycle.prefetcher.begin(waiter.model)
        if waiter.wanted is not waiter.model and not self._has(waiter.wanted):
            self._lifecycle.prefetcher.begin(waiter.wanted)

    def _has(self, adapter: Model) -> bool:
        """Whether an engine that takes requests has the adapter."""
        ready = self.state(adapter.engine_model.reference) is EngineState.READY
        return ready and self.adapter(adapter) is not None

    def _fetched(self, model: Model, error: Exception | None) -> None:
        """A fetch ahead of the engine has ended; a slot that waits for one handles it itself."""
        key = model.reference
        if key in self._lifecycle.slots:
            return
        # A full disk may have space once an engine has released its snapshot.
        full = isinstance(error, DiskFull) and error.missing is not None and isinstance(model, Checkpoint)
        if error is not None and not full:
            logger.error("fetch failed: %s", error, extra={"model": model.name})
            self._dispatch(FetchFailed(key, self._lifecycle.failed(model, error)))
        elif self._is_waited_for(key):
            self._dispatch(Fetched(key))
        else:
            self._lifecycle.prefetcher.drop(key)

    def live(self, name: str) -> list[Model]:
        """What serves under this name: models with a ready engine, adapters on one."""
        ready = self._lifecycle.ready()
        adapters = [each for slot in ready if slot.adapters is not None for each in slot.adapters.models()]
        served: list[Model] = [*(slot.model for slot in ready), *adapters]
        return [each for each in served if each.name == name]

    def is_live(self, model: AnyModel) -> bool:
        """Whether a ready engine serves this very revision."""
        return any(each.reference == model.reference for each in self.live(model.name))

    def names(self) -> set[str]:
        """Models, adapters included, that an engine holds in any state."""
        slots = [slot for slot in self._lifecycle.slots.values() if slot.sleeper is None]
        adapters = (slot.adapters.names() for slot in slots if slot.adapters is not None)
        return {slot.model.name for slot in slots}.union(*adapters)

    def adapter(self, model: Model) -> LoadedAdapter | None:
        """The adapter on its base's engine, if that has it."""
        slot = self._lifecycle.slots.get(model.engine_model.reference)
        return None if slot is None or slot.adapters is None else slot.adapters.get(model.reference)

    def state(self, reference: str) -> EngineState:
        """The state of an engine."""
        return self._lifecycle.state(reference)

    def standing(self, model: AnyModel) -> EngineState:
        """The state of the engine of a model, whatever its revision; READY or STOPPED for an adapter."""
        if model.kind is ModelKind.ADAPTER:
            return EngineState.READY if self.is_live(model) else EngineState.STOPPED
        exact = self.state(model.reference)
        slots = self._lifecycle.slots.items()
        others = [self.state(key) for key, slot in slots if slot.model.name == model.name]
        others.sort(key=lambda state: state is not EngineState.SLEEPING)
        return exact if exact is not EngineState.STOPPED or not others else others[-1]

    def pinned(self, model: AnyModel) -> bool:
        """The operator's last setting, else that of the model's serving.json."""
        return self._pins.get(model.name, model.serving.pinned)

    def pin(self, model: AnyModel, *, pinned: bool) -> None:
        """A pinned model's engine is never evicted for another; in effect until the service ends.

        A pinned adapter stays on its engine, and that in its place.
        """
        self._pins[model.name] = pinned
        self._tell_pins()

    def _tell_pins(self) -> None:
        for slot in list(self._lifecycle.slots.values()):
            self._dispatch(Pinned(slot.key, self._is_pinned(slot)))
        for waiter in list(self._waiters.values()):
            if waiter.model.reference not in self._lifecycle.slots:
                self._dispatch(Pinned(waiter.model.reference, self._wants_pinned(waiter)))

    def _is_pinned(self, slot: Slot) -> bool:
        """Whether its model, an adapter on it, or a model that a request waits for there is pinned."""
        if slot.sleeper is not None:
            return False
        adapters = [] if slot.adapters is None else slot.adapters.models()
        models: list[Model] = [slot.model, *adapters]
        waiters = (waiter for waiter in self._waiters.values() if waiter.model.reference == slot.key)
        return any(map(self.pinned, models)) or any(map(self._wants_pinned, waiters))

    def _wants_pinned(self, waiter: Waiter) -> bool:
        return self.pinned(waiter.model) or self.pinned(waiter.wanted)

    async def unload(self, name: str, *, force: bool = False) -> bool:
        """Stop the model's engine once its leases are released, or at once; False if it has none.

        An adapter that no request uses is removed from its engine.
        """
        for waiter in list(self._waiters.values()):
            if waiter.wanted is not waiter.model and waiter.wanted.name == name:
                self._fail(waiter, refusals.load_unloaded(name))
                self._dispatch(Left(waiter.number, LINGER_SECONDS))
        slots = [slot for slot in self._lifecycle.slots.values() if slot.model.name == name]
        for slot in slots:
            slot.unloaded = True
            if force:
                self._lifecycle.abort_all(slot, refusals.unloaded(name))
            self._dispatch(Unload(slot.key, force))
        await asyncio.gather(*(slot.gone.wait() for slot in slots))
        return await self._remove_adapters(name) or bool(slots)

    async def _remove_adapters(self, name: str) -> bool:
        on = [slot.adapters for slot in self._lifecycle.slots.values() if slot.adapters is not None]
        found = [(each, model) for each in on for model in each.models() if model.name == name]
        removed = any([await adapters.remove(model.reference) for adapters, model in found])
        self._tell_pins()  # a pinned one no longer keeps its base's engine
        return removed

    def retire(self, reference: str) -> None:
        """Another revision has taken over: the engine ends with its last lease, waiters resolve again."""
        self._supersede(reference)
        slot = self._lifecycle.slots.get(reference)
        if slot is not None:
            slot.unloaded = True
            self._dispatch(Unload(reference))

    def _supersede(self, reference: str) -> None:
        for waiter in list(self._waiters.values()):
            # An adapter's revision that was requested goes to its base's new engine.
            this_and_no_other = waiter.exact and waiter.wanted is waiter.model
            if waiter.model.reference == reference and not this_and_no_other:
                self._fail(waiter, Superseded("another revision serves"))
                self._dispatch(Left(waiter.number, 0.0))

    def look(self) -> None:
        """Let the scheduler decide again, because time has passed; the pool's own timer calls this."""
        self._dispatch(TimePassed())

    def stop_admission(self) -> None:
        """Refuse new leases and all waiters with ShuttingDown; existing leases go on."""
        self._closing = True
        for waiter in list(self._waiters.values()):
            self._fail(waiter, refusals.shutting_down())
            self._dispatch(Left(waiter.number, LINGER_SECONDS))

    async def close(self) -> None:
        """Stop every engine, busy or not; returns when no process is left."""
        self.stop_admission()
        if self._timer is not None:
            self._timer.cancel()
        await self._lifecycle.close()

    async def suspect(self, lease: Lease) -> EngineDied | None:
        """Check an engine that returned an error: if it is dead, no further request is sent to it.

        Returns the error to report if the engine is dead.
        """
        return await self._lifecycle.suspect(lease)

    def progress(self, model: Model) -> LoadProgress:
        """The progress of a requested model."""
        return self._report.progress(model)

    def count_by_state(self) -> dict[str, int]:
        """Number of engines in each state, zeros included."""
        return self._report.count_by_state()

    def notes(self) -> dict[str, list[str]]:
        """By model: what its operator should know about how it runs."""
        return self._report.notes()

    async def stats(self) -> dict[str, Any]:
        """Slots, budget, engines, waiters and the next evictions, for the operator."""
        return await self._report.stats()

    def __repr__(self) -> str:
        return f"<Pool {self._report}>"

    def _admit(self, wanted: Model) -> None:
        if self._closing:
            raise refusals.shutting_down()
        for model in (wanted.engine_model, wanted):
            gone = self.state(model.reference) in (
                EngineState.STOPPED,
                EngineState.STOPPING,
                EngineState.FAILED,
            )
            refusal = self._lifecycle.refusal(model) if gone else None
            if refusal is not None:
                refusal.reference = model.reference
                raise refusal

    def _dispatch(self, event: Event) -> None:
        """Tell the scheduler and carry out its actions; the only place where state moves on.

        Events that an action causes are dispatched after it, in order.
        """
        if isinstance(event, Loaded):
            self._operator_loads.loaded(event.key)
        self._events.append(event)
        if self._dispatching:
            return
        self._dispatching = True
        try:
            while self._events:
                self._dispatched_at = self._clock()
                event = self._events.popleft()
                for action in self._scheduler.handle(event, self._dispatched_at):
                    if not self._lifecycle.ending:
                        self._carry_out(action)
                if isinstance(event, Loaded | Fetched):
                    self._came(event.key)
        finally:
            self._dispatching = False
        self._look_again()

    def _carry_out(self, action: Action) -> None:
        match action:
            case Grant(number, key):
                self._grant(self._waiters.pop(number, None), self._lifecycle.slots[key])
            case Reject() | RejectFailed():
                self._reject(action, self._waiters[action.number])
            case Load(key):
                self._lifecycle.load(self._newest(key))
            case Swap(key, old):
                self._lifecycle.swap(self._newest(key), old)
            case Prepare(key, engine):
                self._lifecycle.prepare(key, engine)
            case Drain(key):
                self._draining(key)
            case Sleep(key):
                self._lifecycle.sleep(key)
            case Evict(key):
                self._lifecycle.evict(key)
            case CancelLoad(key):
                self._lifecycle.cancel(key)

    def _reject(self, action: Reject | RejectFailed, waiter: Waiter) -> None:
        if isinstance(action, RejectFailed):
            self._fail(waiter, _copy(action.failure))
        else:
            self._fail(waiter, self._rejection(waiter, action.reason))

    def _draining(self, key: str) -> None:
        name = self._lifecycle.slots[key].model.name
        logger.info("draining for a waiting model", extra={"model": name})
        if self._scheduler.engines[key].successor is not None:
            self._supersede(key)

    def _newest(self, key: str) -> Checkpoint:
        """The model of the waiting request that came last."""
        waiting = reversed(self._waiters.values())
        return next(waiter.model for waiter in waiting if waiter.model.reference == key)

    def _look_again(self) -> None:
        """Come back when time alone may have changed what is to be done."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        # As of the last event: what has become due since then is not to be missed.
        at = None if self._lifecycle.ending else self._scheduler.next_look(self._dispatched_at)
        if at is not None:
            loop = asyncio.get_running_loop()
            self._timer = loop.call_later(max(0.0, at - self._clock()) + TICK_SECONDS, self.look)

    def _rejection(self, waiter: Waiter, reason: Reason) -> ServiceError:
        scheduler, model, lifecycle = self._scheduler, waiter.model, self._lifecycle
        match reason:
            case Reason.OVERLOADED:
                retry_after = lifecycle.estimates.retry_after_queue(scheduler.waiting)
                return refusals.overloaded(
                    scheduler.policy, scheduler.running, scheduler.waiting, retry_after
                )
            case Reason.NO_ROOM:
                engines = list(scheduler.engines.values())
                return refusals.no_room(model.name, lifecycle.footprint(model), scheduler.policy, engines)
            case Reason.UNLOADED:
                return refusals.load_unloaded(model.name)

    def _grant(self, waiter: Waiter | None, slot: Slot) -> None:
        # It has left, or was cancelled and its task has not run since.
        if waiter is None or waiter.lease.done():
            self._dispatch(Released(slot.key))
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
        self._lifecycle.estimates.ended(self._clock())
        self._dispatch(Released(lease.slot.key))

    def _waited_too_long(self, waiter: Waiter) -> QueueTimedOut:
        """The error for a request whose time is up; its load goes on until it is done."""
        name, now = waiter.wanted.name, self._clock()
        scheduler, estimates = self._scheduler, self._lifecycle.estimates
        state = self.state(waiter.model.reference)
        fetching = self._lifecycle.prefetcher.is_under_way(waiter.wanted.reference)
        if self._is_there(waiter):
            retry_after = estimates.retry_after_queue(scheduler.waiting)
            limits = self._limits
            limit = limits.place_wait if waiter.place_by <= waiter.load_by else limits.load_wait
            error = refusals.still_busy(name, scheduler.running, scheduler.policy, limit, retry_after)
            self._abandon(waiter, 0.0)
            return error
        loading = state is EngineState.STARTING or fetching
        since = self._lifecycle.slots[waiter.model.reference].began if state is EngineState.STARTING else now
        retry_after = estimates.retry_after_load(name, since, now)
        self._abandon(waiter, self._limits.load_timeout)
        limit = self._limits.load_wait
        return refusals.still_loading(name, loading=loading, limit=limit, retry_after=retry_after)

    def _abandon(self, waiter: Waiter, linger: float) -> None:
        """The waiter's request is gone, perhaps just as its lease was granted.

        A client that retries must find its load in progress.
        """
        self._waiters.pop(waiter.number, None)
        lease = waiter.lease
        if lease.done() and not lease.cancelled() and lease.exception() is None:
            lease.result().release()
        self._dispatch(Left(waiter.number, linger))
        self._forget_fetches(waiter, linger)

    def _fail(self, waiter: Waiter, error: ServiceError) -> None:
        self._waiters.pop(waiter.number, None)
        if not waiter.lease.done():
            waiter.lease.set_exception(error)
        self._forget_fetches(waiter, 0.0)

    def _forget_fetches(self, waiter: Waiter, seconds: float) -> None:
        """Drop the waiter's fetches in this many seconds, unless another request waits for them by then."""
        for model in (waiter.model, waiter.wanted):
            self._lifecycle.prefetcher.keep(model.reference, seconds)

    def _is_waited_for(self, reference: str) -> bool:
        return any(
            reference in (waiter.model.reference, waiter.wanted.reference)
            for waiter in self._waiters.values()
        )


def _copy(failure: Failed | FetchFailed) -> ServiceError:
    """The error of a load for one of the requests that waited for it; each raises its own copy."""
    error = cast(ServiceError, failure.error)
    copied = error.again(error.message, retry_after=error.retry_after)
    copied.reference = failure.key
    return copied
