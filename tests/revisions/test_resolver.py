"""From a name to a lease, where the listing and the engines disagree."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from inference_service.checkpoints.reference import Reference
from inference_service.errors import ModelNotServable
from inference_service.pool.pool import Superseded
from inference_service.scheduler.state import EngineState
from tests.revisions.bench import SECONDS, Bench, opened


@pytest.fixture
async def bench(tmp_path: Path) -> AsyncIterator[Bench]:
    async with opened(tmp_path) as bench:
        yield bench


async def test_a_live_revision_is_served_by_its_revision_when_its_listing_is_wrong(
    bench: Bench,
) -> None:
    bench.put("acme/m", "one")
    revision = await bench.served("acme-m")
    exact = str(Reference("acme-m", revision))
    bench.put("acme-m", "another model of that name")
    for name in ("acme-m", exact):
        assert await bench.served(name) == revision
    await bench.resolver.load(await bench.resolver.resolve(exact))
    await bench.pool.unload("acme-m")
    with pytest.raises(ModelNotServable, match="same name"):
        await bench.lease(exact)


async def test_a_live_adapter_is_ready_when_its_listing_is_wrong(bench: Bench) -> None:
    bench.put("base", "one")
    bench.put_adapter("ad", "base", "one")
    revision = await bench.served("ad")
    (bench.models / "ad" / "a\\b").write_text("")
    bench.catalog.forget()
    exact = str(Reference("ad", revision))
    found = await bench.registry.find(exact)
    assert bench.pool.standing(found.model) is EngineState.READY
    assert await bench.served(exact) == revision


async def test_a_request_for_a_revision_of_an_adapter_waits_for_the_base_that_serves(bench: Bench) -> None:
    """The base that it waits for is superseded: only the adapter's revision was requested."""
    bench.put("base", "one")
    bench.put_adapter("ad", "base", "one")
    requested = await bench.resolver.resolve(str(Reference("ad", await bench.newest("ad"))))
    old = requested.model.engine_model
    bench.gated.add("base")
    waiting = asyncio.create_task(bench.pool.lease(requested.model, exact=True))
    await bench.until(lambda: bench.engines)
    bench.pool.retire(old.reference)
    with pytest.raises(Superseded):
        await asyncio.wait_for(waiting, SECONDS)
