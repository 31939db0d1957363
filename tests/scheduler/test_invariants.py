"""The pool under any sequence of events, against a reference model of what was promised to whom."""

import asyncio
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from inference_service.checkpoints.memory_profile import Footprint
from inference_service.checkpoints.reference import model_of
from inference_service.checkpoints.snapshot import Snapshot
from inference_service.config import WaitLimit
from inference_service.errors import (
    EngineError,
    EngineStartFailed,
    NoRoom,
    Overloaded,
    ServiceError,
    SwapFailed,
)
from inference_service.metrics import Metrics
from inference_service.pool.leases import Lease
from inference_service.pool.lifecycle import Limits
from inference_service.pool.loader import Parts
from inference_service.pool.pool import LINGER_SECONDS, Pool
from inference_service.scheduler.state import EngineState, Policy
from inference_service.storage.model import Model
from tests.pool.gated import MIB, GatedEngine, key, model

# Model -> MiB of its engine.
SIZES = {"a": 1, "b": 1, "c": 2, "d": 3}
# Models that can be swapped for one another.
KINDS = {"a": "small", "b": "small", "c": "large"}
NEVER = 1e9
QUEUED = 6
ENDING = (EngineState.STOPPING, EngineState.FAILED)
LEAVING = (EngineState.DRAINING, *ENDING)
names = st.sampled_from(sorted(SIZES))


@dataclass(eq=False)
class Asked:
    """One request as its client sees it."""

    name: str
    since: float
    task: "asyncio.Task[Lease]"


@dataclass(frozen=True)
class Sleep:
    """How many may sleep, the share of their memory that they free, and whether they do so at once."""

    places: int
    freed: float
    at_once: bool


@dataclass
class Reference:
    """What was asked and what came of it, kept apart from the pool."""

    waiting: list[Asked] = field(default_factory=list)
    # In the order of the grants; those of an engine that died or was forced out are void.
    held: list[Lease] = field(default_factory=list)
    void: list[Lease] = field(default_factory=list)
    runs: int = 0
    last_asked: str | None = None
    loads: int = 0
    # Loads that no run has asked for again: after a failure, a death, an unload, a load that was cancelled.
    excused: int = 0


class PoolMachine(RuleBasedStateMachine):
    """Every rule is one event; after each the pool does all that it can do by then."""

    def __init__(self) -> None:
        super().__init__()
        self.loop = asyncio.new_event_loop()
        self.now = 1000.0
        self.reference = Reference()
        self.made: list[GatedEngine] = []
        self.snapshots: list[str] = []
        self.unloads: list[asyncio.Task[bool]] = []
        self.pinned: set[str] = set()

    @initialize(
        slots=st.integers(1, 3),
        concurrency=st.integers(1, 4),
        memory=st.sampled_from([None, 3 * MIB, 4 * MIB]),
        fairness=st.sampled_from([10.0, NEVER]),
        residency=st.sampled_from([0.0, 5.0]),
        idle_ttl=st.sampled_from([None, 60.0]),
        kinds=st.sampled_from([{}, KINDS, {name: name for name in SIZES}]),
        sleep=st.builds(
            Sleep, st.sampled_from([1, 0, 2]), freed=st.sampled_from([0.5, 0.0, 1.0]), at_once=st.booleans()
        ),
    )
    def build(  # noqa: PLR0917  (one for each strategy)
        self,
        slots: int,
        concurrency: int,
        memory: int | None,
        fairness: float,
        residency: float,
        idle_ttl: float | None,
        kinds: dict[str, str],
        sleep: Sleep,
    ) -> None:
        self.policy = Policy(slots, concurrency, QUEUED, fairness, residency, idle_ttl, memory, sleep.places)
        self.sleep = sleep
        self.pool = Pool(
            Parts(
                self._fetch,
                self._release,
                self._make,
                self._free_bytes,
                lambda wanted: Footprint(SIZES[wanted.name] * MIB, 0, 0),
                swap_key=lambda wanted: kinds.get(wanted.name),
                asleep_bytes=lambda wanted: MIB // 4,
            ),
            Metrics(),
            policy=self.policy,
            limits=Limits(WaitLimit(NEVER), WaitLimit(NEVER), load_timeout=NEVER, stall_timeout=NEVER),
            clock=lambda: self.now,
        )

    # What happens.

    @rule(name=names)
    def request(self, name: str) -> None:
        reference = self.reference
        ready = self.pool.state(key(name)) is EngineState.READY
        at_once = ready and len(reference.held) < self.policy.concurrency and not self._waits(name)
        full = len(reference.waiting) >= QUEUED
        if name != reference.last_asked:
            reference.runs += 1
            reference.last_asked = name
        asked = Asked(name, self.now, self.loop.create_task(self.pool.lease(model(name))))
        reference.waiting.append(asked)
        self._settle()
        if at_once:
            assert asked not in reference.waiting, "a warm engine with room is granted at once"
            assert asked.task.exception() is None
        elif full:
            assert isinstance(asked.task.exception(), Overloaded | EngineStartFailed | NoRoom)

    @rule(name=names)
    def a_request_runs_through(self, name: str) -> None:
        """As far as nothing else stands in its way."""
        self.request(name)
        for engine in list(self.engines.values()):
            self._let_sleep(engine.snapshot.model)
        if self._starting(name):
            self.engines[name].started.set_result(None)
            self._settle()
        for lease in [lease for lease in self.reference.held if lease.model.name == name]:
            self.reference.held.remove(lease)
            self._settle(lease.release)

    @precondition(lambda self: self.reference.waiting)
    @rule(data=st.data())
    def client_leaves(self, data: st.DataObject) -> None:
        data.draw(st.sampled_from(self.reference.waiting)).task.cancel()
        self._settle()

    @precondition(lambda self: self.reference.held)
    @rule(data=st.data())
    def request_ends(self, data: st.DataObject) -> None:
        lease = data.draw(st.sampled_from(self.reference.held))
        self.reference.held.remove(lease)
        self._settle(lease.release, lease.release)

    @precondition(lambda self: self.reference.held and self._wait_for_a_warm_engine())
    @rule(data=st.data(), leaves_first=st.booleans())
    def a_client_leaves_in_the_moment_a_lease_comes_back(
        self, data: st.DataObject, leaves_first: bool
    ) -> None:
        lease = data.draw(st.sampled_from(self.reference.held))
        asked = data.draw(st.sampled_from(self._wait_for_a_warm_engine()))
        self.reference.held.remove(lease)
        events: list[Callable[[], object]] = [asked.task.cancel, lease.release]
        self._settle(*(events if leaves_first else reversed(events)))

    @precondition(lambda self: self.reference.void)
    @rule()
    def a_voided_lease_comes_back(self) -> None:
        self._settle(self.reference.void.pop().release)

    @rule(name=names)
    def engine_starts(self, name: str) -> None:
        if self._starting(name):
            self.engines[name].started.set_result(None)
            self._settle()

    @rule(name=names)
    def engine_fails_to_start(self, name: str) -> None:
        if self._starting(name):
            self.reference.excused += 1
            self.engines[name].started.set_exception(EngineStartFailed("broken"))
            self._settle()
            assert not self._waits(name), "all who waited for it are told"

    @rule(name=names)
    def engine_takes_no_other_weights(self, name: str) -> None:
        if self.pool.state(key(name)) is EngineState.READY:
            self.reference.excused += 1
            self.engines[name].swap_error = SwapFailed("broken")

    @rule(name=names)
    def engine_dies(self, name: str) -> None:
        if self.pool.state(key(name)) in (EngineState.READY, EngineState.DRAINING):
            self.reference.excused += 1
            self._void(name)
            self.engines[name].dead.set_result("killed")
            self._settle()

    @rule(name=names)
    def engine_is_gone(self, name: str) -> None:
        if self.pool.state(key(name)) in ENDING and name in self.engines:
            self._let_end(name)

    @rule(name=names)
    def engine_is_asleep(self, name: str) -> None:
        if name in self.engines:
            self._let_sleep(name)

    @precondition(lambda self: self._sleeping())
    @rule(data=st.data(), dies=st.booleans())
    def sleeper_is_gone(self, data: st.DataObject, dies: bool) -> None:
        sleeper = data.draw(st.sampled_from(self._sleeping()))
        if dies and not sleeper.dead.done():
            self.reference.excused += 1
            sleeper.dead.set_result("killed")
            self._settle()
        if sleeper.closing:
            self._end(sleeper)

    @rule(seconds=st.sampled_from([1.0, LINGER_SECONDS, 10.0, 60.0]))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds
        self._settle(self.pool.look)

    @rule(name=names, force=st.booleans())
    def operator_unloads(self, name: str, force: bool) -> None:
        if name in self.pool.names():
            self.reference.excused += 1
            if force:
                self._void(name)
            self.unloads.append(self.loop.create_task(self.pool.unload(name, force=force)))
            self._settle()

    @rule(name=names, pinned=st.booleans())
    def operator_pins(self, name: str, pinned: bool) -> None:
        (self.pinned.add if pinned else self.pinned.discard)(name)
        self._settle(lambda: self.pool.pin(model(name), pinned=pinned))

    # What holds at every moment.

    @invariant()
    def no_lease_is_lost_and_none_is_made_up(self) -> None:
        for lease in self.reference.held:
            assert lease in lease.slot.leases
            assert lease.slot.engine is not None
            assert not lease.slot.engine.closing, "an engine in use is never torn down"  # type: ignore[attr-defined]
        assert self._stats()["leases"] == len(self.reference.held) <= self._concurrency()

    @invariant()
    def waiters_are_those_who_wait(self) -> None:
        if self._built():
            waiting = [waiter["model"] for waiter in self._stats()["waiters"]]
            assert waiting == [asked.name for asked in self.reference.waiting]

    @invariant()
    def the_bounds_hold(self) -> None:
        if self._built():
            stats = self._stats()
            assert stats["slots"]["used"] <= self.policy.slots
            if self.policy.memory is not None:
                assert stats["budget"]["reserved_bytes"] <= self.policy.memory
            assert len(self.reference.waiting) <= QUEUED
            states = [engine["state"] for engine in stats["engines"]]
            assert states.count(EngineState.SLEEPING) <= self.policy.sleepers

    @invariant()
    def nobody_waits_for_what_could_be_done(self) -> None:
        """Past FAIRNESS_WAIT and MIN_RESIDENCY something is under way for the oldest cold waiter."""
        if not self._built():
            return
        cold = [asked for asked in self.reference.waiting if asked.name not in self.pool.names()]
        if not cold or self.now - cold[0].since < self.policy.fairness_wait:
            return
        views = self._stats()["engines"]
        states = [EngineState(view["state"]) for view in views]
        young = [
            view
            for view in views
            if self.now - self.ready_at.get(view["model"], 0.0) < self.policy.min_residency
        ]
        assert (
            EngineState.STARTING in states
            or any(state in LEAVING for state in states)
            or young
            or any(view["pinned"] for view in views)
        ), repr(self.pool)

    @invariant()
    def a_swap_has_its_reason(self) -> None:
        """Without FAIRNESS_WAIT no model is loaded more often than its requests come in runs."""
        reference = self.reference
        if self._built() and self.policy.fairness_wait == NEVER and self.policy.idle_ttl is None:
            assert reference.loads <= reference.runs + reference.excused

    def teardown(self) -> None:
        """Everybody who is left is served once nothing stands in the way; then nothing is left."""
        if self._built():
            self._serve_everyone()
            closing = self.loop.create_task(self.pool.close())
            self._settle()
            for engine in self.made:
                self._end(engine)
            self.loop.run_until_complete(asyncio.wait_for(closing, 5))
            assert self.snapshots == []
            assert all(self.loop.run_until_complete(unload) for unload in self.unloads)
            assert repr(self.pool) == "<Pool empty | waiting: none>"
        self.loop.close()

    def _serve_everyone(self) -> None:
        for name in sorted(self.pinned):
            self._settle(partial(self.pool.pin, model(name), pinned=False))
        self.now += 1000  # no load is held back any more
        for _ in range(4 * len(SIZES)):
            held, self.reference.held = self.reference.held, []
            self._settle(*(lease.release for lease in held + self.reference.void))
            for name in sorted(SIZES):
                if self._starting(name):
                    self.engines[name].started.set_result(None)
                if self.pool.state(key(name)) in ENDING and name in self.engines:
                    self._let_sleep(name)
                    self._let_end(name)
            for sleeper in self._sleeping():
                if sleeper.closing:
                    self._end(sleeper)
            self.now += max(self.policy.min_residency, min(self.policy.fairness_wait, 10.0))
            self._settle(self.pool.look)
            if not self.reference.waiting and not self.reference.held:
                break
        assert self.reference.waiting == [], repr(self.pool)
        assert self._stats()["leases"] == 0

    # The pool's surroundings.

    async def _fetch(self, wanted: Model, entered: Callable[[str], None]) -> Snapshot:
        self.snapshots.append(wanted.name)
        return Snapshot(wanted.name, wanted.revision, Path("/nowhere"), wanted.bytes)

    def _release(self, snapshot: Snapshot) -> None:
        self.snapshots.remove(snapshot.model)

    def _make(self, snapshot: Snapshot, footprint: Footprint) -> GatedEngine:
        self.reference.loads += 1
        engine = GatedEngine(snapshot)
        engine.sleep_frees = int(self.sleep.freed * SIZES[snapshot.model] * MIB)
        if not self.sleep.at_once:
            engine.may_sleep = self.loop.create_future()
        self.made.append(engine)
        return engine

    @property
    def engines(self) -> dict[str, GatedEngine]:
        """The youngest engine of each model; a swap makes it another's."""
        return {engine.snapshot.model: engine for engine in self.made if not engine.asleep}

    def _sleeping(self) -> list[GatedEngine]:
        return [engine for engine in self.made if engine.asleep and not engine.closed]

    async def _free_bytes(self) -> int | None:
        return None

    # The machine's own bookkeeping.

    def _built(self) -> bool:
        return hasattr(self, "pool")

    def _concurrency(self) -> int:
        return self.policy.concurrency if self._built() else 0

    def _stats(self) -> dict[str, Any]:
        return self._run(self.pool.stats()) if self._built() else {"leases": 0}

    def _run(self, work: Coroutine[Any, Any, dict[str, Any]]) -> dict[str, Any]:
        return self.loop.run_until_complete(work)

    def _waits(self, name: str) -> bool:
        return any(asked.name == name for asked in self.reference.waiting)

    def _wait_for_a_warm_engine(self) -> list[Asked]:
        """Those who are granted a lease as soon as another comes back."""
        return [
            asked for asked in self.reference.waiting if self.pool.state(key(asked.name)) is EngineState.READY
        ]

    def _starting(self, name: str) -> bool:
        engine = self.engines.get(name)
        starting = self.pool.state(key(name)) is EngineState.STARTING
        return starting and engine is not None and not engine.closing and not engine.started.done()

    def _void(self, name: str) -> None:
        gone = [lease for lease in self.reference.held if lease.model.name == name]
        self.reference.void += gone
        self.reference.held = [lease for lease in self.reference.held if lease.model.name != name]

    def _let_end(self, name: str) -> None:
        if name in self.engines:
            self._end(self.engines[name])

    def _end(self, engine: GatedEngine) -> None:
        if not engine.may_close.done():
            engine.may_close.set_result(None)
        self._settle()

    def _let_sleep(self, name: str) -> None:
        engine = self.engines[name]
        if engine.commands[-1:] == ["sleep"] and not engine.may_sleep.done():
            engine.may_sleep.set_result(None)
            self._settle()
            engine.may_sleep = self.loop.create_future()

    def _settle(self, *events: Callable[[], object]) -> None:
        """Let everything happen that can, then see who was answered, in the order of their arrival."""

        async def turns() -> None:
            for event in events:
                event()
            for _ in range(30):
                await asyncio.sleep(0)

        self.loop.run_until_complete(turns())
        granted: dict[str, bool] = {}
        for asked in list(self.reference.waiting):
            if not asked.task.done():
                granted[asked.name] = False
                continue
            self.reference.waiting.remove(asked)
            if asked.task.cancelled():
                self.reference.excused += 1
                continue
            error = asked.task.exception()
            if error is None:
                assert granted.get(asked.name, True), "the oldest first"
                self.reference.held.append(asked.task.result())
            else:
                assert isinstance(error, ServiceError)
                assert isinstance(error, EngineError | NoRoom | Overloaded), error
                self.reference.excused += 1

    @property
    def ready_at(self) -> dict[str, float]:
        views = self.pool._scheduler.engines.items()
        return {model_of(reference): view.ready_at for reference, view in views}


def sequences(count: int) -> settings:
    return settings(
        max_examples=count,
        stateful_step_count=40,
        # The same sequences in each run: a failure then belongs to the change that it appears with.
        derandomize=True,
        deadline=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
    )


class TestPoolMachine(PoolMachine.TestCase):  # type: ignore[valid-type,misc]
    settings = sequences(200)


@pytest.mark.slow
class TestPoolMachineForLong(PoolMachine.TestCase):  # type: ignore[valid-type,misc]
    settings = sequences(2000)
