"""Models without files, and engines whose start, death and end happen when the test says so."""

import asyncio
from dataclasses import replace
from datetime import UTC, datetime

from inference_service.checkpoints.serving_config import Serving
from inference_service.checkpoints.snapshot import Snapshot
from inference_service.engines.base import About, Fingerprint, Heartbeat, Prepared, Reply, Swapped
from inference_service.errors import AdapterRefused, EngineDied, ServiceError
from inference_service.storage.bucket.model import DescribedModel, ModelKind
from inference_service.storage.bucket.store import StoredObject
from inference_service.storage.model import Adapter, Checkpoint

MIB = 1 << 20


def described(name: str, kind: ModelKind, *, revision: str = "r1", pinned: bool = False) -> DescribedModel:
    weights = StoredObject(f"{name}/model.safetensors", 100, "1", 7, datetime.now(UTC))
    serving = Serving(pinned=pinned)
    return DescribedModel(name, kind, name, revision, (weights,), datetime.now(UTC), serving=serving)


def model(name: str, *, revision: str = "r1", pinned: bool = False) -> Checkpoint:
    return Checkpoint(described(name, ModelKind.CHECKPOINT, revision=revision, pinned=pinned))


def adapter(name: str, base: str) -> Adapter:
    return Adapter(replace(described(name, ModelKind.ADAPTER), base_name=base, rank=8), model(base))


def key(name: str) -> str:
    """The reference of `model(name)`."""
    return model(name).reference


class GatedEngine:
    """An engine whose start, death and end happen when the test says so."""

    def __init__(self, snapshot: Snapshot) -> None:
        self.snapshot = snapshot
        self.healthy = True
        self.process_id = None
        self.phases: dict[str, float] = {}
        self.about = About()
        # What its next swap raises; and whether the weight check shows the weights before.
        self.swap_error: Exception | None = None
        self.keeps_weights = False
        self.adapters: list[str] = []
        self.refuses: str | None = None
        loop = asyncio.get_running_loop()
        self.started: asyncio.Future[None] = loop.create_future()
        self.may_swap: asyncio.Future[None] = loop.create_future()
        self.may_swap.set_result(None)
        # What it was told to prepare and to give up; `may_prepare` holds up the former.
        self.commands: list[str] = []
        self.may_prepare: asyncio.Future[None] = loop.create_future()
        self.may_prepare.set_result(None)
        self.prepares: Prepared | Exception | None = Prepared(1, 1)
        self.may_sleep: asyncio.Future[None] = loop.create_future()
        self.may_sleep.set_result(None)
        # None: it cannot sleep.
        self.sleep_frees: int | None = 0
        self.asleep = False
        self.dead: asyncio.Future[str] = loop.create_future()
        self.may_close: asyncio.Future[None] = loop.create_future()
        self.closing = self.closed = False
        self.graces: list[float] = []
        self.cut_with: ServiceError | None = None
        # What a look at the running engine shows; None: it does not answer.
        self.heartbeats: Heartbeat | None = Heartbeat(0, 0)

    async def start(self) -> None:
        await asyncio.shield(self.started)

    async def forward(self, path: str, body: bytes, request_id: str) -> Reply:
        raise NotImplementedError

    async def heartbeat(self) -> Heartbeat:
        if self.heartbeats is None:
            raise EngineDied("it does not answer")
        return self.heartbeats

    async def weight_check(self) -> Fingerprint:
        return fingerprint(self.snapshot)

    async def swap(self, snapshot: Snapshot) -> Swapped:
        await asyncio.shield(self.may_swap)
        if self.swap_error is not None:
            raise self.swap_error
        self.asleep = False
        if not self.keeps_weights:
            self.snapshot = snapshot
        return Swapped(fingerprint(self.snapshot), {"weights": 0.0})

    async def sleep(self) -> int | None:
        self.commands.append("sleep")
        await asyncio.shield(self.may_sleep)
        self.asleep = True
        return self.sleep_frees

    async def prepare(self, snapshot: Snapshot) -> Prepared | None:
        self.commands.append(f"prepare {snapshot.model}")
        await asyncio.shield(self.may_prepare)
        if isinstance(self.prepares, Exception):
            raise self.prepares
        return self.prepares

    async def forget(self, snapshot: Snapshot) -> None:
        self.commands.append(f"forget {snapshot.model}")
        await asyncio.sleep(0)

    async def add_adapter(self, name: str, number: int, adapter: Snapshot) -> None:
        if self.refuses is not None:
            raise AdapterRefused(self.refuses)
        self.adapters.append(name)

    async def remove_adapter(self, name: str) -> None:
        self.adapters.remove(name)

    def abort_all(self, error: ServiceError) -> None:
        self.cut_with = error

    async def wait_dead(self) -> str:
        return await asyncio.shield(self.dead)

    async def close(self, grace: float = 5.0) -> None:
        self.graces.append(grace)
        self.closing = True
        if self.swap_error is None:  # what could not be swapped is killed
            await asyncio.shield(self.may_close)
        self.closed = True


def fingerprint(snapshot: Snapshot) -> Fingerprint:
    return Fingerprint(((sum(snapshot.model.encode()), -1.0), (7, float(len(snapshot.revision)))))
