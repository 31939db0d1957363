"""Weights that engines make ready ahead of a swap: what is held, for how long, and when memory is short."""

import asyncio
from pathlib import Path

import pytest

from inference_service.checkpoints.snapshot import Snapshot
from inference_service.engines.base import Prepared
from inference_service.errors import EngineDied, EngineError
from inference_service.machine.memory import SPARE_BYTES
from inference_service.metrics import Metrics
from inference_service.pool.preparation import HostMemory, Preparation
from inference_service.scheduler.state import Policy
from tests.pool.gated import GatedEngine
from tests.pool.test_pool import Bench as PoolBench

SIZE = 100


def snapshot(name: str) -> Snapshot:
    return Snapshot(name, "r1", Path("/cache") / name, SIZE)


class Bench:
    """`held` snapshots stay on the disk; those in `gone` have left it; `free` bytes of memory."""

    def __init__(self, quota: int = 0) -> None:
        self.held: list[str] = []
        self.gone: set[str] = set()
        self.free: int | None = None
        self.metrics = Metrics()
        self.preparation = Preparation(HostMemory(quota, self._hold, self._release, self._free), self.metrics)

    def _hold(self, snapshot: Snapshot) -> bool:
        if snapshot.model in self.gone:
            return False
        self.held.append(snapshot.model)
        return True

    def _release(self, snapshot: Snapshot) -> None:
        self.held.remove(snapshot.model)

    async def _free(self) -> int | None:
        return self.free

    async def prepare(self, engine: GatedEngine, name: str) -> None:
        self.preparation.prepare(engine, snapshot(name), f"{name}@r1")
        await settle()

    async def swap(self, engine: GatedEngine, before: str, now: str) -> None:
        self.preparation.swapped(engine, (snapshot(before), f"{before}@r1"), (snapshot(now), f"{now}@r1"))
        await settle()

    def count(self, status: str) -> float:
        samples = [each for family in self.metrics.preparations.collect() for each in family.samples]
        wanted = [
            each for each in samples if each.name.endswith("_total") and each.labels["status"] == status
        ]
        return sum(each.value for each in wanted)


async def settle() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


def engine() -> GatedEngine:
    return GatedEngine(snapshot("a"))


def holding(engine: GatedEngine) -> GatedEngine:
    engine.may_prepare = asyncio.get_running_loop().create_future()
    return engine


async def test_what_was_prepared_is_given_up_after_the_swap() -> None:
    bench, one = Bench(), engine()
    await bench.prepare(one, "b")
    assert (one.commands, bench.held) == (["prepare b"], ["b"])
    (shown,) = bench.preparation.describe()
    assert (shown["model"], shown["wanted"], shown["ready_bytes"], shown["refused"]) == ("b", True, 1, None)
    await bench.prepare(one, "b")
    await bench.swap(one, "a", "b")
    assert (one.commands, bench.held) == (["prepare b", "forget b"], [])
    assert bench.count("ready") == 1


async def test_what_no_request_waits_for_any_more_is_given_up_also_halfway() -> None:
    bench, one = Bench(), holding(engine())
    await bench.prepare(one, "b")
    bench.preparation.unwanted("c@r1")
    assert one.commands == ["prepare b"]
    bench.preparation.unwanted("b@r1")
    assert bench.held == ["b"], "until the engine has let go of it"
    await settle()
    assert (one.commands, bench.held) == (["prepare b", "forget b"], [])
    one.may_prepare.set_result(None)
    await settle()
    assert bench.preparation.describe() == []


async def test_a_later_command_does_not_overtake() -> None:
    bench, one = Bench(), engine()
    await bench.prepare(one, "b")
    bench.preparation.unwanted("b@r1")
    bench.preparation.prepare(one, snapshot("b"), "b@r1")
    await settle()
    assert one.commands == ["prepare b", "forget b", "prepare b"]
    assert bench.held == ["b"]


@pytest.mark.parametrize(("free", "prepares"), [(SIZE + SPARE_BYTES - 1, False), (SIZE + SPARE_BYTES, True)])
async def test_memory_is_left_to_everything_else(
    caplog: pytest.LogCaptureFixture, free: int, prepares: bool
) -> None:
    bench, one = Bench(), engine()
    bench.free = free
    for name in ("b", "b", "c"):
        await bench.prepare(one, name)
        bench.preparation.unwanted(f"{name}@r1")
        await settle()
    assert bool(one.commands) is prepares
    assert bench.held == []
    assert bench.count("no_memory") == (0 if prepares else 3)
    assert len(caplog.records) == (0 if prepares else 1), "logged once"


async def test_memory_is_counted_over_all_engines_and_each_snapshot_once() -> None:
    bench, one, two = Bench(), engine(), engine()
    bench.free = 2 * SIZE + SPARE_BYTES
    await bench.prepare(one, "b")
    await bench.prepare(two, "b")
    await bench.prepare(two, "c")
    await bench.prepare(one, "d")
    assert one.commands == ["prepare b"]
    assert two.commands == ["prepare b", "prepare c"]
    assert sorted(bench.held) == ["b", "b", "c"]


async def test_a_refusal_is_counted_and_what_is_ready_stays() -> None:
    bench, one = Bench(), engine()
    one.prepares = Prepared(3, 10, "no more")
    await bench.prepare(one, "b")
    assert (bench.count("refused"), bench.count("ready")) == (1, 0)
    assert bench.preparation.describe()[0]["refused"] == "no more"
    assert bench.held == ["b"]
    bench.preparation.unwanted("b@r1")
    await settle()
    assert one.commands == ["prepare b", "forget b"]


async def test_an_engine_that_cannot_prepare_holds_nothing() -> None:
    bench, one = Bench(), engine()
    one.prepares = None
    await bench.prepare(one, "b")
    assert (bench.held, bench.preparation.describe()) == ([], [])


@pytest.mark.parametrize("error", [EngineDied("it died"), EngineError("broken")])
async def test_an_engine_that_fails_or_dies_holds_nothing(error: EngineError) -> None:
    bench, one = Bench(), holding(engine())
    one.prepares = error
    await bench.prepare(one, "b")
    bench.preparation.ended(one)
    assert bench.held == []
    one.may_prepare.set_result(None)
    await settle()
    assert (bench.held, bench.preparation.describe()) == ([], [])
    await bench.prepare(one, "b")
    assert (bench.held, bench.preparation.describe()) == ([], [])
    assert bench.count("failed") == 2


async def test_a_snapshot_that_has_left_the_disk_is_not_prepared() -> None:
    bench, one = Bench(), engine()
    bench.gone.add("b")
    await bench.prepare(one, "b")
    assert one.commands == []


async def test_the_quota_keeps_what_was_used_last() -> None:
    bench, one = Bench(quota=2 * SIZE), engine()
    await bench.swap(one, "a", "b")
    assert bench.held == ["a"], "it may come back"
    await bench.swap(one, "b", "c")
    assert sorted(bench.held) == ["a", "b"]
    await bench.swap(one, "c", "a")
    assert one.commands == ["prepare a", "prepare b", "prepare c", "forget b"], "a was used after b"
    assert sorted(bench.held) == ["a", "c"]
    bench.preparation.ended(one)
    assert bench.held == []


async def test_what_requests_wait_for_comes_beside_the_quota() -> None:
    bench, one = Bench(quota=SIZE), engine()
    await bench.swap(one, "a", "b")
    await bench.prepare(one, "c")
    assert sorted(bench.held) == ["a", "c"]
    bench.preparation.unwanted("c@r1")
    await settle()
    assert bench.held == ["c"], "the later one of the two"


async def test_a_model_larger_than_the_quota_is_not_kept() -> None:
    bench, one = Bench(quota=SIZE - 1), engine()
    await bench.swap(one, "a", "b")
    assert one.commands == []


async def test_what_no_request_waits_for_is_given_up_for_space_on_the_disk() -> None:
    bench, one, two = Bench(quota=10 * SIZE), engine(), engine()
    await bench.swap(one, "a", "b")
    await bench.prepare(two, "c")
    assert sorted(bench.held) == ["a", "c"]
    assert await bench.preparation.give_up()
    assert bench.held == ["c"], "a request waits for it"
    assert not await bench.preparation.give_up()


async def test_a_fetch_that_finds_the_disk_full_takes_it_from_what_is_only_held_ready() -> None:
    held: list[str] = []

    def hold(snapshot: Snapshot) -> bool:
        held.append(snapshot.model)
        return True

    memory = HostMemory(10_000, hold, lambda snapshot: held.remove(snapshot.model))
    bench = PoolBench(Policy(2, 10, min_residency=0), swap_key=lambda wanted: "kin", host_memory=memory)
    (await bench.started("a")).release()
    busy = await bench.started("x")
    (await bench.ask("b")).release()
    assert held == ["a"], "it was swapped out"
    bench.has_room["c"] = lambda: not held
    lease = await bench.ask("c")
    assert (lease.model.name, held) == ("c", ["b"])
    assert list(bench.engines) == ["a", "x"], "swapped, not loaded afresh"
    for each in (lease, busy):
        each.release()
    for engines in bench.engines.values():
        engines[0].may_close.set_result(None)
    await bench.pool.close()
