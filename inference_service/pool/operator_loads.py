"""The operator's loads: models that are loaded although no request waits for them."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

from inference_service.pool.leases import Lease
from inference_service.storage.model import Model


class OperatorLoads:
    """At most one per model.

    `ask` gets a lease for a model, perhaps in place of the engine of a reference. `is_live`: whether an
    engine serves the model, so that no lease is needed.
    """

    def __init__(
        self, ask: Callable[[Model, str | None], Awaitable[Lease]], is_live: Callable[[Model], bool]
    ) -> None:
        self._ask = ask
        self._is_live = is_live
        self._under_way: dict[str, asyncio.Task[None]] = {}
        self._ready: dict[str, asyncio.Future[None]] = {}

    def get(self, reference: str) -> asyncio.Task[None] | None:
        return self._under_way.get(reference)

    def begin(self, model: Model, instead_of: str | None) -> asyncio.Task[None]:
        """The task is done once the model's engine is ready, or raises what its load raised."""
        load = asyncio.create_task(self._until_ready(model, instead_of))
        self._under_way[model.reference] = load
        load.add_done_callback(lambda done: self._ended(model.reference, done))
        return load

    def loaded(self, reference: str) -> None:
        """An engine is ready: its load does not wait for a lease on it."""
        ready = self._ready.get(reference)
        if ready is not None and not ready.done():
            ready.set_result(None)

    async def _until_ready(self, model: Model, instead_of: str | None) -> None:
        if self._is_live(model):
            return
        ready = self._ready[model.reference] = asyncio.get_running_loop().create_future()
        asked = asyncio.ensure_future(self._ask(model, instead_of))
        either: set[asyncio.Future[Any]] = {asked, ready}
        try:
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
            if asked.done():
                asked.result().release()
        finally:
            del self._ready[model.reference]
            asked.cancel()

    def _ended(self, reference: str, load: asyncio.Task[None]) -> None:
        del self._under_way[reference]
        if not load.cancelled():
            load.exception()  # the operator's request may be gone
