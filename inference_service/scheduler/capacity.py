"""Where a requested model goes: whether it fits, which engine takes its weights, which are evicted."""

from collections.abc import Mapping, Sequence
from enum import StrEnum

from inference_service.scheduler.state import EngineState, EngineView, Policy, Queue


class Verdict(StrEnum):
    """An engine fits now, after evictions, or never beside the pinned ones."""

    FITS = "fits"
    LATER = "later"
    NEVER = "never"


class Capacity:
    """The capacity of one pool; reads engines and queues and changes neither.

    `blocked` are always the models that have waited longer: their share must not be taken.
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

    def verdict(self, key: str, blocked: Sequence[str]) -> Verdict:
        """Whether an engine for `key` fits beside the existing ones."""
        queue = self._queues[key]
        pinned = [
            engine
            for engine in self._engines.values()
            if engine.pinned and engine.state in (EngineState.STARTING, EngineState.READY)
            if engine.key != queue.request.instead_of
        ]
        if not self._fits(queue.bytes, pinned, ()):
            return Verdict.NEVER
        if self._fits(queue.bytes, list(self._engines.values()), blocked):
            return Verdict.FITS
        return Verdict.LATER

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
        """Case 16: the engine that `key` will probably be swapped into once it has no leases."""
        queue = self._queues[key]
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

    def giving_way(self, key: str, blocked: Sequence[str], now: float, running: int) -> list[EngineView]:
        """Cases 4 and 5: the engines to evict for `key`; none if that would not be enough.

        `running`: the number of leases.
        """
        queue = self._queues[key]
        candidates = [self._engines[name] for name in self.victims(now) if name not in self._queues]
        if now - queue.oldest.since >= self._policy.fairness_wait:
            candidates += [engine for engine in self._busy(now, running) if engine not in candidates]
        return self._enough(queue.bytes, blocked, candidates)

    def _enough(self, count: int, blocked: Sequence[str], candidates: list[EngineView]) -> list[EngineView]:
        """The fewest candidates, in their order, that free enough; none if all would not."""
        staying = [engine for engine in self._engines.values() if not engine.leaving]
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

    def _fits(self, count: int, engines: Sequence[EngineView], blocked: Sequence[str]) -> bool:
        """Whether this many bytes fit beside these engines and what older waiters need."""
        if len(engines) + len(blocked) >= self._policy.slots:
            return False
        if self._policy.memory is None:
            return True
        needed = sum(self._queues[key].bytes for key in blocked)
        return sum(engine.bytes for engine in engines) + needed + count <= self._policy.memory

    def _settled(self, engine: EngineView, now: float) -> bool:
        return now - engine.ready_at >= self._policy.min_residency
