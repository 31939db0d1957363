"""Engines that sleep instead of ending, over gated engines."""

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest

from inference_service.errors import EngineDied, EngineError, SwapFailed
from inference_service.metrics import Metrics
from inference_service.pool import loader
from inference_service.scheduler.state import EngineState, Policy
from inference_service.storage.model import Checkpoint
from tests.pool.gated import MIB, GatedEngine, model
from tests.pool.test_pool import Bench

FREED = MIB - 100


def kind(wanted: Checkpoint) -> str:
    """`a` and `a2` are of one architecture."""
    return wanted.name[0]


class Beds(Bench):
    """One slot, so many beds; `lacking`: bytes that the machine's memory lacks."""

    def __init__(self, sleepers: int = 1, slots: int = 1, memory: int = 10 * MIB, **parts: Any) -> None:
        self.lacking = 0
        super().__init__(
            Policy(slots, 10, min_residency=0, sleepers=sleepers, memory=memory),
            **parts,
            swap_key=kind,
            asleep_bytes=lambda wanted: 100,
            lacking_beside=self._lacks,
        )

    async def _lacks(self, leader: int | None) -> int:
        return self.lacking

    async def used(self, name: str) -> GatedEngine:
        """The idle engine of a model that was asked for once, and can sleep."""
        (await self.started(name)).release()
        engine = self.engine(name)
        engine.sleep_frees = FREED
        return engine

    async def in_turn(self) -> tuple[GatedEngine, GatedEngine]:
        """`a`, which sleeps, and `b`, which is idle."""
        return await self.used("a"), await self.used("b")

    def sleeps(self) -> dict[str, float]:
        return counted(self.metrics)

    async def reserved(self) -> int:
        return int((await self.pool.stats())["budget"]["reserved_bytes"])


def counted(metrics: Metrics) -> dict[str, float]:
    samples = [each for family in metrics.sleeps.collect() for each in family.samples]
    found: dict[str, float] = {}
    for each in samples:
        if each.name.endswith("_total"):
            found[each.labels["status"]] = found.get(each.labels["status"], 0) + each.value
    return found


@pytest.fixture
async def beds() -> AsyncIterator[Beds]:
    bench = Beds()
    yield bench
    await ended(bench)


async def ended(bench: Bench) -> None:
    for engine in [each for engines in bench.engines.values() for each in engines]:
        if not engine.may_close.done():
            engine.may_close.set_result(None)
    await bench.pool.close()
    assert bench.held == [], "no snapshot is held"
    assert all(engine.closed for engines in bench.engines.values() for engine in engines)
    assert repr(bench.pool) == "<Pool empty | waiting: none>"


async def test_an_engine_sleeps_and_wakes_with_its_model(beds: Beds) -> None:
    a, b = await beds.in_turn()
    assert repr(beds.pool) == "<Pool a:sleeping(0) b:ready(0) | waiting: none>"
    assert (a.commands, a.closing, beds.held) == (["sleep"], False, ["b"])
    assert await beds.reserved() == MIB + 100, "what it keeps: a MiB less what it has freed"
    lease = await beds.ask("a")
    assert lease.engine is a
    assert repr(beds.pool) == "<Pool b:sleeping(0) a:ready(1) | waiting: none>"
    assert (beds.held, len(beds.engines["a"])) == (["a"], 1)
    assert beds.sleeps() == {"asleep": 2, "woken": 1}
    lease.release()
    stats = await beds.pool.stats()
    assert stats["slots"] == {"total": 1, "used": 1}
    assert [(each["model"], each["asleep_bytes"]) for each in stats["engines"]] == [("b", 100), ("a", None)]
    assert b.commands == ["sleep"]


async def test_a_sibling_wakes_it(beds: Beds) -> None:
    a, _ = await beds.in_turn()
    lease = await beds.ask("a2")
    assert (lease.engine, lease.model.name, a.snapshot.model) == (a, "a2", "a2")
    lease.release()


async def test_its_adapters_are_gone(beds: Beds) -> None:
    asked = beds.ask_adapter("t", "a")
    await beds.settle()
    beds.engine("a").started.set_result(None)
    (await asked).release()
    beds.engine("a").sleep_frees = FREED
    await beds.used("b")
    assert beds.held == ["b"]
    lease = await beds.ask("a")
    assert beds.pool.names() == {"a"}
    lease.release()


@pytest.mark.parametrize(
    ("fault", "grace"), [(EngineError("it cannot"), 0.0), (EngineDied("it is gone"), 0.0)]
)
async def test_an_engine_that_cannot_sleep_ends(beds: Beds, fault: Exception, grace: float) -> None:
    a = await beds.used("a")
    a.may_sleep = asyncio.get_running_loop().create_future()
    a.may_sleep.set_exception(fault)
    asked = beds.ask("b")
    await beds.settle()
    a.may_close.set_result(None)
    await beds.settle()
    beds.engine("b").started.set_result(None)
    (await asked).release()
    assert (a.closed, a.graces, beds.sleeps()) == (True, [grace], {"failed": 1})


async def test_an_engine_whose_host_cannot_sleep_ends_in_good_order(beds: Beds) -> None:
    a = await beds.used("a")
    a.sleep_frees = None
    asked = beds.ask("b")
    await beds.settle()
    a.may_close.set_result(None)
    await beds.settle()
    beds.engine("b").started.set_result(None)
    (await asked).release()
    assert (a.closed, beds.sleeps()) == (True, {})
    assert a.graces != [0.0]


async def test_an_engine_ends_in_good_order_where_the_machines_memory_is_short(beds: Beds) -> None:
    a = await beds.used("a")
    beds.lacking = 1
    asked = beds.ask("b")
    await beds.settle()
    a.may_close.set_result(None)
    await beds.settle()
    beds.engine("b").started.set_result(None)
    (await asked).release()
    assert (a.commands, a.closed, beds.sleeps()) == ([], True, {"no_memory": 1})
    assert a.graces != [0.0]


async def test_a_request_for_a_model_on_its_way_to_sleep_waits_and_wakes_it(beds: Beds) -> None:
    a = await beds.used("a")
    a.may_sleep = asyncio.get_running_loop().create_future()
    asked_b = beds.ask("b")
    await beds.settle()
    asked_a = beds.ask("a")
    await beds.settle()
    assert repr(beds.pool) == "<Pool a:stopping(0) | waiting: b a>"
    a.may_sleep.set_result(None)
    await beds.settle()
    beds.engine("b").started.set_result(None)
    beds.engine("b").sleep_frees = FREED
    (await asked_b).release()
    lease = await asked_a
    assert lease.engine is a
    lease.release()


async def test_a_sleeper_that_dies_is_removed(beds: Beds) -> None:
    a, _ = await beds.in_turn()
    a.may_close.set_result(None)
    a.dead.set_result("killed")
    await beds.settle()
    assert repr(beds.pool) == "<Pool b:ready(0) | waiting: none>"
    assert a.graces == [0.0]


async def test_a_sleeper_that_does_not_wake_is_replaced_by_a_fresh_engine(beds: Beds) -> None:
    a, _ = await beds.in_turn()
    a.swap_error = SwapFailed("the weights do not come back")
    asked = beds.ask("a")
    await beds.settle()
    fresh = beds.engine("a")
    assert fresh is not a
    fresh.started.set_result(None)
    lease = await asked
    assert (lease.engine, a.closed) == (fresh, True)
    assert repr(beds.pool) == "<Pool b:sleeping(0) a:ready(1) | waiting: none>"
    lease.release()


async def test_weights_of_before_are_not_taken_for_those_of_another_model(beds: Beds) -> None:
    a, _ = await beds.in_turn()
    a.keeps_weights = True
    a.may_close.set_result(None)
    asked = beds.ask("a2")
    await until(lambda: "a2" in beds.engines)
    beds.engine("a2").started.set_result(None)
    lease = await asked
    assert (a.closed, lease.engine) == (True, beds.engine("a2"))
    lease.release()


@pytest.mark.parametrize("fault", [KeyError("freed_bytes"), ValueError("?"), OSError("?")])
async def test_no_fault_of_a_sleep_leaves_a_slot_taken(beds: Beds, fault: Exception) -> None:
    a = await beds.used("a")
    a.may_sleep = asyncio.get_running_loop().create_future()
    a.may_sleep.set_exception(fault)
    a.may_close.set_result(None)
    asked = beds.ask("b")
    await until(lambda: "b" in beds.engines)
    beds.engine("b").started.set_result(None)
    (await asked).release()
    assert (a.closed, beds.sleeps()) == (True, {"failed": 1})


async def test_what_was_measured_is_expected_of_the_next_engine_of_its_kind() -> None:
    """Nothing is put to sleep only to end at once, again and again."""
    bench = Beds(memory=MIB + MIB // 4)
    for name in ("a", "b"):
        (await bench.started(name)).release()
        bench.engine(name).sleep_frees = MIB // 2
        bench.engine(name).may_close.set_result(None)
    assert repr(bench.pool) == "<Pool b:ready(0) | waiting: none>", "it kept more than fits"
    asked = bench.ask("a")
    await until(lambda: len(bench.engines["a"]) == 2)
    bench.engine("a").may_close.set_result(None)
    bench.engine("a").started.set_result(None)
    (await asked).release()
    assert bench.sleeps() == {"asleep": 2}, "of each kind once"
    asked = bench.ask("b")
    await until(lambda: len(bench.engines["b"]) == 2)
    bench.engine("b").may_close.set_result(None)
    bench.engine("b").started.set_result(None)
    (await asked).release()
    assert bench.sleeps() == {"asleep": 2}
    await ended(bench)


async def measured(leader: int | None, before: int | None) -> int | None:
    return MIB


@pytest.mark.parametrize("order", ["within", "around"])
async def test_an_engine_that_wakes_beside_a_start_spoils_its_measurement(order: str) -> None:
    bench = Beds(slots=2, used_bytes=measured)
    await bench.used("a")
    await bench.used("c")
    await bench.used("b")
    assert repr(bench.pool) == "<Pool c:ready(0) a:sleeping(0) b:ready(0) | waiting: none>"
    bench.engine("c").may_close.set_result(None)
    await bench.pool.unload("c")
    bench.engine("b").may_close.set_result(None)
    await bench.pool.unload("b")
    may_swap = bench.engine("a").may_swap = asyncio.get_running_loop().create_future()
    if order == "within":
        asked, woken = bench.ask("x"), bench.ask("a")
        await bench.settle()
        may_swap.set_result(None)
        (await woken).release()
        bench.engine("x").started.set_result(None)
        (await asked).release()
    else:
        woken, asked = bench.ask("a"), bench.ask("x")
        await bench.settle()
        bench.engine("x").started.set_result(None)
        (await asked).release()
        may_swap.set_result(None)
        (await woken).release()
    found = {each["model"]: each["measured_bytes"] for each in (await bench.pool.stats())["engines"]}
    assert found == {"a": MIB, "x": None}
    await ended(bench)


async def test_space_on_the_disk_is_made_for_what_an_engine_wakes_with() -> None:
    bench = Beds(slots=2)
    a = await bench.used("a")
    await bench.used("c")
    await bench.used("b")
    bench.engine("b").may_close.set_result(None)
    await bench.pool.unload("b")
    c = bench.engine("c")
    c.may_close.set_result(None)
    bench.has_room["a2"] = lambda: c.closed
    lease = await bench.ask("a2")
    assert (lease.engine, c.closed) == (a, True)
    lease.release()
    await ended(bench)


async def test_a_wake_waits_for_the_devices_memory(beds: Beds, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loader, "_MEMORY_POLL_INTERVAL", 0.0)
    a, _ = await beds.in_turn()
    beds.free = FREED - 1
    asked = beds.ask("a")
    await beds.settle()
    assert not asked.done()
    beds.free = FREED
    lease = await asked
    assert lease.engine is a
    lease.release()


async def test_memory_that_does_not_come_is_a_fresh_engine(
    beds: Beds, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loader, "MEMORY_SECONDS", 0.0)
    a, b = await beds.in_turn()
    a.may_close.set_result(None)
    beds.free = FREED - 1
    asked = beds.ask("a")
    await until(lambda: b.closing)
    assert a.closed, "the fresh engine lacks memory, too, and what sleeps ends for it"
    beds.free = None
    b.may_close.set_result(None)
    await until(lambda: len(beds.engines["a"]) == 2)
    beds.engine("a").started.set_result(None)
    (await asked).release()


async def until(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not holds():  # noqa: ASYNC110  (nothing reports it)
            await asyncio.sleep(0.01)


async def test_the_operator_unloads_a_model_that_sleeps(beds: Beds) -> None:
    a, _ = await beds.in_turn()
    a.may_close.set_result(None)
    assert await beds.pool.unload("a")
    assert (a.closed, repr(beds.pool)) == (True, "<Pool b:ready(0) | waiting: none>")
    assert not await beds.pool.unload("a")


async def test_the_operator_unloads_a_model_on_its_way_to_sleep(beds: Beds) -> None:
    a = await beds.used("a")
    a.may_sleep = asyncio.get_running_loop().create_future()
    asked = beds.ask("b")
    await beds.settle()
    unload = asyncio.create_task(beds.pool.unload("a"))
    await beds.settle()
    a.may_sleep.set_result(None)
    a.may_close.set_result(None)
    assert await unload
    assert a.closed
    await beds.settle()
    beds.engine("b").started.set_result(None)
    (await asked).release()
    assert repr(beds.pool) == "<Pool b:ready(0) | waiting: none>"


async def test_an_engine_that_hangs_on_its_way_to_sleep_ends() -> None:
    bench = Bench(
        Policy(1, 10, min_residency=0, sleepers=1),
        stall_timeout=0.02,
        swap_key=kind,
        asleep_bytes=lambda wanted: 100,
    )
    (await bench.started("a")).release()
    a = bench.engine("a")
    a.may_sleep = asyncio.get_running_loop().create_future()
    a.may_close.set_result(None)
    asked = bench.ask("b")
    await until(lambda: "b" in bench.engines)
    assert (a.closed, a.graces) == (True, [0.0])
    bench.engine("b").started.set_result(None)
    (await asked).release()
    await ended(bench)


async def test_a_service_ends_while_an_engine_falls_asleep(beds: Beds) -> None:
    a = await beds.used("a")
    a.may_sleep = asyncio.get_running_loop().create_future()
    asked = beds.ask("b")
    await beds.settle()
    a.may_close.set_result(None)
    await beds.pool.close()
    assert a.closed
    asked.cancel()


async def test_a_model_is_said_to_sleep(beds: Beds) -> None:
    await beds.in_turn()
    assert beds.pool.names() == {"b"}, "nothing serves under the other's name"
    assert beds.pool.standing(model("a")) is EngineState.SLEEPING
    assert beds.pool.count_by_state()["sleeping"] == 1


async def test_pinning_a_model_pins_no_engine_that_sleeps(beds: Beds) -> None:
    await beds.in_turn()
    beds.pool.pin(model("a"), pinned=True)
    lease = await beds.ask("a")
    assert [each["pinned"] for each in (await beds.pool.stats())["engines"]] == [False, True]
    lease.release()
