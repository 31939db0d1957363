"""Weights made ready in host memory before they are swapped in (HOST_CACHE_GIB).

An engine prepares a model that a request waits for while it serves another one, as far as the machine's
memory allows. What was prepared or swapped out stays ready within the quota, the least recently used goes
first. A snapshot that an engine holds ready is held against eviction from the disk.
"""

import asyncio
import logging
from collections import Counter, OrderedDict
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from inference_service.checkpoints.snapshot import Snapshot
from inference_service.engines.base import Engine, Prepared
from inference_service.errors import EngineError
from inference_service.machine.memory import SPARE_BYTES
from inference_service.metrics import Metrics

logger = logging.getLogger(__name__)

# An engine, by its identity, and the snapshot's directory.
_Key = tuple[int, Path]


def _holds_nothing(snapshot: Snapshot) -> bool:
    return False


def _releases_nothing(snapshot: Snapshot) -> None:
    """Nothing was held."""


async def _unknown() -> None:
    """No limit is known."""


class HostMemory(NamedTuple):
    """`quota` in bytes, for weights that no request waits for. `hold` keeps a snapshot on the disk, unless it
    is gone (False), and `release` ends that.

    `free_bytes`: the machine's free memory, page cache counted as free; None if it sets no limit, because the
    snapshots are in memory already, or is unknown. By default nothing is prepared.
    """

    quota: int = 0
    hold: Callable[[Snapshot], bool] = _holds_nothing
    release: Callable[[Snapshot], None] = _releases_nothing
    free_bytes: Callable[[], Awaitable[int | None]] = _unknown


@dataclass(eq=False)
class _Entry:
    """A snapshot that an engine makes ready or holds; `wanted`: a request waits for its `reference` there."""

    engine: Engine
    snapshot: Snapshot
    reference: str
    wanted: bool
    prepared: Prepared | None = None

    @property
    def key(self) -> _Key:
        return id(self.engine), self.snapshot.path

    def describe(self) -> dict[str, Any]:
        """`ready_bytes` and the others are None while it is being made ready."""
        result = {} if self.prepared is None else asdict(self.prepared)
        return {
            "model": self.snapshot.model,
            "revision": self.snapshot.revision,
            "process_id": self.engine.process_id,
            "wanted": self.wanted,
            **{key: result.get(key) for key in ("ready_bytes", "total_bytes", "refused")},
        }


class Preparation:
    """What every engine holds ready."""

    def __init__(self, memory: HostMemory, metrics: Metrics) -> None:
        self._memory = memory
        self._metrics = metrics
        # The most recently used last.
        self._entries: OrderedDict[_Key, _Entry] = OrderedDict()
        self._given_up: dict[_Key, asyncio.Task[None]] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._reported: set[str] = set()

    def prepare(self, engine: Engine, snapshot: Snapshot, reference: str) -> None:
        """Have the engine make the snapshot ready for requests that wait for `reference`; returns at once."""
        self._add(_Entry(engine, snapshot, reference, wanted=True))

    def unwanted(self, reference: str) -> None:
        """No request waits for this model any more."""
        for entry in self._entries.values():
            if entry.reference == reference:
                entry.wanted = False
        self._trim()

    def swapped(self, engine: Engine, before: tuple[Snapshot, str] | None, now: tuple[Snapshot, str]) -> None:
        """The engine has `now` in the place of `before`, which may come back; each with its reference."""
        snapshot, reference = now
        key = (id(engine), snapshot.path)
        if key in self._entries:
            self._entries.move_to_end(key)
        if before is not None:
            self.dropped(engine, *before)
        self.unwanted(reference)

    def dropped(self, engine: Engine, snapshot: Snapshot, reference: str) -> None:
        """The engine no longer has this snapshot on its device, which may come back."""
        if snapshot.bytes <= self._memory.quota:
            self._add(_Entry(engine, snapshot, reference, wanted=False))

    async def give_up(self) -> bool:
        """Give up all that no request waits for, so that it may leave the disk; False if there is nothing."""
        for key, entry in list(self._entries.items()):
            if not entry.wanted:
                del self._entries[key]
                self._given_up[key] = self._run(self._forget(entry))
        giving_up = list(self._given_up.values())
        if giving_up:
            await asyncio.wait(giving_up)
        return bool(giving_up)

    def ended(self, engine: Engine) -> None:
        """The engine's process is gone, and what it held."""
        for key, entry in list(self._entries.items()):
            if entry.engine is engine:
                del self._entries[key]
                self._memory.release(entry.snapshot)

    def describe(self) -> list[dict[str, Any]]:
        """What is ready or being made so, for the operator."""
        return [entry.describe() for entry in self._entries.values()]

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _add(self, entry: _Entry) -> None:
        there = self._entries.get(entry.key)
        if there is not None:
            there.wanted |= entry.wanted
            there.reference = entry.reference
            self._entries.move_to_end(entry.key)
        elif self._memory.hold(entry.snapshot):
            self._entries[entry.key] = entry
            self._run(self._make_ready(entry))
            self._trim()

    async def _make_ready(self, entry: _Entry) -> None:
        # The engine must not take an earlier command to give it up for a later one.
        if (giving_up := self._given_up.get(entry.key)) is not None:
            await asyncio.wait({giving_up})
        missing = await self._missing(entry)
        if missing > 0:
            self._report("no_memory", entry, f"the machine's memory lacks {missing} bytes")
            self._drop(entry)
            return
        try:
            entry.prepared = await entry.engine.prepare(entry.snapshot)
        except EngineError as error:
            self._report("failed", entry, error.message)
            self._drop(entry)
            return
        if entry.prepared is None:
            self._drop(entry)
        elif entry.prepared.refused is not None:
            self._report("refused", entry, entry.prepared.refused)
        else:
            self._metrics.preparations.labels(entry.snapshot.model, "ready").inc()

    async def _missing(self, entry: _Entry) -> int:
        """Bytes that the machine lacks; what engines hold ready still counts as page cache there."""
        free = await self._memory.free_bytes()
        if free is None:
            return 0
        held = {each.snapshot.path: each.snapshot.bytes for each in (*self._entries.values(), entry)}
        return sum(held.values()) + SPARE_BYTES - free

    def _trim(self) -> None:
        """Give up the least recently used beyond the quota; what requests wait for does not count."""
        kept = Counter(
            {key: entry.snapshot.bytes for key, entry in self._entries.items() if not entry.wanted}
        )
        for key, entry in list(self._entries.items()):
            if kept.total() <= self._memory.quota:
                return
            if not entry.wanted:
                del kept[key], self._entries[key]
                self._given_up[key] = self._run(self._forget(entry))

    async def _forget(self, entry: _Entry) -> None:
        """The snapshot stays on the disk until the engine has let go of it."""
        try:
            await entry.engine.forget(entry.snapshot)
        except EngineError as error:
            logger.debug("nothing to give up: %s", error, extra={"model": entry.snapshot.model})
        finally:
            self._given_up.pop(entry.key, None)
            self._memory.release(entry.snapshot)

    def _drop(self, entry: _Entry) -> None:
        """It is not ready, and will not be."""
        if self._entries.get(entry.key) is entry:
            del self._entries[entry.key]
            self._memory.release(entry.snapshot)

    def _report(self, status: str, entry: _Entry, reason: str) -> None:
        """Count it, and log the first of its kind."""
        model = entry.snapshot.model
        self._metrics.preparations.labels(model, status).inc()
        if status not in self._reported:
            self._reported.add(status)
            logger.warning("a swap will not find its weights prepared: %s", reason, extra={"model": model})

    def _run(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task
