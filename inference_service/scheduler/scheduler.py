"""Decides, does nothing: an event and the time in, actions out.

Pure: no clock, no asyncio, no logging. It alone knows every engine's state and every waiter; the pool
passes it every event and carries out its actions, so every policy is tested as a plain sequence.
"""

from collections.abc import Iterator
from dataclasses import replace

from inference_service.scheduler.capacity import Capacity, Verdict
from inference_service.scheduler.events import (
    Action,
    Asleep,
    CancelLoad,
    Died,
    Drain,
    EngineEvent,
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
    Prepare,
    Reason,
    Reject,
    RejectFailed,
    Released,
    Request,
    RoomWanted,
    Sleep,
    Starting,
    Swap,
    TimePassed,
    Unload,
)
from inference_service.scheduler.state import NEVER, Claims, EngineState, EngineView, Policy, Queue, Waiting


class Scheduler:
    """The engines and waiters of one pool.

    1. A request for a ready engine is granted it, oldest first, while fewer than `concurrency` leases
       are out. Warm models never wait behind a load. A request for an adapter is granted nothing, and
       delays no other, until the adapter's files are there.
    2. A request for a model whose engine is starting joins it: nothing to do.
    3. A requested model without an engine is loaded if a slot is free and its bytes fit, the one that has
       waited longest first; a later one does not take the capacity that an older one waits for.
    4. It does not fit: the least recently used idle engines that are not requested, not pinned and have
       served for `min_residency` are evicted, as many as needed.
    5. Not enough of them, and the oldest waiter has waited for `fairness_wait`: the least valuable busy
       engines (fewest requests, then least recently used) drain and are evicted too. An engine with leases is
       never stopped, and one whose waiters lack only a lease, because all are out, is left to serve them.
    6. A load that no request waits for is cancelled.
    7. An engine that has been idle for `idle_ttl` is stopped.
    8. A request beyond those that run and those that may wait is rejected, and so is one whose model
       cannot fit beside the pinned engines.
    9. A failed load rejects every request that waited for it. A dead engine has no leases.
    10. An unloaded engine drains; forced, it goes at once.
    11. An engine that drains for a waiter admits requests again once no request waits for a cold model, or
       once it is pinned.

    12. While an engine starts none is evicted: it would have to wait for the device's turn, and can serve
        meanwhile.
    13. No engine is evicted for a model whose files are not there yet, nor for the base of an adapter whose
        files are not; such a base is loaded if it fits anyway.
    14. Before any eviction: the weights of a requested model are swapped into an idle engine that can take
        them, however young it is, or into the one that has drained for it. That needs no turn.
    15. A revision that replaces another and does not fit beside it takes its idle engine, or its engine
        once drained. Pinning does not protect an engine from its own next revision.

    16. While a requested model waits for a busy engine that could take its weights, that engine prepares
        for them.

    17. Where engines may sleep (`sleepers`), an engine that has given way to another model sleeps instead of
        ending, if what it keeps fits beside that model; the oldest beyond their number end, and all of them
        before any engine that serves. A sleeping engine has no slot. A model that fits is put into the
        sleeping engine that can take it, once its files are there, instead of a fresh one.

    Slots and bytes count until an engine is gone, so an engine that is stopping or draining still holds
    them, but they are assigned: no second engine is evicted for the same waiter.
    """

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        self.engines: dict[str, EngineView] = {}
        self.running = 0
        self.waiting = 0
        self._queues: dict[str, Queue] = {}
        self.capacity = Capacity(policy, self.engines, self._queues)

    def handle(self, event: Event, now: float) -> list[Action]:
        """Process one event; returns the actions to carry out, in order."""
        return [*self._take(event, now), *self._decide(now)]

    def next_look(self, now: float) -> float | None:
        """When time alone may change the decision; None: only an event does."""
        return min((moment for moment in self._moments() if now < moment < NEVER), default=None)

    def _take(self, event: Event, now: float) -> Iterator[Action]:
        match event:
            case Request():
                yield from self._request(event, now)
            case Fetched(key):
                self._fetched(key)
            case FetchFailed():
                yield from self._reject_failed(event)
            case Left(number, linger):
                self._left(number, now + linger)
            case Pinned(key, pinned):
                self._pin(key, pinned=pinned)
            case RoomWanted(disk):
                yield from self._evict_idle(disk=disk)
            case TimePassed():
                pass
            case _:
                yield from self._take_of_engine(event, self.engines[event.key], now)

    def _take_of_engine(self, event: EngineEvent, engine: EngineView, now: float) -> Iterator[Action]:
        match event:
            case Released():
                yield from self._released(engine, now)
            case Starting(_, count):
                engine.bytes, engine.has_turn = count, True
                self._is_awaited_as_any(engine, now)
            case Loaded(_, seconds):
                self._loaded(engine, seconds, now)
            case Failed():
                engine.state = EngineState.FAILED
                yield from self._reject_failed(event)
            case Died():
                self._void(engine)
                engine.state = EngineState.FAILED
            case Asleep(key, sleeper, count):
                self._void(engine)
                del self.engines[key]
                self.engines[sleeper] = _asleep(engine, sleeper, count)
            case Gone(key):
                self._void(engine)
                del self.engines[key]
            case Unload(_, force):
                yield from self._unload(engine, force=force)

    def _request(self, request: Request, now: float) -> Iterator[Action]:
        engine = self.engines.get(request.key)
        warm = engine is not None and engine.state is EngineState.READY
        full = self.waiting >= self.policy.queued and not request.by_operator
        waits = not warm or request.adapter is not None or self.running >= self.policy.concurrency
        if full and waits:
            yield Reject(request.number, Reason.OVERLOADED)
            return
        queue = self._queues.setdefault(request.key, Queue(request))
        # A request that joins does not change which engine is replaced.
        instead_of = request.instead_of or queue.request.instead_of
        queue.request = replace(request, instead_of=instead_of)
        queue.pinned, queue.fetched = request.pinned, request.fetched
        queue.waiters[request.number] = Waiting(request.number, now, request.by_operator, request.adapter)
        self.waiting += not request.by_operator

    def _fetched(self, key: str) -> None:
        if key in self._queues:
            self._queues[key].fetched = True
        for queue in self._queues.values():
            for waiter in queue.waiters.values():
                if waiter.adapter == key:
                    waiter.adapter = None

    def _left(self, number: int, awaited_until: float) -> None:
        for key, queue in self._queues.items():
            if number in queue.waiters:
                self._forget(key, number)
                engine = self.engines.get(key)
                if engine is not None:
                    engine.awaited_until = max(engine.awaited_until, awaited_until)
                return

    def _released(self, engine: EngineView, now: float) -> Iterator[Action]:
        engine.leases -= 1
        engine.last_used = now
        self.running -= 1
        if engine.state is EngineState.DRAINING and engine.leases == 0:
            yield from self._swap_or_evict(engine, now)

    def _loaded(self, engine: EngineView, seconds: float, now: float) -> None:
        engine.state = EngineState.READY
        engine.has_turn = False
        engine.load_seconds = seconds
        engine.last_used = now
        self._is_awaited_as_any(engine, now)
        # A swap does not reset an engine's age.
        engine.ready_at = engine.ready_at or now

    def _is_awaited_as_any(self, engine: EngineView, now: float) -> None:
        """A swap has ended, either way: from now on its waiters count again."""
        if engine.awaited_until == NEVER:
            engine.awaited_until = now

    def _unload(self, engine: EngineView, *, force: bool) -> Iterator[Action]:
        if engine.state is EngineState.STARTING:
            yield from self._reject_all(engine.key, Reason.UNLOADED)
            yield self._cancel(engine)
            return
        if engine.state is EngineState.READY:
            engine.state = EngineState.DRAINING
        engine.gives_way, engine.successor = False, None
        engine.goes_to_sleep = False
        if engine.state is EngineState.SLEEPING:
            yield self._evict(engine)
        if engine.state is not EngineState.DRAINING:
            return
        if force:
            self._void(engine)
        if engine.leases == 0:
            yield self._evict(engine)

    def _pin(self, key: str, *, pinned: bool) -> None:
        if key in self.engines:
            self.engines[key].pinned = pinned
        if key in self._queues:
            self._queues[key].pinned = pinned

    def _decide(self, now: float) -> Iterator[Action]:
        self._call_off_drains()
        if self._queues:
            yield from self._grant(now)
            yield from self._make_room(now)
        yield from self._end_surplus()
        for engine in list(self.engines.values()):
            if engine.key in self._queues:
                continue
            if engine.state is EngineState.STARTING and engine.awaited_until <= now:
                yield self._cancel(engine)
            elif self._unused(engine) and self._expired(engine, now) and not self._turn_is_taken():
                yield self._evict(engine)

    def _end_surplus(self) -> Iterator[Evict]:
        for engine in self.capacity.surplus() if self.policy.sleepers else ():
            yield self._evict(engine)

    def _turn_is_taken(self) -> bool:
        """Case 12."""
        return any(
            engine.has_turn and engine.state is EngineState.STARTING for engine in self.engines.values()
        )

    def _call_off_drains(self) -> None:
        """Case 11."""
        cold = bool(self._cold())
        for engine in self.engines.values():
            if not engine.gives_way or engine.state is not EngineState.DRAINING:
                continue
            pinned = engine.pinned and engine.successor is None
            abandoned = engine.successor is not None and engine.successor not in self._queues
            if pinned or abandoned or not cold:
                engine.state = EngineState.READY
                engine.gives_way, engine.successor = False, None

    def _grant(self, now: float) -> Iterator[Grant]:
        """Case 1."""
        while self.running < self.policy.concurrency:
            first = [
                (waiter.number, key)
                for key, queue in self._queues.items()
                if self._state(key) is EngineState.READY and (waiter := queue.first) is not None
            ]
            if not first:
                return
            number, key = min(first)
            self._forget(key, number)
            self.engines[key].leases += 1
            self.engines[key].last_used = now
            self.running += 1
            yield Grant(number, key)

    def _make_room(self, now: float) -> Iterator[Action]:
        """Cases 3 to 5 and 8, for each cold model in the order of its oldest waiter."""
        older = Claims()
        for key in [*self._cold(), *self._cold(claims=False)]:
            match self.capacity.verdict(key, older):
                case Verdict.NEVER:
                    yield from self._reject_all(key, Reason.NO_ROOM)
                case Verdict.FITS if self.capacity.waits_to_wake(key):
                    self._claim(older, key)
                case Verdict.FITS:
                    woken = self.capacity.wakes(key)
                    yield self._load(key, now) if woken is None else self._swap(key, woken, now)
                case Verdict.LATER if self._queues[key].first is None:
                    pass  # it may use free capacity, but evict nothing
                case Verdict.LATER:
                    engine = self.capacity.takes(key)
                    if engine is not None:
                        yield self._swap(key, engine, now)
                        continue
                    if self._queues[key].fetched and not self._turn_is_taken():
                        yield from self._give_way_for(key, older, now)
                    yield from self._prepare(key)
                    self._claim(older, key)

    def _claim(self, older: Claims, key: str) -> None:
        older.models += 1
        older.bytes += self.capacity.needed(key)

    def _swap(self, key: str, engine: EngineView, now: float) -> Swap:
        queue = self._queues[key]
        del self.engines[engine.key]
        self.engines[key] = EngineView(
            key,
            engine.full_bytes,
            queue.pinned,
            last_used=now,
            ready_at=engine.ready_at,
            # A swap always completes: it takes a moment.
            awaited_until=NEVER,
            swap=engine.swap,
            adapters=engine.adapters,
            asleep_bytes=engine.asleep_bytes,
        )
        return Swap(key, engine.key)

    def _prepare(self, key: str) -> Iterator[Prepare]:
        """Case 16, once for each engine."""
        queue, engine = self._queues[key], self.capacity.will_take(key)
        if engine is not None and queue.prepared_in != engine.key:
            queue.prepared_in = engine.key
            yield Prepare(key, engine.key)

    def _swap_or_evict(self, engine: EngineView, now: float) -> Iterator[Action]:
        """The end of a drained engine, or of its model only: the first model in line may take it."""
        cold = self._cold()
        heir = engine.successor if engine.successor in cold else next(iter(cold), None)
        if engine.gives_way and heir is not None and self._queues[heir].fits_into(engine):
            yield self._swap(heir, engine, now)
        elif engine.gives_way and heir is not None and engine.successor is None:
            yield from self._sleep_or_evict(engine, heir)
        else:
            yield self._evict(engine)

    def _sleep_or_evict(self, engine: EngineView, key: str, older: Claims | None = None) -> Iterator[Action]:
        """Case 17: the end of an engine that gives way to `key`."""
        displaced = self.capacity.displaced(engine, key, older)
        if displaced is None:
            yield self._evict(engine)
            return
        for sleeper in displaced:
            yield self._evict(sleeper)
        engine.state, engine.goes_to_sleep = EngineState.STOPPING, True
        yield Sleep(engine.key)

    def _cold(self, *, claims: bool = True) -> list[str]:
        """Requested models without an engine, longest waiting first: those that claim capacity, or the
        others.

        No engine is evicted for a model if all its waiters need adapters whose files are not there.
        """
        found = [
            key
            for key, queue in self._queues.items()
            if key not in self.engines and (queue.first is not None) is claims
        ]
        return sorted(found, key=lambda key: self._queues[key].oldest.number)

    def _replace(self, key: str, old: EngineView) -> Iterator[Action]:
        """Case 15: `old` is replaced by its own next revision."""
        if old.state is EngineState.READY:
            old.successor = key
            yield from self._drain(old)

    def _give_way_for(self, key: str, older: Claims, now: float) -> Iterator[Action]:
        queue = self._queues[key]
        old = self.engines.get(queue.request.instead_of or "")
        if old is not None:
            yield from self._replace(key, old)
            return
        for engine in self.capacity.giving_way(key, older, now, self.running):
            if engine.state is EngineState.SLEEPING:
                yield self._evict(engine)
            elif engine.idle and engine.key not in self._queues:
                yield from self._sleep_or_evict(engine, key, older)
            else:
                yield from self._drain(engine)

    def _load(self, key: str, now: float) -> Load:
        queue = self._queues[key]
        self.engines[key] = EngineView(
            key,
            queue.bytes,
            queue.pinned,
            last_used=now,
            swap=queue.request.swap,
            adapters=queue.request.adapters,
            asleep_bytes=queue.request.asleep_bytes,
        )
        return Load(key)

    def _drain(self, engine: EngineView) -> Iterator[Action]:
        engine.state = EngineState.DRAINING
        engine.gives_way = True
        yield Drain(engine.key)
        if engine.leases == 0:
            yield self._evict(engine)

    def _evict(self, engine: EngineView) -> Evict:
        engine.state = EngineState.STOPPING
        return Evict(engine.key)

    def _cancel(self, engine: EngineView) -> CancelLoad:
        engine.state = EngineState.STOPPING
        return CancelLoad(engine.key)

    def _reject_all(self, key: str, reason: Reason) -> Iterator[Reject]:
        for number in list(self._queues[key].waiters) if key in self._queues else ():
            self._forget(key, number)
            yield Reject(number, reason)

    def _reject_failed(self, failure: Failed | FetchFailed) -> Iterator[RejectFailed]:
        """Reject every request that waits for the failed model or adapter."""
        for key, queue in list(self._queues.items()):
            for waiter in list(queue.waiters.values()):
                if failure.key in (key, waiter.adapter):
                    self._forget(key, waiter.number)
                    yield RejectFailed(waiter.number, failure)

    def _evict_idle(self, *, disk: bool) -> Iterator[Evict]:
        """The engine that goes first, however young it is; sleeping ones hold no files on the disk."""
        sleeping = [] if disk else [engine.key for engine in self.capacity.sleeping()]
        for key in [*sleeping, *self.capacity.idle()][:1]:
            yield self._evict(self.engines[key])

    def _forget(self, key: str, number: int) -> None:
        queue = self._queues[key]
        self.waiting -= not queue.waiters.pop(number).by_operator
        if not queue.waiters:
            del self._queues[key]

    def _void(self, engine: EngineView) -> None:
        """Void its leases."""
        self.running -= engine.leases
        engine.leases = 0

    def _state(self, key: str) -> EngineState:
        engine = self.engines.get(key)
        return EngineState.STOPPED if engine is None else engine.state

    def _unused(self, engine: EngineView) -> bool:
        return engine.idle or engine.state is EngineState.SLEEPING

    def _expired(self, engine: EngineView, now: float) -> bool:
        return self.policy.idle_ttl is not None and now - engine.last_used >= self.policy.idle_ttl

    def _moments(self) -> Iterator[float]:
        cold = [queue for key, queue in self._queues.items() if self._state(key) is not EngineState.READY]
        yield from (queue.oldest.since + self.policy.fairness_wait for queue in cold)
        for engine in self.engines.values():
            if cold:
                yield engine.ready_at + self.policy.min_residency
            if engine.state is EngineState.STARTING:
                yield engine.awaited_until
            elif self.policy.idle_ttl is not None and self._unused(engine):
                yield engine.last_used + self.policy.idle_ttl


def _asleep(engine: EngineView, sleeper: str, count: int) -> EngineView:
    """The engine, which keeps `count` bytes, as a sleeping one."""
    return EngineView(
        sleeper,
        count,
        state=EngineState.SLEEPING,
        last_used=engine.last_used,
        swap=engine.swap,
        adapters=engine.adapters,
        asleep_bytes=count,
        slept=engine.key,
        awake_bytes=engine.bytes,
    )
