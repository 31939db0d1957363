"""A real registry over a directory bucket, a pool with gated engines, and the revisions between them."""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from inference_service.checkpoints.memory_profile import Footprint
from inference_service.checkpoints.snapshot import Snapshot
from inference_service.config import Backend, Settings, WaitLimit
from inference_service.machine.device import Device, DeviceKind
from inference_service.metrics import Metrics
from inference_service.pool.leases import Lease
from inference_service.pool.lifecycle import Limits
from inference_service.pool.loader import Parts
from inference_service.pool.pool import Pool
from inference_service.revisions.resolver import Resolver
from inference_service.revisions.rollout import MIN_POLL_INTERVAL, Rollout
from inference_service.scheduler.state import Policy
from inference_service.storage.bucket.catalog import Catalog
from inference_service.storage.bucket.directory import DirectoryStore
from inference_service.storage.bucket.documents import Documents
from inference_service.storage.preflight import Preflight
from inference_service.storage.registry import Registry
from inference_service.storage.snapshots.cache import Disk
from inference_service.storage.snapshots.layout import Layout
from inference_service.storage.snapshots.page_lock import PageLock
from inference_service.storage.snapshots.snapshots import SnapshotStore
from inference_service.storage.snapshots.verify import Verifier
from tests.fixtures.caches import UNLIMITED
from tests.pool.gated import MIB, GatedEngine

SECONDS = 20.0


class Bench:
    """`broken`: models whose engines fail to start; `gated`: models whose engines start when told to."""

    def __init__(self, room: Path, slots: int) -> None:
        self.models = room / "bucket" / "models"
        self.engines: list[GatedEngine] = []
        self.broken: dict[str, Exception] = {}
        self.gated: set[str] = set()
        self.metrics = Metrics()
        store = DirectoryStore(room / "bucket")
        layout = Layout(room / "cache")
        disk = Disk(layout, UNLIMITED)
        snapshots = SnapshotStore(store, layout, disk)
        documents = Documents(store)
        device = Device(DeviceKind.CPU, "test")
        preflight = Preflight(documents, Settings(), device, Backend.FAKE, disk.check_fits, snapshots.kept)
        self.catalog = Catalog(store, "models/", ttl=0.0, documents=documents)
        self.registry = Registry(self.catalog, preflight, snapshots, layout, Verifier(PageLock(0)))
        self.pool = Pool(
            Parts(
                self.registry.fetch,
                self.registry.release,
                self._make,
                self._free_bytes,
                lambda model: Footprint(MIB, 0, 0),
            ),
            self.metrics,
            policy=Policy(slots, 10, min_residency=0),
            limits=Limits(WaitLimit(1000), WaitLimit(1000), 1000),
        )
        self.rollout = Rollout(self.pool, self.registry, self.metrics, MIN_POLL_INTERVAL)
        self.resolver = Resolver(self.registry, self.pool, self.rollout)

    def put(self, name: str, weights: str, **files: object) -> None:
        """Upload a checkpoint as another revision; `files` by stem are JSON."""
        self._write(name, {"config.json": {}, "tokenizer.json": {}, **_json(files)}, weights)

    def put_adapter(self, name: str, base: str, weights: str) -> None:
        config = {"base_model_name_or_path": base, "r": 8}
        self._write(name, {"adapter_config.json": config}, weights, "adapter_model.safetensors")

    def _write(
        self, name: str, files: dict[str, object], weights: str, weights_file: str = "model.safetensors"
    ) -> None:
        directory = self.models / name
        directory.mkdir(parents=True, exist_ok=True)
        for file, content in files.items():
            (directory / file).write_text(json.dumps(content))
        (directory / weights_file).write_text(weights)
        self.catalog.forget()

    async def lease(self, name: str) -> Lease:
        return await self.resolver.lease(name, time.monotonic(), lambda model: None)

    async def served(self, name: str) -> str:
        """The revision that answers a request for the name."""
        lease = await self.lease(name)
        lease.release()
        return lease.model.revision

    async def newest(self, name: str) -> str:
        return (await self.resolver.find(name)).model.revision

    async def until_served(self, name: str, revision: str) -> None:
        async with asyncio.timeout(SECONDS):
            while await self.served(name) != revision:  # noqa: ASYNC110  (it is asked, not told)
                await asyncio.sleep(0.02)

    async def until(self, condition: Callable[[], object]) -> None:
        async with asyncio.timeout(SECONDS):
            while not condition():  # noqa: ASYNC110  (several parts change it)
                await asyncio.sleep(0.02)

    def line(self, name: str) -> dict[str, Any]:
        """What /admin/stats shows of the model's revisions."""
        return self.rollout.describe().get(name, {})

    def counted(self, status: str, model: str) -> float:
        value: float = self.metrics.rollouts.labels(model, status)._value.get()
        return value

    def _make(self, snapshot: Snapshot, footprint: Footprint) -> GatedEngine:
        engine = GatedEngine(snapshot)
        engine.may_close.set_result(None)
        if snapshot.model not in self.gated:
            error = self.broken.get(snapshot.revision)
            engine.started.set_exception(error) if error else engine.started.set_result(None)
        self.engines.append(engine)
        return engine

    async def _free_bytes(self) -> int | None:
        return None


def _json(files: dict[str, object]) -> dict[str, object]:
    return {f"{stem}.json": content for stem, content in files.items()}


@asynccontextmanager
async def opened(room: Path, slots: int = 2) -> AsyncIterator[Bench]:
    bench = Bench(room, slots)
    watch = asyncio.create_task(bench.rollout.watch())
    yield bench
    watch.cancel()
    await bench.rollout.close()
    await bench.pool.close()
