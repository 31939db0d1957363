"""Decides, does nothing: from engines and waiters to actions.

Pure: no clock, no asyncio, no logging. The pool calls `decide` after every event and carries the
actions out; every policy is tested as a plain sequence of calls.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from inference_service.engines.base import EngineState


@dataclass(frozen=True)
class EngineView:
    """What a decision needs of one engine. `last_used` only orders: larger is more recent.

    A `pinned` engine is never torn down for another.
    """

    key: str
    state: EngineState
    leases: int
    last_used: float
    pinned: bool = False


@dataclass(frozen=True)
class WaiterView:
    """One request that waits for an engine, in order of arrival."""

    number: int
    key: str


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


Action = Grant | Load | Evict


def decide(
    engines: Sequence[EngineView],
    waiters: Sequence[WaiterView],
    *,
    slots: int,
    concurrency: int,
) -> list[Action]:
    """What to do now.

    1. A waiter whose engine is ready is granted it, oldest first, while fewer than `concurrency`
       leases are out. Warm models never wait behind a load.
    2. A waiter whose engine is on its way joins it: nothing to do.
    3. A wanted model without an engine is loaded into a free slot, oldest waiter first.
    4. No free slot: the least recently used idle engine that no waiter wants and nobody has pinned
       gives way.
    5. Otherwise it waits: an engine with leases is never torn down.

    `slots` count until an engine is gone, so an engine that is stopping still holds one, but also
    promises one: no second engine is evicted for the same waiter.
    """
    by_key = {engine.key: engine for engine in engines}
    actions: list[Action] = list(_grants(by_key, waiters, concurrency))
    granted = {action.key for action in actions if isinstance(action, Grant)}
    wanted = list(dict.fromkeys(waiter.key for waiter in waiters))
    victims = _victims(engines, busy=granted, wanted=set(wanted))
    free = slots - len(engines)
    promised = sum(engine.state is EngineState.STOPPING for engine in engines)
    for key in wanted:
        if key in by_key:
            continue
        if free > 0:
            free -= 1
            actions.append(Load(key))
        elif promised > 0:
            promised -= 1
        elif victims:
            actions.append(Evict(victims.pop(0)))
    return actions


def _grants(by_key: dict[str, EngineView], waiters: Sequence[WaiterView], concurrency: int) -> list[Grant]:
    room = concurrency - sum(engine.leases for engine in by_key.values())
    ready = [
        Grant(waiter.number, waiter.key)
        for waiter in waiters
        if waiter.key in by_key and by_key[waiter.key].state is EngineState.READY
    ]
    return ready[: max(0, room)]


def _victims(engines: Sequence[EngineView], busy: set[str], wanted: set[str]) -> list[str]:
    idle = [
        engine
        for engine in engines
        if engine.state is EngineState.READY
        and engine.leases == 0
        and not engine.pinned
        and engine.key not in busy
        and engine.key not in wanted
    ]
    return [engine.key for engine in sorted(idle, key=lambda engine: engine.last_used)]
