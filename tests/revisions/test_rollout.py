"""Which revision serves a name while others come, fail, and go: gated engines over a real bucket."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from inference_service.errors import (
    EngineKilled,
    EngineStartFailed,
    ModelNotFound,
    ModelNotServable,
    NoPreviousRevision,
)
from tests.revisions.bench import SECONDS, Bench, opened


@pytest.fixture
async def bench(tmp_path: Path) -> AsyncIterator[Bench]:
    async with opened(tmp_path) as bench:
        yield bench


async def test_a_new_revision_takes_over_once_it_is_ready(bench: Bench) -> None:
    bench.put("m", "one")
    first = await bench.served("m")
    bench.gated.add("m")
    bench.put("m", "two")
    second = await bench.newest("m")
    assert second != first
    await bench.until(lambda: len(bench.engines) == 2)
    assert await bench.served("m") == first, "its engine has not started yet"
    bench.engines[1].started.set_result(None)
    await bench.until_served("m", second)
    assert bench.counted("ok", "m") == 1
    assert bench.line("m")["previous"] == [first]


async def test_a_revision_whose_engine_fails_is_rejected_once(bench: Bench) -> None:
    bench.put("m", "one")
    first = await bench.served("m")
    bench.put("m", "two")
    second = await bench.newest("m")
    bench.broken[second] = EngineStartFailed("no such architecture")
    await bench.until(lambda: bench.line("m").get("rejected"))
    assert await bench.served("m") == first
    await asyncio.sleep(1)  # three polls
    assert len(bench.engines) == 2, "it is not tried again"
    assert bench.counted("rejected", "m") == 1
    assert "no such architecture" in bench.line("m")["rejected"][second]


async def test_a_revision_that_was_not_at_fault_is_tried_again(bench: Bench) -> None:
    bench.put("m", "one")
    first = await bench.served("m")
    bench.put("m", "two")
    second = await bench.newest("m")
    bench.broken[second] = EngineKilled("killed while it started")
    await bench.until(lambda: bench.line("m").get("problem"))
    assert await bench.served("m") == first
    assert not bench.line("m")["rejected"]
    del bench.broken[second]
    # Its load is held back for a while, and then it takes over.
    await bench.until_served("m", second)


async def test_an_incomplete_upload_changes_nothing_and_is_reported(bench: Bench) -> None:
    bench.put("m", "one")
    first = await bench.served("m")
    (bench.models / "m" / "tokenizer.json").unlink()
    (bench.models / "m" / "model.safetensors").write_text("two")
    bench.catalog.forget()
    await bench.until(lambda: bench.line("m").get("problem"))
    assert "tokenizer.json is missing" in bench.line("m")["problem"]
    assert await bench.served("m") == first
    bench.put("m", "two")
    await bench.until_served("m", await bench.newest("m"))
    assert bench.line("m")["problem"] is None


async def test_rollback_and_the_next_upload(bench: Bench) -> None:
    bench.put("m", "one")
    first = await bench.served("m")
    found = (await bench.resolver.find("m")).model
    with pytest.raises(NoPreviousRevision):
        await bench.rollout.rollback(found)
    bench.put("m", "two")
    second = await bench.newest("m")
    await bench.until_served("m", second)
    rolled = await bench.rollout.rollback((await bench.resolver.find("m")).model)
    assert rolled.revision == first
    await asyncio.sleep(1)  # three polls
    assert await bench.served("m") == first, "what was rolled back does not come back"
    assert await bench.served(f"m@{second}") == second, "unless it is asked for"
    bench.put("m", "three")
    await bench.until_served("m", await bench.newest("m"))


async def test_two_rollbacks_at_once_are_one(bench: Bench) -> None:
    for weights in ("one", "two", "three"):
        bench.put("m", weights)
        await bench.until_served("m", await bench.newest("m"))
    newest = (await bench.resolver.find("m")).model
    both = await asyncio.gather(bench.rollout.rollback(newest), bench.rollout.rollback(newest))
    assert both[0].revision == both[1].revision
    assert bench.counted("rolled_back", "m") == 1


async def test_a_fresh_service_serves_what_the_disk_has_where_the_newest_fails(tmp_path: Path) -> None:
    async with opened(tmp_path) as bench:
        bench.put("m", "one")
        first = await bench.served("m")
    async with opened(tmp_path) as bench:
        bench.put("m", "two")
        bench.broken[await bench.newest("m")] = EngineStartFailed("no such architecture")
        assert await bench.served("m") == first
        with pytest.raises(EngineStartFailed):
            await bench.lease(f"m@{await bench.newest('m')}")


async def test_an_adapter_follows_its_base(bench: Bench) -> None:
    bench.put("base", "one")
    bench.put_adapter("t", "base", "a")
    lease = await bench.lease("t")
    first = lease.slot.model.revision
    lease.release()
    bench.put("base", "two")
    second = await bench.newest("base")
    async with asyncio.timeout(SECONDS):
        while (lease := await bench.lease("t")).slot.model.revision != second:
            lease.release()
            await asyncio.sleep(0.02)
    lease.release()
    assert first != second
    assert not bench.line("t").get("rejected")


async def test_an_adapter_is_not_at_fault_for_its_base(bench: Bench) -> None:
    bench.put("base", "one")
    bench.put_adapter("t", "base", "a")
    lease = await bench.lease("t")
    lease.release()
    bench.put("base", "two")
    bench.broken[await bench.newest("base")] = EngineStartFailed("no such architecture")
    await bench.until(lambda: bench.line("base").get("rejected"))
    again = await bench.lease("t")
    again.release()
    assert again.slot.model.revision == lease.slot.model.revision
    assert "t" not in bench.rollout.describe()


async def test_the_first_adapter_of_a_higher_rank_replaces_the_engine_of_its_base(bench: Bench) -> None:
    bench.put("base", "one")
    assert await bench.served("base")
    bench.put_adapter("t", "base", "a")
    lease = await bench.lease("t")
    lease.release()
    assert lease.slot.model.adapter_rank == 16
    # The base moves to the engine that takes adapters, and the other one goes.
    await bench.until(lambda: bench.engines[0].closed)
    base = await bench.lease("base")
    base.release()
    assert base.slot is lease.slot
    assert bench.counted("ok", "base") == 0, "it is the same revision"


async def test_an_adapter_of_an_incomplete_base_says_so(bench: Bench) -> None:
    bench.put("base", "one")
    (bench.models / "base" / "tokenizer.json").unlink()
    bench.put_adapter("t", "base", "a")
    with pytest.raises(ModelNotServable, match=r"'t' cannot be served: of its base: .*tokenizer\.json"):
        await bench.lease("t")


async def test_an_adapter_of_a_base_whose_upload_broke_off_goes_on(bench: Bench) -> None:
    bench.put("base", "one")
    bench.put_adapter("t", "base", "a")
    served = await bench.served("t")
    (bench.models / "base" / "tokenizer.json").unlink()
    (bench.models / "base" / "model.safetensors").write_text("two")
    bench.catalog.forget()
    assert await bench.served("t") == served


async def test_names_and_revisions_that_are_not_there(bench: Bench) -> None:
    bench.put("m", "one")
    for name in ("n", "m@", "m@0123456789ab", "@m", "m@m@m"):
        with pytest.raises(ModelNotFound):
            await bench.lease(name)
