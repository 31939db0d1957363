"""Decides, does nothing: an event and the time in, actions out.

Pure: no clock, no asyncio, no logging. It alone knows which engine is in which state and who waits; the
pool tells it every event and carries its actions out, so every policy is tested as a plain sequence.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum

from inference_service.engines.base import EngineState
from inference_service.pool.events import (
    Action,
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
    Reason,
    Reject,
    Released,
    Request,
    Starting,
    Swap,
    TimePassed,
    Unload,
)

# Engines that were last used within the same such stretch of seconds are equally old: the one that is
# cheapest to load again goes first.
EQUALLY_OLD_SECONDS = 1.0
NEVER = float("inf")


@dataclass(frozen=True)
class Policy:
    """The operator's bounds. Seconds; `memory` in bytes on each device.

    None for `idle_ttl`: an idle engine stays; for `memory`: it is not known, slots alone count.
    """

    slots: int
    concurrency: int
    queued: int = 1_000_000
    fairness_wait: float = 10.0
    min_residency: float = 5.0
    idle_ttl: float | None = None
    memory: int | None = None


@dataclass
class EngineView:
    """What a decision needs of one engine; times on the caller's clock.

    `bytes`: what it takes on its device. `ready_at`: since when it serves; `load_seconds`: what its load
    took. A `pinned` engine is never torn down for another. A load is `awaited_until` then also where
    nobody waits for it at the moment. `gives_way`: it drains for a waiter, not for the operator.
    `has_turn`: it is being started, and no other of its device starts or ends meanwhile. `swap` and
    `adapters`: see Request. `successor`: what it drains for is its own next revision.
    """

    key: str
    bytes: int = 0
    pinned: bool = False
    state: EngineState = EngineState.STARTING
    leases: int = 0
    last_used: float = 0.0
    ready_at: float = 0.0
    load_seconds: float = 0.0
    awaited_until: float = 0.0
    gives_way: bool = False
    has_turn: bool = False
    swap: str | None = None
    adapters: int = 0
    successor: str | None = None


@dataclass(frozen=True)
class _Waiter:
    number: int
    since: float
    order: bool


@dataclass
class _Queue:
    """Who waits for one model, in order of arrival, and what its engine would take."""

    wish: Request
    waiters: dict[int, _Waiter] = field(default_factory=dict)
    pinned: bool = False
    fetched: bool = True

    @property
    def bytes(self) -> int:
        return self.wish.bytes

    @property
    def oldest(self) -> _Waiter:
        return next(iter(self.waiters.values()))

    def fits_into(self, engine: EngineView) -> bool:
        """Whether the engine could take these weights."""
        same = self.wish.swap is not None and self.wish.swap == engine.swap
        return self.fetched and same and engine.adapters >= self.wish.adapters


class _Verdict(StrEnum):
    FITS = "fits"
    LATER = "later"
    NEVER = "never"


class Scheduler:
    """The engines and waiters of one pool.

    1. A request for a ready engine is granted it, oldest first, while fewer than `concurrency` leases
       are out. Warm models never wait behind a load.
    2. A request for a model whose engine is on its way joins it: nothing to do.
    3. A wanted model without an engine is loaded where a slot is free and its bytes fit, the one that
       has waited longest first; who comes later does not take the room that an older one waits for.
    4. No room: the least recently used idle engines that no waiter wants, nobody has pinned and that have
       served for `min_residency` give way, as many as are needed.
    5. Not enough of them, and the oldest waiter has waited for `fairness_wait`: the least valuable busy
       engines (fewest requests, then least recently used) drain and give way too. An engine with leases is
       never torn down, and one whose waiters only lack a lease, all being out, is left to serve them.
    6. A load that nobody waits for any more is cancelled.
    7. An engine that has been idle for `idle_ttl` is torn down.
    8. A request beyond those that run and those that may wait is rejected, and so is one whose model
       cannot fit beside the pinned engines.
    9. A load that failed rejects all who waited for it. An engine that died has no leases any more.
    10. An unloaded engine drains; forced, it goes at once.
    11. An engine that drains for a waiter admits again once no cold model is waited for any more, or once it
       is pinned.

    12. While an engine is being started none gives way: it would have to wait for the device's turn, and
        serves meanwhile.
    13. No engine gives way for a model whose files are not there yet.
    14. Before any engine gives way: the weights of a wanted model are put into an idle engine that can take
        them, however young it is, or into the one that has drained for it. That needs no turn.
    15. A revision that is to replace another does so where no room is free beside it: in its idle engine, or
        once that has drained. Being pinned is no protection against one's own next revision.

    Slots and bytes count until an engine is gone, so an engine that is stopping or draining still holds
    them, but also promises them: no second engine goes for the same waiter.
    """

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        self.engines: dict[str, EngineView] = {}
        self.running = 0
        self.waiting = 0
        self._queues: dict[str, _Queue] = {}

    def handle(self, event: Event, now: float) -> list[Action]:
        """Take one event in; what to do for it, in this order."""
        return [*self._take(event, now), *self._decide(now)]

    def next_look(self, now: float) -> float | None:
        """When time alone may change the decision; None: only an event does."""
        return min((moment for moment in self._moments() if now < moment < NEVER), default=None)

    def victims(self, now: float) -> list[str]:
        """Idle engines in the order in which they would give way."""
        free = [engine for engine in self.engines.values() if _idle(engine) and self._settled(engine, now)]
        return [engine.key for engine in sorted(free, key=_age)]

    def give_way(self) -> Evict | None:
        """The idle engine that goes where something other than a slot is short, however young it is."""
        idle = self.idle()
        return self._evict(self.engines[idle[0]]) if idle else None

    def idle(self) -> list[str]:
        """Engines that nobody uses or waits for, however young, in the order in which they would go."""
        free = [
            engine for engine in self.engines.values() if _idle(engine) and engine.key not in self._queues
        ]
        return [engine.key for engine in sorted(free, key=_age)]

    def waiting_for(self, key: str) -> int:
        """How many wait for a model."""
        return len(self._queues[key].waiters) if key in self._queues else 0

    def _take(self, event: Event, now: float) -> Iterator[Action]:
        match event:
            case Request():
                yield from self._request(event, now)
            case Fetched(key):
                if key in self._queues:
                    self._queues[key].fetched = True
            case FetchFailed(key):
                yield from self._reject_all(key, Reason.LOAD_FAILED)
            case Left(number, linger):
                self._left(number, now + linger)
            case Pinned(key, pinned):
                self._pin(key, pinned=pinned)
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
            case Failed(key):
                engine.state = EngineState.FAILED
                yield from self._reject_all(key, Reason.LOAD_FAILED)
            case Died():
                self._void(engine)
                engine.state = EngineState.FAILED
            case Gone(key):
                self._void(engine)
                del self.engines[key]
            case Unload(_, force):
                yield from self._unload(engine, force=force)

    def _request(self, request: Request, now: float) -> Iterator[Action]:
        engine = self.engines.get(request.key)
        warm = engine is not None and engine.state is EngineState.READY
        full = self.waiting >= self.policy.queued and not request.order
        if full and not (warm and self.running < self.policy.concurrency):
            yield Reject(request.number, Reason.OVERLOADED)
            return
        queue = self._queues.setdefault(request.key, _Queue(request))
        # Who joins an order to replace an engine does not change that.
        instead_of = request.instead_of or queue.wish.instead_of
        queue.wish = replace(request, instead_of=instead_of)
        queue.pinned, queue.fetched = request.pinned, request.fetched
        queue.waiters[request.number] = _Waiter(request.number, now, request.order)
        self.waiting += not request.order

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
            yield self._swap_or_evict(engine, now)

    def _loaded(self, engine: EngineView, seconds: float, now: float) -> None:
        engine.state = EngineState.READY
        engine.has_turn = False
        engine.load_seconds = seconds
        engine.last_used = now
        self._is_awaited_as_any(engine, now)
        # An engine that has only taken other weights is as old as it was.
        engine.ready_at = engine.ready_at or now

    def _is_awaited_as_any(self, engine: EngineView, now: float) -> None:
        """A swap is over, for good or ill: from now on it counts who waits."""
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
        for engine in list(self.engines.values()):
            if engine.key in self._queues:
                continue
            if engine.state is EngineState.STARTING and engine.awaited_until <= now:
                yield self._cancel(engine)
            elif _idle(engine) and self._expired(engine, now) and not self._turn_is_taken():
                yield self._evict(engine)

    def _turn_is_taken(self) -> bool:
        """Case 12."""
        return any(
            engine.has_turn and engine.state is EngineState.STARTING for engine in self.engines.values()
        )

    def _call_off_drains(self) -> None:
        """Case 11."""
        cold = any(key not in self.engines for key in self._queues)
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
            warm = [key for key in self._queues if self._state(key) is EngineState.READY]
            key = min(warm, key=lambda key: self._queues[key].oldest.number, default=None)
            if key is None:
                return
            number = self._queues[key].oldest.number
            self._forget(key, number)
            self.engines[key].leases += 1
            self.engines[key].last_used = now
            self.running += 1
            yield Grant(number, key)

    def _make_room(self, now: float) -> Iterator[Action]:
        """Cases 3 to 5 and 8, for each cold model in the order of its oldest waiter."""
        cold = sorted(
            (key for key in self._queues if key not in self.engines),
            key=lambda key: self._queues[key].oldest.number,
        )
        blocked: list[str] = []
        for key in cold:
            match self._verdict(key, blocked):
                case _Verdict.NEVER:
                    yield from self._reject_all(key, Reason.NO_ROOM)
                case _Verdict.FITS:
                    yield self._load(key, now)
                case _Verdict.LATER:
                    engine = self._takes(key)
                    if engine is not None:
                        yield self._swap(key, engine, now)
                        continue
                    if self._queues[key].fetched and not self._turn_is_taken():
                        yield from self._give_way_for(key, blocked, now)
                    blocked.append(key)

    def _verdict(self, key: str, blocked: Sequence[str]) -> _Verdict:
        queue = self._queues[key]
        pinned = [
            engine
            for engine in self.engines.values()
            if engine.pinned and engine.state in (EngineState.STARTING, EngineState.READY)
            if engine.key != queue.wish.instead_of
        ]
        if not self._fits(queue.bytes, pinned, ()):
            return _Verdict.NEVER
        if self._fits(queue.bytes, list(self.engines.values()), blocked):
            return _Verdict.FITS
        return _Verdict.LATER

    def _takes(self, key: str) -> EngineView | None:
        """Case 14: the idle engine that gets the weights of `key`; its own last revision's, or the oldest."""
        queue = self._queues[key]
        own = self.engines.get(queue.wish.instead_of or "")
        able = [self.engines[name] for name in self.idle() if queue.fits_into(self.engines[name])]
        # What takes adapters is kept for who needs them.
        able.sort(key=lambda engine: engine.adapters)
        if own is not None and own.key not in self._queues and queue.fits_into(own):
            able = [own] if own.state is EngineState.READY and own.leases == 0 else able
        return able[0] if able else None

    def _swap(self, key: str, engine: EngineView, now: float) -> Swap:
        queue = self._queues[key]
        del self.engines[engine.key]
        self.engines[key] = EngineView(
            key,
            engine.bytes,
            queue.pinned,
            last_used=now,
            ready_at=engine.ready_at,
            # To its end, whoever waits for it: it is done in a moment.
            awaited_until=NEVER,
            swap=engine.swap,
            adapters=engine.adapters,
        )
        return Swap(key, engine.key)

    def _swap_or_evict(self, engine: EngineView, now: float) -> Action:
        """The end of an engine that has drained, or of its model only: the first in line may take it."""
        cold = [key for key in self._queues if key not in self.engines]
        first = min(cold, key=lambda key: self._queues[key].oldest.number, default=None)
        heir = engine.successor if engine.successor in cold else first
        if engine.gives_way and heir is not None and self._queues[heir].fits_into(engine):
            return self._swap(heir, engine, now)
        return self._evict(engine)

    def _replace(self, key: str, old: EngineView) -> Iterator[Action]:
        """Case 15: `old` makes room for its own next revision."""
        if old.state is EngineState.READY:
            old.successor = key
            yield from self._drain(old)

    def _give_way_for(self, key: str, blocked: Sequence[str], now: float) -> Iterator[Action]:
        queue = self._queues[key]
        old = self.engines.get(queue.wish.instead_of or "")
        if old is not None:
            yield from self._replace(key, old)
            return
        idle = [self.engines[name] for name in self.victims(now) if name not in self._queues]
        busy = self._busy(now) if now - queue.oldest.since >= self.policy.fairness_wait else []
        busy = [engine for engine in busy if engine not in idle]
        for engine in self._enough(queue.bytes, blocked, [*idle, *busy]):
            if engine in idle:
                yield self._evict(engine)
            else:
                yield from self._drain(engine)

    def _enough(self, count: int, blocked: Sequence[str], candidates: list[EngineView]) -> list[EngineView]:
        """As few of the candidates, in their order, as make room; none where all would not."""
        staying = [engine for engine in self.engines.values() if not _leaving(engine)]
        chosen: list[EngineView] = []
        for candidate in candidates:
            if self._fits(count, staying, blocked):
                break
            chosen.append(candidate)
            staying.remove(candidate)
        if not self._fits(count, staying, blocked):
            return []
        for candidate in list(reversed(chosen)):
            if self._fits(count, [*staying, candidate], blocked):
                chosen.remove(candidate)
                staying.append(candidate)
        return chosen

    def _fits(self, count: int, engines: Sequence[EngineView], blocked: Sequence[str]) -> bool:
        """Whether so many bytes fit beside these engines and those that older waiters need."""
        if len(engines) + len(blocked) >= self.policy.slots:
            return False
        if self.policy.memory is None:
            return True
        needed = sum(self._queues[key].bytes for key in blocked)
        return sum(engine.bytes for engine in engines) + needed + count <= self.policy.memory

    def _busy(self, now: float) -> list[EngineView]:
        """Ready engines that could be drained, the least valuable first."""
        candidates = [
            engine
            for engine in self.engines.values()
            if engine.state is EngineState.READY
            and not engine.pinned
            and self._settled(engine, now)
            and not self._kept_waiting(engine)
        ]
        return sorted(
            candidates,
            key=lambda engine: (engine.leases + self.waiting_for(engine.key), engine.last_used),
        )

    def _kept_waiting(self, engine: EngineView) -> bool:
        """It has served nobody for want of a lease, which another engine in its place would want as well."""
        return engine.leases == 0 and self.running >= self.policy.concurrency

    def _load(self, key: str, now: float) -> Load:
        queue = self._queues[key]
        self.engines[key] = EngineView(
            key,
            queue.bytes,
            queue.pinned,
            last_used=now,
            swap=queue.wish.swap,
            adapters=queue.wish.adapters,
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

    def _forget(self, key: str, number: int) -> None:
        queue = self._queues[key]
        self.waiting -= not queue.waiters.pop(number).order
        if not queue.waiters:
            del self._queues[key]

    def _void(self, engine: EngineView) -> None:
        """Its leases end with it."""
        self.running -= engine.leases
        engine.leases = 0

    def _state(self, key: str) -> EngineState:
        engine = self.engines.get(key)
        return EngineState.STOPPED if engine is None else engine.state

    def _expired(self, engine: EngineView, now: float) -> bool:
        return self.policy.idle_ttl is not None and now - engine.last_used >= self.policy.idle_ttl

    def _settled(self, engine: EngineView, now: float) -> bool:
        return now - engine.ready_at >= self.policy.min_residency

    def _moments(self) -> Iterator[float]:
        cold = [queue for key, queue in self._queues.items() if self._state(key) is not EngineState.READY]
        yield from (queue.oldest.since + self.policy.fairness_wait for queue in cold)
        for engine in self.engines.values():
            if cold:
                yield engine.ready_at + self.policy.min_residency
            if engine.state is EngineState.STARTING:
                yield engine.awaited_until
            elif self.policy.idle_ttl is not None and _idle(engine):
                yield engine.last_used + self.policy.idle_ttl


def _idle(engine: EngineView) -> bool:
    return engine.state is EngineState.READY and engine.leases == 0 and not engine.pinned


def _leaving(engine: EngineView) -> bool:
    return engine.state in (EngineState.DRAINING, EngineState.STOPPING, EngineState.FAILED)


def _age(engine: EngineView) -> tuple[float, float, float]:
    return (engine.last_used // EQUALLY_OLD_SECONDS, engine.load_seconds, engine.last_used)
