"""The LoRA adapters on one engine: added with their first request, kept up to a limit.

The engine decides how many compute in one batch (MAX_ADAPTERS); this module, which of them it has.
"""

import asyncio
import itertools
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from inference_service.checkpoints.reference import Reference
from inference_service.checkpoints.snapshot import Snapshot
from inference_service.engines.base import Engine
from inference_service.errors import AdapterRefused, EngineDied, EngineError
from inference_service.pool.phases import Phase, Phases
from inference_service.storage.model import Adapter

logger = logging.getLogger(__name__)

# Across all engines, so that no adapter is mistaken for an earlier one.
_numbers = itertools.count(1)


@dataclass(eq=False)
class LoadedAdapter:
    """One revision of an adapter on an engine. `users`: leases that hold it; times on the pool's clock."""

    model: Adapter
    number: int
    last_used: float
    users: int = 0
    snapshot: Snapshot | None = None
    loading: asyncio.Task[None] | None = None

    @property
    def served_name(self) -> str:
        """Unique; clients see the model's own name, with which it begins."""
        return str(Reference(self.model.name, self.model.revision, number=self.number))


class Adapters:
    """Adapters by reference; beyond `limit` the least recently used idle ones are removed.

    `take` gets an adapter's snapshot, which is released once the engine no longer has the adapter; `added` is
    called for each added adapter, with its phases. A `pinned` adapter is not removed.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        take: Callable[[Adapter], Awaitable[tuple[Snapshot, Phases]]],
        release: Callable[[Snapshot], None],
        added: Callable[[Adapter, Phases], None],
        pinned: Callable[[Adapter], bool],
        limit: int,
        clock: Callable[[], float],
    ) -> None:
        self._engine = engine
        self._take = take
        self._release = release
        self._added = added
        self._pinned = pinned
        self._limit = limit
        self._clock = clock
        self._known: dict[str, LoadedAdapter] = {}
        self._tidying: asyncio.Task[None] | None = None

    def get(self, reference: str) -> LoadedAdapter | None:
        """The adapter, if the engine has it."""
        adapter = self._known.get(reference)
        return adapter if adapter is not None and adapter.snapshot is not None else None

    async def hold(self, model: Adapter) -> LoadedAdapter:
        """The adapter, added if need be, in use until `give_back`.

        Raises AdapterRefused, EngineDied and what the fetch raises.
        """
        adapter = self._known.get(model.reference)
        if adapter is None:
            adapter = LoadedAdapter(model, next(_numbers), self._clock())
            self._known[model.reference] = adapter
            adapter.loading = asyncio.create_task(self._load(adapter))
            adapter.loading.add_done_callback(lambda done: done.cancelled() or done.exception())
        adapter.users += 1
        loading = adapter.loading
        try:
            if loading is not None:
                # Shielded: others may wait for the same.
                await asyncio.shield(loading)
        except BaseException as error:
            self.give_back(adapter)
            task = asyncio.current_task()
            if isinstance(error, asyncio.CancelledError) and task is not None and not task.cancelling():
                # Not the request was cancelled but the load, together with its engine.
                raise EngineDied(
                    f"The engine of '{model.name}' ended while the adapter was added. Send it again.",
                    retry_after=1,
                ) from error
            raise
        return adapter

    def give_back(self, adapter: LoadedAdapter) -> None:
        """A request no longer uses it."""
        adapter.users -= 1
        adapter.last_used = self._clock()
        if not adapter.users and len(self._known) > self._limit and self._tidying is None:
            self._tidying = asyncio.create_task(self._make_room())
            self._tidying.add_done_callback(self._tidied)

    def _tidied(self, tidying: asyncio.Task[None]) -> None:
        self._tidying = None
        if not tidying.cancelled() and (error := tidying.exception()) is not None:
            logger.warning("adapters not removed: %s", error)

    async def remove(self, reference: str) -> bool:
        """Remove an unused adapter; False if there is none or it is in use."""
        adapter = self.get(reference)
        if adapter is None or adapter.users:
            return False
        await self._forget(adapter)
        return True

    def names(self) -> set[str]:
        """The models whose adapters the engine has."""
        return {adapter.model.name for adapter in self._known.values() if adapter.snapshot is not None}

    def models(self) -> list[Adapter]:
        """Every adapter that the engine has."""
        return [adapter.model for adapter in self._known.values() if adapter.snapshot is not None]

    def close(self) -> None:
        """The engine is gone or holds other weights, and its adapters are gone with it."""
        if self._tidying is not None:
            self._tidying.cancel()
        for adapter in self._known.values():
            if adapter.loading is not None:
                adapter.loading.cancel()
            if adapter.snapshot is not None:
                self._release(adapter.snapshot)
                adapter.snapshot = None
        self._known.clear()

    def describe(self) -> list[dict[str, Any]]:
        """For /admin/stats."""
        now = self._clock()
        return [
            {
                "model": adapter.model.name,
                "revision": adapter.model.revision,
                "rank": adapter.model.rank,
                "leases": adapter.users,
                "idle_seconds": None if adapter.users else round(now - adapter.last_used, 3),
            }
            for adapter in self._known.values()
            if adapter.snapshot is not None
        ]

    async def _load(self, adapter: LoadedAdapter) -> None:
        name = adapter.model.name
        snapshot = None
        try:
            snapshot, phases = await self._take(adapter.model)
            phases.enter(Phase.WEIGHTS)
            await self._engine.add_adapter(adapter.served_name, adapter.number, snapshot)
        except BaseException as error:
            if self._known.get(adapter.model.reference) is adapter:
                del self._known[adapter.model.reference]
            if snapshot is not None:
                self._release(snapshot)
            if isinstance(error, AdapterRefused):
                message = f"The engine does not take the adapter '{name}': {error.message}"
                raise AdapterRefused(message, param="model") from error
            raise
        adapter.snapshot, adapter.loading = snapshot, None
        phases.enter(None)
        self._added(adapter.model, phases)
        await self._make_room()

    async def _make_room(self) -> None:
        while len(self._known) > self._limit:
            idle = [each for each in self._known.values() if self._may_go(each)]
            if not idle:
                return  # the engine reads adapters beyond its memory from the disk whenever they are used
            await self._forget(min(idle, key=lambda each: each.last_used))

    def _may_go(self, adapter: LoadedAdapter) -> bool:
        return not adapter.users and adapter.snapshot is not None and not self._pinned(adapter.model)

    async def _forget(self, adapter: LoadedAdapter) -> None:
        logger.info("adapter removed", extra={"model": adapter.model.name})
        # Out of sight first: a request that needs it from now on adds it again, under another name.
        del self._known[adapter.model.reference]
        snapshot, adapter.snapshot = adapter.snapshot, None
        try:
            await self._engine.remove_adapter(adapter.served_name)
        except EngineError as error:
            logger.warning("adapter not removed: %s", error, extra={"model": adapter.model.name})
        finally:
            if snapshot is not None:
                self._release(snapshot)
