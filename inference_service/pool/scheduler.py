"""Decides, does nothing: from engines, waiters and the time to actions.

Pure: no clock, no asyncio, no logging. The pool calls `decide` after every event and carries the
actions out; every policy is tested as a plain sequence of calls.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from inference_service.engines.base import EngineState

# Engines that were last used within the same such stretch of seconds are equally old: the one that is
# cheapest to load again goes first.
EQUALLY_OLD_SECONDS = 1.0


@dataclass(frozen=True)
class Policy:
    """The operator's bounds. Seconds; `idle_ttl` None: an idle engine stays."""

    slots: int
    concurrency: int
    fairness_wait: float = 10.0
    min_residency: float = 5.0
    idle_ttl: float | None = None


@dataclass(frozen=True)
class EngineView:
    """What a decision needs of one engine; times on the caller's clock.

    `ready_at`: since when it serves; `load_seconds`: what its load took; a `pinned` engine is never torn down
    for another; a load is `awaited` until then also where nobody waits for it at the moment.
    """

    key: str
    state: EngineState
    leases: int
    last_used: float
    pinned: bool = False
    ready_at: float = 0.0
    load_seconds: float = 0.0
    awaited_until: float = 0.0


@dataclass(frozen=True)
class WaiterView:
    """One request that waits for an engine since then, in order of arrival."""

    number: int
    key: str
    since: float = 0.0


@dataclass(frozen=True)
class Grant:
    """Give the waiter a lease on the ready engine `key`."""

    waiter: int
    key: str


@dataclass(frozen=True)
class Load:
    """Start an engine for `key`; a slot is free."""

    key: str


@dataclass(frozen=True)
class Evict:
    """Tear the idle engine `key` down; its slot is free once it is gone."""

    key: str


@dataclass(frozen=True)
class Drain:
    """Admit nobody to the busy engine `key` any more; it is torn down with its last lease."""

    key: str


@dataclass(frozen=True)
class CancelLoad:
    """Nobody wants the load of `key` any more."""

    key: str


Action = Grant | Load | Evict | Drain | CancelLoad


def decide(
    engines: Sequence[EngineView], waiters: Sequence[WaiterView], policy: Policy, now: float
) -> list[Action]:
    """What to do now.

    1. A waiter whose engine is ready is granted it, oldest first, while fewer than `concurrency`
       leases are out. Warm models never wait behind a load.
    2. A waiter whose engine is on its way joins it: nothing to do.
    3. A wanted model without an engine is loaded into a free slot, oldest waiter first.
    4. No free slot: the least recently used idle engine that no waiter wants, nobody has pinned and that
       has served for `min_residency` gives way.
    5. None such, and the oldest waiter has waited for `fairness_wait`: the least valuable busy engine
       (fewest requests, then least recently used) drains and gives way. An engine with leases is never
       torn down.
    6. A load that nobody waits for any more is cancelled.
    7. An engine that has been idle for `idle_ttl` is torn down.

    `slots` count until an engine is gone, so an engine that is stopping or draining still holds one, but
    also promises one: no second engine goes for the same waiter.
    """
    by_key = {engine.key: engine for engine in engines}
    grants = _grants(by_key, waiters, policy.concurrency)
    granted = {grant.key for grant in grants}
    room = _make_room(engines, waiters, granted, policy, now)
    wanted = {waiter.key for waiter in waiters}
    gone = {action.key for action in room if isinstance(action, Evict)}
    quiet = [engine for engine in engines if engine.key not in wanted | granted | gone]
    return [*grants, *room, *_cancelled(quiet, now), *_expired(quiet, policy, now)]


def next_look(
    engines: Sequence[EngineView], waiters: Sequence[WaiterView], policy: Policy, now: float
) -> float | None:
    """When time alone may change the decision; None: only an event does."""
    cold = {engine.key for engine in engines if engine.state is EngineState.READY}
    moments = [waiter.since + policy.fairness_wait for waiter in waiters if waiter.key not in cold]
    if moments:
        moments += [engine.ready_at + policy.min_residency for engine in engines]
    for engine in engines:
        if engine.state is EngineState.STARTING:
            moments.append(engine.awaited_until)
        elif policy.idle_ttl is not None and _idle(engine):
            moments.append(engine.last_used + policy.idle_ttl)
    return min((moment for moment in moments if moment > now), default=None)


def victims(engines: Sequence[EngineView], policy: Policy, now: float) -> list[str]:
    """Idle engines in the order in which they would give way."""
    free = [engine for engine in engines if _idle(engine) and _settled(engine, policy, now)]
    return [engine.key for engine in sorted(free, key=_age)]


def _make_room(
    engines: Sequence[EngineView],
    waiters: Sequence[WaiterView],
    granted: set[str],
    policy: Policy,
    now: float,
) -> list[Action]:
    """Cases 3 to 5, for each cold model in the order of its oldest waiter."""
    present = {engine.key for engine in engines}
    oldest = _oldest(waiters)
    kept = set(oldest) | granted
    idle = [key for key in victims(engines, policy, now) if key not in kept]
    busy = list(_busy(engines, waiters, policy, now))
    free = policy.slots - len(engines)
    promised = sum(engine.state in (EngineState.STOPPING, EngineState.DRAINING) for engine in engines)
    actions: list[Action] = []
    for key, since in oldest.items():
        if key in present:
            continue
        if free > 0:
            free -= 1
            actions.append(Load(key))
        elif promised > 0:
            promised -= 1
        elif idle:
            actions.append(Evict(idle.pop(0)))
        elif busy and now - since >= policy.fairness_wait:
            actions.append(Drain(busy.pop(0)))
    return actions


def _oldest(waiters: Sequence[WaiterView]) -> dict[str, float]:
    """Wanted models and since when, the longest waiting first."""
    oldest: dict[str, float] = {}
    for waiter in waiters:
        oldest[waiter.key] = min(waiter.since, oldest.get(waiter.key, waiter.since))
    return dict(sorted(oldest.items(), key=lambda item: item[1]))


def _grants(by_key: dict[str, EngineView], waiters: Sequence[WaiterView], concurrency: int) -> list[Grant]:
    room = concurrency - sum(engine.leases for engine in by_key.values())
    ready = [
        Grant(waiter.number, waiter.key)
        for waiter in waiters
        if waiter.key in by_key and by_key[waiter.key].state is EngineState.READY
    ]
    return ready[: max(0, room)]


def _busy(
    engines: Sequence[EngineView], waiters: Sequence[WaiterView], policy: Policy, now: float
) -> Iterator[str]:
    """Ready engines that could be drained, the least valuable first."""
    asked = [waiter.key for waiter in waiters]
    candidates = [
        engine
        for engine in engines
        if engine.state is EngineState.READY and not engine.pinned and _settled(engine, policy, now)
    ]
    value = {engine.key: (engine.leases + asked.count(engine.key), engine.last_used) for engine in candidates}
    yield from sorted(value, key=lambda key: value[key])


def _cancelled(engines: Sequence[EngineView], now: float) -> Iterator[CancelLoad]:
    for engine in engines:
        if engine.state is EngineState.STARTING and engine.awaited_until <= now:
            yield CancelLoad(engine.key)


def _expired(engines: Sequence[EngineView], policy: Policy, now: float) -> Iterator[Evict]:
    for engine in engines:
        if policy.idle_ttl is not None and _idle(engine) and now - engine.last_used >= policy.idle_ttl:
            yield Evict(engine.key)


def _idle(engine: EngineView) -> bool:
    return engine.state is EngineState.READY and engine.leases == 0 and not engine.pinned


def _settled(engine: EngineView, policy: Policy, now: float) -> bool:
    return now - engine.ready_at >= policy.min_residency


def _age(engine: EngineView) -> tuple[float, float, float]:
    return (engine.last_used // EQUALLY_OLD_SECONDS, engine.load_seconds, engine.last_used)
