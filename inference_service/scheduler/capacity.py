"""Where a requested model goes: whether it fits, which engine takes its weights, which give way."""

from collections.abc import Mapping, Sequence
from enum import StrEnum

from inference_service.scheduler.state import Claims, EngineState, EngineView, Policy, Queue


class Verdict(StrEnum):
    """An engine fits now, after evictions, or never beside the pinned ones."""

    FITS = "fits"
    LATER = "later"
    NEVER = "never"


class Capacity:
    """The capacity of one pool; reads engines and queues and changes neither.

    `older` are always the claims of the models that have waited longer: their share must not be taken.
    """

    def __init__(
        self, policy: Policy, engines: Mapping[str, EngineView], queues: Mapping[str, Queue]
    ) -> None:
        self._policy = policy
        self._engines = engines
        self._queues = queues

    def victims(self, now: float) -> list[str]:
        """Idle engines in the order in which they would be evicted."""
        free = [engine for engine in self._engines.values() if engine.idle and self._settled(engine, now)]
        return [engine.key for engine in sorted(free, key=lambda engine: engine.age)]

    def idle(self) -> list[str]:
        """Engines without leases and waiters, however young, in the order in which they would be evicted."""
        free = [engine for engine in self._engines.values() if engine.idle and engine.key not in self._queues]
        return [engine.key for engine in sorted(free, key=lambda engine: engine.age)]

    def sleeping(self) -> list[EngineView]:
        """Engines that sleep, in the order in which they would end."""
        found = [engine for engine in self._engines.values() if engine.state is EngineState.SLEEPING]
        return sorted(found, key=lambda engine: engine.last_used)

    def verdict(self, key: str, older: Claims) -> Verdict:
        """Whether an engine for `key` fits beside the existing ones."""
        queue = self._queues[key]
        if not self._fits(queue.bytes, self._pinned(queue), Claims()):
            return Verdict.NEVER
        woken = self.wakes(key)
        others = [engine for engine in self._engines.values() if engine is not woken]
        return Verdict.FITS if self._fits(self.needed(key), others, older) else Verdict.LATER

    def wakes(self, key: str) -> EngineView | None:
        """Case 17: the sleeping engine to wake with `key`: the one that slept with it, or the oldest.

        None that could not be woken beside the pinned ones.
        """
        if not self._policy.sleepers:
            return None
        queue, engines = self._queues[key], self._engines.values()
        able = [each for each in engines if each.state is EngineState.SLEEPING and queue.fits_into(each)]
        if not able:
            return None
        pinned = self._pinned(queue)
        able = [engine for engine in able if self._fits(engine.full_bytes, pinned, Claims())]
        return min(able, key=lambda each: (each.slept != key, each.adapters, each.last_used), default=None)

    def surplus(self) -> list[EngineView]:
        """Case 17: the sleeping engines beyond their number that none of the requested models wakes."""
        asleep = self.sleeping()
        count = len(asleep) - self._policy.sleepers
        if count <= 0:
            return []
        woken = {self.wakes(key) for key in self._queues if key not in self._engines}
        return [engine for engine in asleep if engine not in woken][:count]

    def waits_to_wake(self, key: str) -> bool:
        """Whether a sleeping engine will take `key` once its files are there."""
        queue = self._queues[key]
        if queue.fetched or not self._policy.sleepers:
            return False
        return any(queue.is_of_kind(engine) for engine in self.sleeping())

    def takes(self, key: str) -> EngineView | None:
        """Case 14: the idle engine to swap `key` into: its own previous revision's, or the oldest."""
        queue = self._queues[key]
        own = self._engines.get(queue.request.instead_of or "")
        able = [self._engines[name] for name in self.idle() if queue.fits_into(self._engines[name])]
        # Engines that take adapters are kept for models that need them.
        able.sort(key=lambda engine: engine.adapters)
        if own is not None and own.key not in self._queues and queue.fits_into(own):
            able = [own] if own.state is EngineState.READY and own.leases == 0 else able
        return able[0] if able else None

    def will_take(self, key: str) -> EngineView | None:
        """Case 16: the engine that `key` will probably be put into, sleeping or with leases."""
        queue, woken = self._queues[key], self.wakes(key)
        if woken is not None:
            return woken
        own = queue.request.instead_of
        able = [
            engine
            for engine in self._engines.values()
            if queue.fits_into(engine)
            if engine.gives_way
            or (engine.state is EngineState.READY and (not engine.pinned or engine.key == own))
        ]
        return min(
            able,
            key=lambda engine: (
                engine.successor != key,
                engine.key != own,
                not engine.gives_way,
                self._requests(engine),
                engine.last_used,
            ),
            default=None,
        )

    def giving_way(self, key: str, older: Claims, now: float, running: int) -> list[EngineView]:
        """Cases 4 and 5: the engines that give way to `key`, sleeping ones first; none if not enough would.

        `running`: the number of leases.
        """
        queue = self._queues[key]
        woken = self.wakes(key)
        candidates = [engine for engine in self.sleeping() if engine is not woken]
        candidates += [self._engines[name] for name in self.victims(now) if name not in self._queues]
        if now - queue.oldest.since >= self._policy.fairness_wait:
            candidates += [engine for engine in self._busy(now, running) if engine not in candidates]
        staying = [each for each in self._engines.values() if not each.leaving and each is not woken]
        return self._enough(self.needed(key) + self._kept(), older, staying, candidates)

    def displaced(self, engine: EngineView, key: str, older: Claims | None = None) -> list[EngineView] | None:
        """Case 17: the sleeping engines that end so that `engine` sleeps, which gives way to `key`; None: it
        ends.
        """
        going = [each for each in self._engines.values() if each.goes_to_sleep]
        places = self._policy.sleepers - len(going) - 1
        if engine.asleep_bytes is None or engine.swap is None or places < 0:
            return None
        woken = self.wakes(key)
        asleep = [each for each in reversed(self.sleeping()) if each is not woken]
        # Of each kind one first: any of that kind can be woken with its weights.
        asleep.sort(key=lambda each: each.swap == engine.swap)
        awake = [each for each in self._awake() if not each.leaving and each is not engine]
        count = self.needed(key) + self._kept() + engine.asleep_bytes
        return asleep[places:] if self._fits(count, [*awake, *asleep[:places]], older or Claims()) else None

    def _pinned(self, queue: Queue) -> list[EngineView]:
        return [
            engine
            for engine in self._engines.values()
            if engine.pinned and engine.state in (EngineState.STARTING, EngineState.READY)
            if engine.key != queue.request.instead_of
        ]

    def _awake(self) -> list[EngineView]:
        return [engine for engine in self._engines.values() if engine.slept is None]

    def needed(self, key: str) -> int:
        """Bytes that an engine for `key` takes."""
        woken = self.wakes(key)
        return self._queues[key].bytes if woken is None else woken.full_bytes

    def _kept(self) -> int:
        """Bytes that the engines which are about to sleep will keep."""
        return sum(each.asleep_bytes or 0 for each in self._engines.values() if each.goes_to_sleep)

    def _enough(
        self, count: int, older: Claims, staying: list[EngineView], candidates: list[EngineView]
    ) -> list[EngineView]:
        """The fewest candidates, in their order, that free enough; none if all would not."""
        going = {id(candidate) for candidate in candidates}
        if not self._fits(count, [engine for engine in staying if id(engine) not in going], older):
            return []
        chosen: list[EngineView] = []
        for candidate in candidates:
            if self._fits(count, staying, older):
                break
            chosen.append(candidate)
            staying.remove(candidate)
        for candidate in list(reversed(chosen)):
            if self._fits(count, [*staying, candidate], older):
                chosen.remove(candidate)
                staying.append(candidate)
        return chosen

    def _busy(self, now: float, running: int) -> list[EngineView]:
        """Ready engines that could be drained, the least valuable first."""
        candidates = [
            engine
            for engine in self._engines.values()
            if engine.state is EngineState.READY
            and not engine.pinned
            and self._settled(engine, now)
            and not self._kept_waiting(engine, running)
        ]
        return sorted(candidates, key=lambda engine: (self._requests(engine), engine.last_used))

    def _requests(self, engine: EngineView) -> int:
        """Requests that run on it and requests that wait for it."""
        queue = self._queues.get(engine.key)
        return engine.leases + (0 if queue is None else len(queue.waiters))

    def _kept_waiting(self, engine: EngineView, running: int) -> bool:
        """It is idle only for lack of a lease, which another engine in its place would lack as well."""
        return engine.leases == 0 and running >= self._policy.concurrency

    def _fits(self, count: int, engines: Sequence[EngineView], older: Claims) -> bool:
        """Whether this many bytes fit beside these engines and what older waiters need."""
        if sum(engine.slept is None for engine in engines) + older.models >= self._policy.slots:
            return False
        if self._policy.memory is None:
            return True
        return sum(engine.bytes for engine in engines) + older.bytes + count <= self._policy.memory

    def _settled(self, engine: EngineView, now: float) -> bool:
        return now - engine.ready_at >= self._policy.min_residency
