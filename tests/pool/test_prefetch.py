"""Files ahead of the engine: who takes them owns them, and nobody else's leaving takes them away."""

import asyncio
import time
from collections.abc import Callable
from pathlib import Path

from inference_service.checkpoints.snapshot import Snapshot
from inference_service.pool.prefetch import Prefetcher
from inference_service.storage.model import Model
from tests.pool.gated import model


class Source:
    """Files that come when the gate opens; every fetch is a hold of its own."""

    def __init__(self) -> None:
        self.gate = asyncio.Event()
        self.held = 0
        self.prefetcher = Prefetcher(
            self._fetch,
            self._release,
            clock=time.monotonic,
            ended=lambda model, error: None,
            wanted=lambda key: False,
            seconds=60,
        )

    async def _fetch(self, model: Model, entered: Callable[[str], None]) -> Snapshot:
        await self.gate.wait()
        self.held += 1
        return Snapshot(model.name, model.revision, Path("/nowhere"), 1)

    def _release(self, snapshot: Snapshot) -> None:
        self.held -= 1


async def test_what_somebody_is_about_to_take_is_not_dropped() -> None:
    source, wanted = Source(), model("t")
    leaving, staying = (asyncio.create_task(source.prefetcher.take(wanted)) for _ in range(2))
    await asyncio.sleep(0)
    source.prefetcher.drop(wanted.reference)
    leaving.cancel()
    await asyncio.sleep(0)
    source.gate.set()
    await staying
    assert source.held == 1


async def test_each_taker_has_a_hold_of_its_own() -> None:
    source, wanted = Source(), model("t")
    takers = [asyncio.create_task(source.prefetcher.take(wanted)) for _ in range(2)]
    source.gate.set()
    snapshots = [(await taker)[0] for taker in takers]
    assert source.held == 2
    for snapshot in snapshots:
        source._release(snapshot)
    source.prefetcher.close()
    assert source.held == 0


async def test_what_the_last_taker_leaves_is_dropped() -> None:
    source, wanted = Source(), model("t")
    taker = asyncio.create_task(source.prefetcher.take(wanted))
    await asyncio.sleep(0)
    taker.cancel()
    source.gate.set()
    await asyncio.sleep(0.01)
    assert (source.held, source.prefetcher.get(wanted.reference)) == (0, None)
