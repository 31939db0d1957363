"""The pool with gated engines: no sleeps, assertions on what it says of itself."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from inference_service.checkpoints.memory_profile import Footprint
from inference_service.checkpoints.snapshot import Snapshot
from inference_service.config import WaitLimit
from inference_service.engines.base import Heartbeat
from inference_service.errors import (
    DiskFull,
    EngineDied,
    EngineError,
    EngineStartFailed,
    EngineUnloaded,
    LoadTimedOut,
    NoRoom,
    OutOfMemory,
    Overloaded,
    QueueTimedOut,
    ServiceError,
    ShuttingDown,
    SnapshotCorrupt,
    StillBusy,
)
from inference_service.metrics import Metrics
from inference_service.pool.leases import Lease
from inference_service.pool.lifecycle import Limits
from inference_service.pool.loader import Parts
from inference_service.pool.pool import LINGER_SECONDS, Pool
from inference_service.scheduler.state import EngineState, Policy
from inference_service.storage.model import Model
from tests.pool.gated import MIB, GatedEngine, adapter, key, model


class Bench:
    """A pool, its engines by model, and a way to let everything that can happen happen."""

    def __init__(
        self,
        policy: Policy,
        clock: Callable[[], float] | None = None,
        load_timeout: float = 1800,
        stall_timeout: float = 1800,
        *,
        load_wait: float = 1000,
        place_wait: float = 1000,
        **parts: Any,
    ) -> None:
        self.engines: dict[str, list[GatedEngine]] = {}
        self.metrics = Metrics()
        self.now = 0.0
        self.held: list[str] = []
        self.pinned: set[str] = set()
        # Model -> whether the disk has room for it now.
        self.has_room: dict[str, Callable[[], bool]] = {}
        # Model -> its files come when this is set; and all that were asked for.
        self.gates: dict[str, asyncio.Event] = {}
        self.broken: dict[str, ServiceError] = {}
        self.broken_later: dict[str, ServiceError] = {}
        self.fetched: list[str] = []
        # What the device has free; None: not to be told.
        self.free: int | None = None
        self.pool = Pool(
            Parts(
                self._fetch,
                self._release,
                self._make,
                self._free_bytes,
                lambda model: Footprint(MIB, 0, 0),
                **parts,
            ),
            self.metrics,
            policy=policy,
            limits=Limits(
                WaitLimit(load_wait, "the bound of a load"),
                WaitLimit(place_wait, "the bound of a place"),
                load_timeout,
                stall_timeout,
            ),
            clock=clock or self._clock,
        )

    def _clock(self) -> float:
        """Every look at it is two seconds later: no two events are equally old."""
        self.now += 2
        return self.now

    async def _free_bytes(self) -> int | None:
        return self.free

    async def _fetch(self, model: Model, entered: Callable[[str], None]) -> Snapshot:
        if not self.has_room.get(model.name, lambda: True)():
            error = DiskFull("no room")
            error.missing = 100
            raise error
        self.fetched.append(model.name)
        if model.name in self.broken:
            raise self.broken[model.name]
        if model.name in self.gates:
            await self.gates[model.name].wait()
        if model.name in self.broken_later:
            raise self.broken_later[model.name]
        self.held.append(model.name)
        return Snapshot(model.name, model.revision, Path("/nowhere"), model.bytes)

    def _release(self, snapshot: Snapshot) -> None:
        self.held.remove(snapshot.model)

    def _make(self, snapshot: Snapshot, footprint: Footprint) -> GatedEngine:
        engine = GatedEngine(snapshot)
        self.engines.setdefault(snapshot.model, []).append(engine)
        return engine

    def engine(self, name: str) -> GatedEngine:
        return self.engines[name][-1]

    def ask(self, name: str) -> "asyncio.Task[Lease]":
        return asyncio.create_task(self.pool.lease(model(name, pinned=name in self.pinned)))

    def ask_adapter(self, name: str, base: str) -> "asyncio.Task[Lease]":
        return asyncio.create_task(self.pool.lease(adapter(name, base)))

    async def settle(self) -> None:
        for _ in range(20):
            await asyncio.sleep(0)

    async def started(self, name: str) -> Lease:
        """A lease on `name`, whose engine is let start."""
        asked = self.ask(name)
        await self.settle()
        self.engine(name).started.set_result(None)
        return await asked


class HandClock:
    """It stands still until a test moves it."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
async def one() -> AsyncIterator[Bench]:
    async for bench in _bench(1):
        yield bench


@pytest.fixture
async def two() -> AsyncIterator[Bench]:
    async for bench in _bench(2):
        yield bench


async def _bench(
    slots: int,
    policy: Policy | None = None,
    clock: Callable[[], float] | None = None,
    **limits: float,
) -> AsyncIterator[Bench]:
    policy = policy or Policy(slots, 3, queued=12, fairness_wait=1000, min_residency=0)
    bench = Bench(policy, clock, **limits)
    yield bench
    closing = asyncio.create_task(bench.pool.close())
    await bench.settle()
    for engines in bench.engines.values():
        for engine in engines:
            if not engine.may_close.done():
                engine.may_close.set_result(None)
    await closing
    assert repr(bench.pool) == "<Pool empty | waiting: none>"


async def test_one_load_however_many_ask(two: Bench) -> None:
    asked = [two.ask("a") for _ in range(3)]
    await two.settle()
    assert repr(two.pool) == "<Pool a:starting(0) | waiting: a a a>"
    two.engine("a").started.set_result(None)
    leases = await asyncio.gather(*asked)
    assert repr(two.pool) == "<Pool a:ready(3) | waiting: none>"
    assert len(two.engines["a"]) == 1
    for lease in leases:
        lease.release()
        lease.release()
    assert repr(two.pool) == "<Pool a:ready(0) | waiting: none>"


async def test_a_warm_lease_is_granted_without_waiting(two: Bench) -> None:
    (await two.started("a")).release()
    (await asyncio.wait_for(two.pool.lease(model("a")), 1)).release()


async def test_the_least_recently_used_gives_way_and_frees_its_slot_only_when_gone(
    two: Bench,
) -> None:
    (await two.started("a")).release()
    (await two.started("b")).release()
    (await two.pool.lease(model("a"))).release()
    asked = two.ask("c")
    await two.settle()
    assert repr(two.pool) == "<Pool a:ready(0) b:stopping(0) | waiting: c>"
    assert "c" not in two.engines
    two.engine("b").may_close.set_result(None)
    await two.settle()
    assert repr(two.pool) == "<Pool a:ready(0) c:starting(0) | waiting: c>"
    two.engine("c").started.set_result(None)
    (await asked).release()


async def test_a_leased_engine_is_not_torn_down(one: Bench) -> None:
    lease = await one.started("a")
    asked = one.ask("b")
    await one.settle()
    assert repr(one.pool) == "<Pool a:ready(1) | waiting: b>"
    lease.release()
    await one.settle()
    assert repr(one.pool) == "<Pool a:stopping(0) | waiting: b>"
    asked.cancel()


async def test_a_failed_load_fails_everyone_who_waited_and_frees_the_slot(one: Bench) -> None:
    asked = [one.ask("a"), one.ask("a")]
    await one.settle()
    one.engine("a").may_close.set_result(None)
    one.engine("a").started.set_exception(EngineStartFailed("no such architecture"))
    for result in await asyncio.gather(*asked, return_exceptions=True):
        assert isinstance(result, EngineStartFailed)
    await one.settle()
    assert repr(one.pool) == "<Pool empty | waiting: none>"
    (await one.started("a")).release()


async def test_an_unexpected_error_of_a_load_reaches_the_client_with_its_text(one: Bench) -> None:
    asked = one.ask("a")
    await one.settle()
    one.engine("a").may_close.set_result(None)
    one.engine("a").started.set_exception(KeyError("hidden_size"))
    with pytest.raises(EngineStartFailed, match="KeyError: 'hidden_size'"):
        await asked


async def test_a_dead_engine_is_replaced_on_the_next_request(one: Bench) -> None:
    lease = await one.started("a")
    one.engine("a").may_close.set_result(None)
    one.engine("a").dead.set_result("killed by SIGKILL")
    await one.settle()
    assert repr(one.pool) == "<Pool empty | waiting: none>"
    lease.release()
    (await one.started("a")).release()
    assert len(one.engines["a"]) == 2


async def test_unload_waits_for_the_leases(one: Bench) -> None:
    lease = await one.started("a")
    unloading = asyncio.create_task(one.pool.unload("a"))
    late = one.ask("a")
    await one.settle()
    assert repr(one.pool) == "<Pool a:draining(1) | waiting: a>"
    lease.release()
    one.engine("a").may_close.set_result(None)
    assert await unloading
    await one.settle()
    assert repr(one.pool) == "<Pool a:starting(0) | waiting: a>", "the late one gets a fresh engine"
    late.cancel()


async def test_unload_of_a_model_without_an_engine(one: Bench) -> None:
    assert not await one.pool.unload("a")


async def test_unload_during_a_load_that_fails_for_it(one: Bench) -> None:
    """The host is killed for the unload, its start fails for that: once torn down is enough."""
    asked = one.ask("a")
    await one.settle()
    one.engine("a").may_close.set_result(None)
    unloading = asyncio.create_task(one.pool.unload("a"))
    await asyncio.sleep(0)
    one.engine("a").started.set_exception(EngineStartFailed("killed"))
    assert await unloading
    with pytest.raises(EngineError, match="unloaded by the operator"):
        await asked
    (await one.started("a")).release()
    assert "a:ready(0)" in repr(one.pool)


async def test_unload_in_the_moment_a_load_ends(one: Bench) -> None:
    asked = one.ask("a")
    await one.settle()
    one.engine("a").started.set_result(None)
    one.engine("a").may_close.set_result(None)
    assert await one.pool.unload("a")
    with suppress(Exception):
        (await asked).release()
    await one.settle()
    assert repr(one.pool) == "<Pool empty | waiting: none>"


async def test_concurrency_holds_and_the_rest_waits_in_order(two: Bench) -> None:
    leases = [await two.started("a")]
    leases += [await two.pool.lease(model("a")) for _ in range(2)]
    fourth, fifth = two.ask("a"), two.ask("a")
    await two.settle()
    assert repr(two.pool) == "<Pool a:ready(3) | waiting: a a>"
    leases.pop().release()
    await two.settle()
    assert (fourth.done(), fifth.done()) == (True, False)
    leases.pop().release()
    for lease in (*leases, await fourth, await fifth):
        lease.release()
    assert repr(two.pool) == "<Pool a:ready(0) | waiting: none>"


async def test_too_many_waiting_are_refused_at_once(two: Bench) -> None:
    asked = [two.ask("a") for _ in range(15)]
    await two.settle()
    with pytest.raises(Overloaded) as caught:
        await two.pool.lease(model("a"))
    assert caught.value.retry_after
    for task in asked:
        task.cancel()
    await asyncio.gather(*asked, return_exceptions=True)
    assert repr(two.pool) == "<Pool a:starting(0) | waiting: none>"


async def test_a_warm_model_is_not_refused_for_those_who_wait_for_a_cold_one(two: Bench) -> None:
    (await two.started("warm")).release()
    asked = [two.ask("cold") for _ in range(15)]
    await two.settle()
    (await two.pool.lease(model("warm"))).release()
    for task in asked:
        task.cancel()
    await asyncio.gather(*asked, return_exceptions=True)


@pytest.mark.parametrize("steps", range(12))
async def test_cancellation_at_every_step_leaves_no_lease(two: Bench, steps: int) -> None:
    asked = two.ask("a")
    for step in range(steps):
        if step == 5 and two.engines:
            two.engine("a").started.set_result(None)
        await asyncio.sleep(0)
    asked.cancel()
    with suppress(asyncio.CancelledError):
        (await asked).release()
    await two.settle()
    assert "waiting: none" in repr(two.pool)
    assert "(1)" not in repr(two.pool)


async def test_a_lease_granted_in_the_moment_of_cancellation_is_given_back(two: Bench) -> None:
    (await two.started("a")).release()
    held = [await two.pool.lease(model("a")) for _ in range(3)]
    asked = two.ask("a")
    await two.settle()
    held.pop().release()  # grants the waiter ...
    asked.cancel()  # ... which has not run since
    with pytest.raises(asyncio.CancelledError):
        await asked
    for lease in held:
        lease.release()
    assert repr(two.pool) == "<Pool a:ready(0) | waiting: none>"


async def test_stop_admission_fails_waiters_and_keeps_leases(two: Bench) -> None:
    lease = await two.started("a")
    waiting = two.ask("b")
    await two.settle()
    two.pool.stop_admission()
    with pytest.raises(ShuttingDown):
        await waiting
    with pytest.raises(ShuttingDown):
        await two.pool.lease(model("a"))
    assert "a:ready(1)" in repr(two.pool)
    lease.release()


async def test_metrics_count_loads_and_evictions(one: Bench) -> None:
    (await one.started("a")).release()
    asked = one.ask("b")
    await one.settle()
    one.engine("a").may_close.set_result(None)
    await one.settle()
    one.engine("b").started.set_result(None)
    (await asked).release()
    rendered = one.metrics.render().decode()
    assert 'inference_evictions_total{model="a"} 1.0' in rendered
    assert 'inference_loads_total{model="b",status="ok"} 1.0' in rendered


async def test_idle_engines_give_up_their_snapshots_where_the_disk_is_full(two: Bench) -> None:
    (await two.started("a")).release()
    two.has_room = {"c": lambda: "a" not in two.held}
    asked = two.ask("c")
    await two.settle()
    two.engine("a").may_close.set_result(None)
    await two.settle()
    two.engine("c").started.set_result(None)
    lease = await asked
    assert two.held == ["c"]
    lease.release()


async def test_a_full_disk_that_no_idle_engine_can_mend_is_told(two: Bench) -> None:
    busy = await two.started("a")
    two.has_room = {"c": lambda: False}
    with pytest.raises(DiskFull):
        await two.ask("c")
    assert two.held == ["a"]
    busy.release()


async def test_all_slots_pinned_is_told_at_once(one: Bench) -> None:
    one.pinned = {"a"}
    (await one.started("a")).release()
    with pytest.raises(NoRoom, match=r"every engine is pinned .*\. Pinned: a \(1.0 MiB\)"):
        await one.ask("b")


async def test_steady_requests_for_one_model_do_not_starve_another() -> None:
    """One slot, and always another request for `a`: `b` comes in the end, and then `a` again."""
    async for bench in _bench(1, Policy(1, 2, fairness_wait=20, min_residency=0)):
        held = [await bench.started("a"), await bench.ask("a")]
        waiting = bench.ask("b")
        await bench.settle()
        for _ in range(20):
            following = bench.ask("a")
            held.pop(0).release()
            await bench.settle()
            if not following.done():
                break
            held.append(following.result())
        assert not following.done(), "a does not admit any more"
        held.pop().release()
        await bench.settle()
        bench.engine("a").may_close.set_result(None)
        await bench.settle()
        bench.engine("b").started.set_result(None)
        lease = await waiting
        assert lease.model.name == "b"
        lease.release()
        following.cancel()
        await bench.settle()


async def test_a_load_that_nobody_waits_for_any_more_is_cancelled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("inference_service.pool.pool.LINGER_SECONDS", 0)
    async for bench in _bench(1):
        asked = bench.ask("a")
        await bench.settle()
        asked.cancel()
        await bench.settle()
        bench.engine("a").may_close.set_result(None)
        await bench.settle()
        assert bench.engine("a").closed
        assert bench.held == []
        assert repr(bench.pool) == "<Pool empty | waiting: none>"


async def test_a_load_goes_on_for_a_client_that_comes_back_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("inference_service.pool.pool.LINGER_SECONDS", 1000)
    async for bench in _bench(1):
        asked = bench.ask("a")
        await bench.settle()
        asked.cancel()
        await bench.settle()
        again = bench.ask("a")
        bench.engine("a").started.set_result(None)
        (await again).release()
        assert len(bench.engines["a"]) == 1


async def test_an_idle_engine_is_torn_down_after_a_while() -> None:
    async for bench in _bench(1, Policy(1, 3, idle_ttl=0.05), time.monotonic):
        (await bench.started("a")).release()
        bench.engine("a").may_close.set_result(None)
        async with asyncio.timeout(10):
            while bench.held:  # noqa: ASYNC110  (it is the pool's own timer that is waited for)
                await asyncio.sleep(0.01)
        assert bench.engine("a").closed


async def test_who_waits_too_long_is_told_when_to_come_again_and_the_load_goes_on() -> None:
    async for bench in _bench(1, load_wait=0.5, place_wait=0):
        told = r"is still being loaded; .* for 0\.5 s \(the bound of a load\)"
        with pytest.raises(QueueTimedOut, match=told) as caught:
            await bench.ask("a")
        assert caught.value.retry_after is not None
        assert 1 <= caught.value.retry_after <= 120
        again = bench.ask("a")
        bench.engine("a").started.set_result(None)
        (await again).release()
        assert len(bench.engines["a"]) == 1


async def test_a_pinned_model_that_takes_the_last_slot_leaves_nobody_waiting(one: Bench) -> None:
    one.pinned = {"p"}
    pinned, other = one.ask("p"), one.ask("b")
    await one.settle()
    with pytest.raises(NoRoom, match="Pinned: p"):
        await other
    one.engine("p").started.set_result(None)
    (await pinned).release()


async def test_another_revision_gets_an_engine_of_its_own(two: Bench) -> None:
    (await two.started("a")).release()
    asked = asyncio.create_task(two.pool.lease(model("a", revision="r2"), exact=True))
    await two.settle()
    two.engine("a").started.set_result(None)
    lease = await asked
    assert (lease.model.revision, repr(two.pool)) == ("r2", "<Pool a:ready(0) a:ready(1) | waiting: none>")
    lease.release()


async def test_a_pinned_engine_that_is_being_unloaded_is_waited_for(one: Bench) -> None:
    one.pinned = {"p"}
    (await one.started("p")).release()
    unloading = asyncio.create_task(one.pool.unload("p"))
    await one.settle()
    waiting = one.ask("b")
    await one.settle()
    one.engine("p").may_close.set_result(None)
    await unloading
    await one.settle()
    one.engine("b").started.set_result(None)
    (await waiting).release()


async def test_a_forced_unload_ends_the_leases_with_an_error(one: Bench) -> None:
    lease = await one.started("a")
    unloading = asyncio.create_task(one.pool.unload("a", force=True))
    await one.settle()
    assert isinstance(one.engine("a").cut_with, EngineUnloaded)
    assert repr(one.pool) == "<Pool a:stopping(0) | waiting: none>"
    one.engine("a").may_close.set_result(None)
    assert await unloading
    lease.release()
    (await one.started("a")).release()
    assert (await one.pool.stats())["leases"] == 0


async def test_an_unload_that_drains_can_be_forced(one: Bench) -> None:
    lease = await one.started("a")
    patient = asyncio.create_task(one.pool.unload("a"))
    await one.settle()
    forced = asyncio.create_task(one.pool.unload("a", force=True))
    await one.settle()
    one.engine("a").may_close.set_result(None)
    assert await patient
    assert await forced
    lease.release()


async def test_an_operators_pin_wins_over_serving_json(two: Bench) -> None:
    two.pinned = {"a"}
    (await two.started("a")).release()
    (await two.started("b")).release()
    two.pool.pin(model("a", pinned=True), pinned=False)
    two.pool.pin(model("b"), pinned=True)
    asked = two.ask("c")
    await two.settle()
    assert repr(two.pool) == "<Pool a:stopping(0) b:ready(0) | waiting: c>"
    two.engine("a").may_close.set_result(None)
    await two.settle()
    two.engine("c").started.set_result(None)
    (await asked).release()


async def test_a_dead_engine_fails_its_leases_at_once(one: Bench) -> None:
    lease = await one.started("a")
    one.engine("a").dead.set_result("killed by SIGKILL")
    await one.settle()
    error = one.engine("a").cut_with
    assert isinstance(error, EngineDied)
    assert "killed by SIGKILL" in error.message
    assert one.engine("a").graces == [0.0], "nothing is asked of a dead engine"
    assert (await one.pool.stats())["leases"] == 0
    one.engine("a").may_close.set_result(None)
    await one.settle()
    lease.release()
    with pytest.raises(EngineDied):
        _ = lease.engine


@pytest.mark.parametrize("heartbeat", [None, Heartbeat(1, 7)], ids=["no answer", "no step"])
async def test_an_engine_that_hangs_is_replaced(heartbeat: Heartbeat | None) -> None:
    async for bench in _bench(1, clock=time.monotonic, stall_timeout=0.08):
        lease = await bench.started("a")
        bench.engine("a").heartbeats = heartbeat
        bench.engine("a").may_close.set_result(None)
        async with asyncio.timeout(10):
            while not bench.engine("a").closed:  # noqa: ASYNC110  (the pool's own watch is waited for)
                await asyncio.sleep(0.01)
        assert "no progress" in str(bench.engine("a").cut_with)
        lease.release()
        (await bench.started("a")).release()
        assert len(bench.engines["a"]) == 2


async def test_an_engine_that_makes_steps_or_has_no_work_does_not_hang() -> None:
    """The clock moves only with a step, or where there is no work: no stall is this machine's."""
    clock = HandClock()
    async for bench in _bench(1, clock=clock, stall_timeout=0.08):
        lease = await bench.started("a")
        for step in range(30):
            bench.engine("a").heartbeats = Heartbeat(1, step)
            clock.now += 0.05
            await asyncio.sleep(0.03)  # looked at more than once between two steps
        bench.engine("a").heartbeats = Heartbeat(0, 30)
        for _ in range(20):
            clock.now += 0.05
            await asyncio.sleep(0.01)
        lease.release()
        bench.engine("a").heartbeats = None
        for _ in range(20):
            clock.now += 0.05
            await asyncio.sleep(0.01)
        assert repr(bench.pool) == "<Pool a:ready(0) | waiting: none>"


async def test_one_engine_of_a_device_starts_or_ends_at_a_time(two: Bench) -> None:
    first, second = two.ask("a"), two.ask("b")
    await two.settle()
    assert list(two.engines) == ["a"], "b has its slot and waits for its turn"
    unloading = asyncio.create_task(two.pool.unload("b"))
    two.engine("a").started.set_result(None)
    (await first).release()
    with pytest.raises(EngineUnloaded):
        await second
    assert await unloading
    assert list(two.engines) == ["a"]


async def test_none_starts_before_its_memory_is_free(one: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("inference_service.pool.loader._MEMORY_POLL_INTERVAL", 0.001)
    one.free = MIB - 1
    asked = one.ask("a")
    await asyncio.sleep(0.05)
    assert one.engines == {}
    one.free = MIB
    async with asyncio.timeout(5):
        while not one.engines:  # noqa: ASYNC110  (the pool's own look is waited for)
            await asyncio.sleep(0.001)
    one.engine("a").started.set_result(None)
    (await asked).release()


async def test_memory_that_never_comes_is_told_with_the_numbers(
    one: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("inference_service.pool.loader.MEMORY_SECONDS", 0)
    one.free = 0
    with pytest.raises(OutOfMemory, match=r"needs 1.0 MiB .* the device lacks 1.0 MiB"):
        await one.ask("a")
    await one.settle()
    assert repr(one.pool) == "<Pool empty | waiting: none>"
    assert one.held == []


async def test_idle_engines_give_their_memory_where_it_is_short(
    two: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("inference_service.pool.loader.MEMORY_SECONDS", 0)
    (await two.started("a")).release()
    two.free = 0
    asked = two.ask("b")
    async with asyncio.timeout(5):
        while "a:stopping" not in repr(two.pool):  # noqa: ASYNC110  (as above)
            await asyncio.sleep(0.001)
    two.free = MIB
    two.engine("a").may_close.set_result(None)
    async with asyncio.timeout(5):
        while "b" not in two.engines:  # noqa: ASYNC110  (the pool's own look is waited for)
            await asyncio.sleep(0.001)
    two.engine("b").started.set_result(None)
    (await asked).release()


async def test_a_load_that_takes_too_long_fails_with_its_phase() -> None:
    async for bench in _bench(1, load_timeout=0.05):
        asked = bench.ask("a")
        await bench.settle()
        bench.engine("a").may_close.set_result(None)
        with pytest.raises(EngineStartFailed, match=r"LOAD_TIMEOUT.*phase 'start'"):
            await asked


async def test_a_model_that_failed_is_refused_also_while_what_it_left_is_torn_down() -> None:
    async for bench in _bench(1, clock=time.monotonic):
        asked = bench.ask("a")
        await bench.settle()
        bench.engine("a").started.set_exception(EngineStartFailed("no such architecture"))
        with pytest.raises(EngineStartFailed):
            await asked
        assert repr(bench.pool) == "<Pool a:failed(0) | waiting: none>"
        with pytest.raises(EngineStartFailed, match="failed once"):
            await bench.ask("a")


async def test_close_gives_engines_that_are_ending_already_less_time(two: Bench) -> None:
    (await two.started("a")).release()
    unloading = asyncio.create_task(two.pool.unload("a"))
    await two.settle()
    closing = asyncio.create_task(two.pool.close())
    await two.settle()
    assert two.engine("a").graces == [5.0, 0.6]
    two.engine("a").may_close.set_result(None)
    await closing
    assert await unloading
    assert two.held == [], "its snapshot is released once"


async def test_what_a_waiter_is_told_meanwhile(one: Bench) -> None:
    lease = await one.started("b")
    assert one.pool.progress(model("a")).phase == "queue"
    lease.release()
    asked = one.ask("a")
    await one.settle()
    assert one.pool.progress(model("b")).phase == "drain"
    one.engine("b").may_close.set_result(None)
    await one.settle()
    progress = one.pool.progress(model("a"))
    assert progress.phase == "start"
    assert progress.percent is not None
    stats = await one.pool.stats()
    assert stats["waiters"][0]["phase"] == "start"
    assert stats["engines"][0]["loading"]["phase"] == "start"
    one.engine("a").started.set_result(None)
    (await asked).release()


async def test_a_load_that_the_operator_asked_for_outlives_the_queue_timeout() -> None:
    async for bench in _bench(1, clock=time.monotonic, load_wait=0.02):
        loading = bench.pool.operator_load(model("a"))
        await asyncio.sleep(0.1)
        assert not loading.done()
        bench.engine("a").started.set_result(None)
        await loading
        assert repr(bench.pool) == "<Pool a:ready(0) | waiting: none>"


async def test_who_waited_too_long_for_a_ready_engine_is_told_so() -> None:
    async for bench in _bench(1, Policy(1, 1, min_residency=0), time.monotonic, place_wait=0.5):
        asked = bench.ask("a")
        await bench.settle()
        bench.engine("a").started.set_result(None)
        lease = await asked
        with pytest.raises(StillBusy, match=r"1 of 1 requests run .* for 0\.5 s \(the bound of a place\)"):
            await bench.ask("a")
        lease.release()


async def test_the_wait_for_a_place_begins_when_the_model_is_loaded() -> None:
    """A load outlasts the bound of a place; once it is there, who gets no place waits only so long."""
    async for bench in _bench(1, Policy(1, 1, min_residency=0), time.monotonic, place_wait=1):
        first, second = bench.ask("a"), bench.ask("a")
        done, _ = await asyncio.wait({first, second}, timeout=1.6)
        assert not done, "a wait for a load is not bounded by that for a place"
        bench.engine("a").started.set_result(None)
        lease = await first
        assert not second.done()
        with pytest.raises(StillBusy):
            await second
        lease.release()


async def test_a_place_is_not_waited_for_longer_than_the_request_may_take() -> None:
    async for bench in _bench(1, Policy(1, 1, min_residency=0), time.monotonic, load_wait=0.5):
        lease = await bench.started("a")
        with pytest.raises(StillBusy):
            await bench.ask("a")
        lease.release()


async def test_a_wait_that_ends_as_its_engine_is_ready_costs_nobody_a_lease(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One client leaves and the others' time is up in the very turn in which the load ends."""
    async for bench in _bench(
        1, Policy(1, 1, min_residency=0), time.monotonic, load_wait=0.3, place_wait=0.3
    ):
        leaves, *others = [bench.ask("a") for _ in range(3)]
        await bench.settle()
        loaded = bench.pool._lifecycle._loaded

        def loaded_late(*slot: Any, loaded: Any = loaded, leaves: Any = leaves) -> None:
            leaves.cancel()
            time.sleep(0.35)
            loaded(*slot)

        monkeypatch.setattr(bench.pool._lifecycle, "_loaded", loaded_late)
        bench.engine("a").started.set_result(None)
        for found in await asyncio.gather(*others, return_exceptions=True):
            assert isinstance(found, Lease | QueueTimedOut), repr(found)
            if isinstance(found, Lease):
                found.release()
        await bench.settle()
        assert repr(bench.pool) == "<Pool a:ready(0) | waiting: none>"
        (await asyncio.wait_for(bench.pool.lease(model("a")), 10)).release()


async def test_the_limit_that_ended_a_wait_is_the_one_that_is_named() -> None:
    async for bench in _bench(1, Policy(1, 1, min_residency=0), time.monotonic, load_wait=0.4, place_wait=60):
        lease = await bench.started("a")
        with pytest.raises(StillBusy, match=r"for 0\.4 s \(the bound of a load\)"):
            await bench.ask("a")
        lease.release()


async def test_what_a_request_has_waited_before_counts() -> None:
    async for bench in _bench(1, clock=time.monotonic, load_wait=60):
        with pytest.raises(QueueTimedOut):
            await asyncio.wait_for(bench.pool.lease(model("a"), 61), 30)
        await bench.settle()
        bench.engine("a").started.set_result(None)
        await bench.settle()
        (await bench.pool.lease(model("a"), 61)).release()


async def test_an_engine_that_drains_away_makes_its_waiters_wait_for_a_load_again() -> None:
    policy = Policy(1, 1, fairness_wait=0, min_residency=0)
    async for bench in _bench(1, policy, time.monotonic, place_wait=2):
        lease = await bench.started("a")
        bench.engine("a").may_close.set_result(None)
        waits = bench.ask("a")
        other = bench.ask("b")
        await bench.settle()
        await asyncio.wait({waits}, timeout=0.1)
        bench.pool.look()
        await bench.settle()
        assert bench.pool.state(key("a")) is EngineState.DRAINING, repr(bench.pool)
        done, _ = await asyncio.wait({waits}, timeout=2.5)
        assert not done
        lease.release()
        waits.cancel()
        other.cancel()


async def test_stats_at_every_turn_of_a_teardown(one: Bench) -> None:
    for turns in range(12):
        (await one.started("a")).release()
        one.engine("a").may_close.set_result(None)
        unloading = asyncio.create_task(one.pool.unload("a"))
        for _ in range(turns):
            await asyncio.sleep(0)
        assert (await one.pool.stats())["slots"]["total"] == 1
        assert await unloading


async def test_the_wait_for_another_engines_start_is_no_part_of_the_load_timeout() -> None:
    async for bench in _bench(2, clock=time.monotonic, load_timeout=2):
        hung, good = bench.ask("hung"), bench.ask("good")
        await bench.settle()
        bench.engine("hung").may_close.set_result(None)
        with pytest.raises(EngineStartFailed, match="'hung' did not load") as caught:
            await hung
        assert caught.value.retry_after == 5
        await asyncio.sleep(0.1)
        bench.engine("good").started.set_result(None)
        (await good).release()


async def test_room_that_comes_free_anyway_is_waited_for(two: Bench) -> None:
    (await two.started("a")).release()
    unloading = asyncio.create_task(two.pool.unload("a"))
    await two.settle()
    two.has_room = {"c": lambda: "a" not in two.held}
    asked = two.ask("c")
    await two.settle()
    two.engine("a").may_close.set_result(None)
    await unloading
    await two.settle()
    two.engine("c").started.set_result(None)
    (await asked).release()


async def test_a_young_idle_engine_gives_its_disk_too() -> None:
    async for bench in _bench(2, Policy(2, 3, min_residency=1e6)):
        held = bench.held
        (await bench.started("a")).release()
        bench.has_room = {"c": lambda held=held: "a" not in held}  # type: ignore[misc]
        asked = bench.ask("c")
        await bench.settle()
        bench.engine("a").may_close.set_result(None)
        await bench.settle()
        bench.engine("c").started.set_result(None)
        (await asked).release()


async def test_an_order_needs_no_lease_and_waits_beside_the_queue() -> None:
    async for bench in _bench(2, Policy(2, 1, queued=1, min_residency=0)):
        busy = await bench.started("a")
        queued = bench.ask("a")
        await bench.settle()
        await bench.pool.operator_load(model("a"))
        first, second = bench.pool.operator_load(model("b")), bench.pool.operator_load(model("b"))
        assert first is second, "one order a model"
        await bench.settle()
        bench.engine("b").started.set_result(None)
        await first
        assert repr(bench.pool) == "<Pool a:ready(1) b:ready(0) | waiting: a>"
        busy.release()
        (await queued).release()


async def test_a_failed_order_is_told(one: Bench) -> None:
    load = one.pool.operator_load(model("a"))
    await one.settle()
    one.engine("a").may_close.set_result(None)
    one.engine("a").started.set_exception(EngineStartFailed("broken"))
    with pytest.raises(EngineStartFailed, match="broken"):
        await load


async def test_a_warm_engine_serves_while_another_is_being_started(two: Bench) -> None:
    (await two.started("a")).release()
    slow = two.ask("slow")
    await two.settle()
    wanted = two.ask("c")
    await two.settle()
    assert repr(two.pool) == "<Pool a:ready(0) slow:starting(0) | waiting: slow c>", "a is not torn down yet"
    (await two.ask("a")).release()
    two.engine("slow").started.set_result(None)
    (await slow).release()
    await two.settle()
    assert "a:stopping" in repr(two.pool)
    two.engine("a").may_close.set_result(None)
    await two.settle()
    two.engine("c").started.set_result(None)
    (await wanted).release()


async def test_the_operator_does_not_wait_for_anothers_start(two: Bench) -> None:
    (await two.started("a")).release()
    slow = two.ask("slow")
    await two.settle()
    two.engine("a").may_close.set_result(None)
    assert await asyncio.wait_for(two.pool.unload("a"), 1)
    two.engine("slow").started.set_result(None)
    (await slow).release()


async def test_a_deadline_that_passes_while_the_pool_is_at_work_is_not_missed() -> None:
    async for bench in _bench(1, Policy(1, 3, idle_ttl=1e-9), time.monotonic):
        asked = bench.ask("a")
        await bench.settle()
        bench.engine("a").may_close.set_result(None)
        bench.engine("a").started.set_result(None)
        (await asked).release()
        async with asyncio.timeout(5):
            while bench.held:  # noqa: ASYNC110  (it is the pool's own timer that is waited for)
                await asyncio.sleep(0.001)


async def test_no_lease_is_held_for_the_time_of_an_adapters_download(two: Bench) -> None:
    (await two.started("base")).release()
    gate = two.gates["t"] = asyncio.Event()
    asked = [two.ask_adapter("t", "base") for _ in range(2)]
    await two.settle()
    stats = await two.pool.stats()
    assert (stats["leases"], [each["model"] for each in stats["waiters"]]) == (0, ["t", "t"])
    gate.set()
    leases = [await each for each in asked]
    assert {lease.served_name for lease in leases} == {two.engine("base").adapters[0]}
    assert two.fetched == ["base", "t"], "once for both"
    for lease in leases:
        lease.release()
    assert two.held == ["base", "t"]


async def test_a_request_for_an_adapter_that_is_refused_fetches_nothing() -> None:
    async for bench in _bench(1, Policy(1, 3, queued=0)):
        refused = bench.ask_adapter("t", "base")
        with pytest.raises(Overloaded):
            await refused
        assert bench.fetched == []


async def test_the_end_of_the_service_ends_an_adapters_download(two: Bench) -> None:
    (await two.started("base")).release()
    two.gates["t"] = asyncio.Event()
    asked = two.ask_adapter("t", "base")
    await two.settle()
    closing = asyncio.create_task(two.pool.close())
    with pytest.raises(ShuttingDown):
        await asked
    await two.settle()
    two.engine("base").may_close.set_result(None)
    await closing
    two.gates["t"].set()
    await two.settle()
    assert two.held == []


async def test_an_adapters_files_are_let_go_with_the_last_who_waited(two: Bench) -> None:
    asked = [two.ask_adapter("t", "base") for _ in range(2)]
    await two.settle()
    assert sorted(two.held) == ["base", "t"], "both come while the engine starts"
    asked[0].cancel()
    await asyncio.sleep(0.01)
    assert sorted(two.held) == ["base", "t"]
    asked[1].cancel()
    two.engine("base").started.set_result(None)
    await asyncio.sleep(LINGER_SECONDS + 0.1)
    assert two.held == ["base"]


async def test_an_adapter_whose_files_cannot_be_had_is_not_asked_for_again_at_once(two: Bench) -> None:
    (await two.started("base")).release()
    two.broken["t"] = SnapshotCorrupt("it is not what the bucket holds")
    for _ in range(2):
        with pytest.raises(SnapshotCorrupt):
            await two.ask_adapter("t", "base")
    assert two.fetched == ["base", "t"], "the second is told from memory"
    (await two.ask("base")).release()


async def _drained_while_wanted(bench: Bench, waiting: int) -> "list[asyncio.Task[Lease]]":
    """Requests for an adapter that its engine had when they came, and the next engine has not."""
    asked = bench.ask_adapter("t", "base")
    await bench.settle()
    bench.engine("base").started.set_result(None)
    (await asked).release()
    busy = await bench.ask("base")
    unloading = asyncio.create_task(bench.pool.unload("base"))
    await bench.settle()
    found = [bench.ask_adapter("t", "base") for _ in range(waiting)]
    await bench.settle()
    busy.release()
    await bench.settle()
    bench.engine("base").may_close.set_result(None)
    await bench.settle()
    await unloading
    bench.engine("base").started.set_result(None)
    return found


async def test_an_adapter_that_is_fetched_again_is_held_once_while_it_is_used(one: Bench) -> None:
    for lease in [await each for each in await _drained_while_wanted(one, 2)]:
        assert sorted(one.held) == ["base", "t"]
        lease.release()
    assert sorted(one.held) == ["base", "t"]
    one.engine("base").may_close.set_result(None)
    await one.pool.unload("base")
    assert one.held == []


async def test_who_leaves_takes_no_adapters_files_from_the_others(one: Bench) -> None:
    one.gates["t"] = asyncio.Event()
    one.gates["t"].set()
    first, second = await _drained_while_wanted(one, 2)
    one.gates["t"].clear()
    await one.settle()
    first.cancel()
    await one.settle()
    one.gates["t"].set()
    (await second).release()


async def test_files_that_come_to_nothing_are_known_also_when_nobody_waits_any_more() -> None:
    async for bench in _bench(1, load_wait=0.5):
        (await bench.started("base")).release()
        bench.gates["t"] = asyncio.Event()
        bench.broken_later["t"] = SnapshotCorrupt("it is not what the bucket holds")
        with pytest.raises(QueueTimedOut):
            await bench.ask_adapter("t", "base")
        bench.gates["t"].set()
        await bench.settle()
        with pytest.raises(SnapshotCorrupt):
            await bench.ask_adapter("t", "base")


async def test_a_load_that_goes_on_for_one_is_not_ended_by_another_who_leaves() -> None:
    async for bench in _bench(1, load_wait=0.5):
        (await bench.started("base")).release()
        bench.gates["t"] = asyncio.Event()
        with pytest.raises(QueueTimedOut):
            await bench.ask_adapter("t", "base")
        hasty = bench.ask_adapter("t", "base")
        await bench.settle()
        hasty.cancel()
        await asyncio.sleep(LINGER_SECONDS + 0.1)
        bench.gates["t"].set()
        await bench.settle()
        (await bench.ask_adapter("t", "base")).release()
        assert bench.fetched == ["base", "t"]


async def test_an_adapters_files_have_the_time_of_a_load() -> None:
    async for bench in _bench(1, load_timeout=0.3):
        (await bench.started("base")).release()
        bench.gates["t"] = asyncio.Event()
        with pytest.raises(LoadTimedOut):
            await bench.pool.operator_load(adapter("t", "base"))


async def test_who_waits_for_an_adapter_that_is_unloaded_is_told(two: Bench) -> None:
    (await two.started("base")).release()
    two.gates["t"] = asyncio.Event()
    asked = two.ask_adapter("t", "base")
    await two.settle()
    await two.pool.unload("t")
    with pytest.raises(EngineUnloaded):
        await asked
