"""The pool with gated engines: no sleeps, assertions on what it says of itself."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pytest

from inference_service.engines.base import Reply, Snapshot
from inference_service.errors import (
    DiskFull,
    EngineError,
    EngineStartFailed,
    ModelNotServable,
    NoSlot,
    Overloaded,
    QueueTimedOut,
    ShuttingDown,
)
from inference_service.metrics import Metrics
from inference_service.models.serving import Serving
from inference_service.pool.pool import Lease, Limits, Pool
from inference_service.pool.scheduler import Policy
from inference_service.storage.model import Model, ModelKind
from inference_service.storage.store import StoredObject


def model(name: str, *, pinned: bool = False) -> Model:
    weights = StoredObject(f"{name}/model.safetensors", 100, "1", 7, datetime.now(UTC))
    serving = Serving(pinned=pinned)
    return Model(name, ModelKind.CHECKPOINT, name, "r1", (weights,), datetime.now(UTC), serving=serving)


class GatedEngine:
    """An engine whose start, death and end happen when the test says so."""

    def __init__(self, snapshot: Snapshot) -> None:
        self.snapshot = snapshot
        self.healthy = True
        self.process_id = None
        loop = asyncio.get_running_loop()
        self.started: asyncio.Future[None] = loop.create_future()
        self.dead: asyncio.Future[str] = loop.create_future()
        self.may_close: asyncio.Future[None] = loop.create_future()
        self.closed = False

    async def start(self) -> None:
        await asyncio.shield(self.started)

    async def forward(self, path: str, body: bytes, request_id: str) -> Reply:
        raise NotImplementedError

    async def running(self) -> int:
        return 0

    async def wait_dead(self) -> str:
        return await asyncio.shield(self.dead)

    async def close(self) -> None:
        await asyncio.shield(self.may_close)
        self.closed = True


class Bench:
    """A pool, its engines by model, and a way to let everything that can happen happen."""

    def __init__(
        self, policy: Policy, clock: Callable[[], float] | None = None, queue_timeout: float = 1000
    ) -> None:
        self.engines: dict[str, list[GatedEngine]] = {}
        self.metrics = Metrics()
        self.now = 0.0
        self.held: list[str] = []
        self.pinned: set[str] = set()
        # Model -> whether the disk has room for it now.
        self.has_room: dict[str, Callable[[], bool]] = {}
        self.pool = Pool(
            self._fetch,
            self._release,
            self._make,
            self.metrics,
            policy=policy,
            limits=Limits(queued=12, queue_timeout=queue_timeout, load_timeout=1800),
            clock=clock or self._clock,
        )

    def _clock(self) -> float:
        """Every look at it is two seconds later: no two events are equally old."""
        self.now += 2
        return self.now

    async def _fetch(self, model: Model) -> Snapshot:
        if not self.has_room.get(model.name, lambda: True)():
            error = DiskFull("no room")
            error.missing = 100
            raise error
        self.held.append(model.name)
        return Snapshot(model.name, model.revision, Path("/nowhere"), model.bytes)

    def _release(self, snapshot: Snapshot) -> None:
        self.held.remove(snapshot.model)

    def _make(self, snapshot: Snapshot) -> GatedEngine:
        engine = GatedEngine(snapshot)
        self.engines.setdefault(snapshot.model, []).append(engine)
        return engine

    def engine(self, name: str) -> GatedEngine:
        return self.engines[name][-1]

    def ask(self, name: str) -> "asyncio.Task[Lease]":
        return asyncio.create_task(self.pool.lease(model(name, pinned=name in self.pinned)))

    async def settle(self) -> None:
        for _ in range(20):
            await asyncio.sleep(0)

    async def started(self, name: str) -> Lease:
        """A lease on `name`, whose engine is let start."""
        asked = self.ask(name)
        await self.settle()
        self.engine(name).started.set_result(None)
        return await asked


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
    queue_timeout: float = 1000,
) -> AsyncIterator[Bench]:
    policy = policy or Policy(slots, 3, fairness_wait=1000, min_residency=0)
    bench = Bench(policy, clock, queue_timeout)
    yield bench
    closing = asyncio.create_task(bench.pool.close())
    await bench.settle()
    for engines in bench.engines.values():
        for engine in engines:
            if not engine.may_close.done():
                engine.may_close.set_result(None)
    await closing
    assert repr(bench.pool) == "<Pool empty | waiting: nobody>"


async def test_one_load_however_many_ask(two: Bench) -> None:
    asked = [two.ask("a") for _ in range(3)]
    await two.settle()
    assert repr(two.pool) == "<Pool a:starting(0) | waiting: a a a>"
    two.engine("a").started.set_result(None)
    leases = await asyncio.gather(*asked)
    assert repr(two.pool) == "<Pool a:ready(3) | waiting: nobody>"
    assert len(two.engines["a"]) == 1
    for lease in leases:
        lease.release()
        lease.release()
    assert repr(two.pool) == "<Pool a:ready(0) | waiting: nobody>"


async def test_a_warm_lease_is_granted_without_waiting(two: Bench) -> None:
    (await two.started("a")).release()
    (await asyncio.wait_for(two.pool.lease(model("a")), 0.01)).release()


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
    assert repr(one.pool) == "<Pool empty | waiting: nobody>"
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
    assert repr(one.pool) == "<Pool empty | waiting: nobody>"
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
    assert repr(one.pool) == "<Pool empty | waiting: nobody>"


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
    assert repr(two.pool) == "<Pool a:ready(0) | waiting: nobody>"


async def test_too_many_waiting_are_refused_at_once(two: Bench) -> None:
    asked = [two.ask("a") for _ in range(15)]
    await two.settle()
    with pytest.raises(Overloaded) as caught:
        await two.pool.lease(model("a"))
    assert caught.value.retry_after
    for task in asked:
        task.cancel()
    await asyncio.gather(*asked, return_exceptions=True)
    assert repr(two.pool) == "<Pool a:starting(0) | waiting: nobody>"


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
    assert "waiting: nobody" in repr(two.pool)
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
    assert repr(two.pool) == "<Pool a:ready(0) | waiting: nobody>"


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
    with pytest.raises(NoSlot, match="are pinned, by a"):
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
        assert lease.model == "b"
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
        assert repr(bench.pool) == "<Pool empty | waiting: nobody>"


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
    async for bench in _bench(1, queue_timeout=0.05):
        with pytest.raises(QueueTimedOut, match="is being loaded, for longer than QUEUE_TIMEOUT") as caught:
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
    with pytest.raises(NoSlot, match="pinned, by p"):
        await other
    one.engine("p").started.set_result(None)
    (await pinned).release()


async def test_an_engine_of_another_revision_is_not_passed_off(one: Bench) -> None:
    (await one.started("a")).release()
    with pytest.raises(ModelNotServable, match="its revision r1 is loaded and not r2"):
        await one.pool.lease(replace(model("a"), revision="r2", exact=True))
    assert repr(one.pool) == "<Pool a:ready(0) | waiting: nobody>"


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
