"""Fetches ahead of the engine: a model's files are on their way from the moment that somebody waits for it.

Whatever serves until then goes on serving. Owns each fetched snapshot until a slot takes it, or until nobody
waits for it any more.
"""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from inference_service.engines.base import Snapshot
from inference_service.pool.phases import Phase, Phases
from inference_service.storage.model import Model

FetchModel = Callable[[Model, Callable[[str], None]], Awaitable[Snapshot]]


@dataclass(eq=False)
class Fetch:
    """One model's files on their way, or there; `taken` by a slot, or `dropped`."""

    model: Model
    phases: Phases
    task: asyncio.Task[Snapshot]
    taken: bool = False
    dropped: bool = False

    @property
    def fetched(self) -> bool:
        return self.task.done() and not self.task.cancelled() and self.task.exception() is None


class Fetches:
    """At most one a model reference. `ended` is told of each that ends untaken, with its error if any."""

    def __init__(
        self,
        fetch: FetchModel,
        release: Callable[[Snapshot], None],
        clock: Callable[[], float],
        ended: Callable[[Model, Exception | None], None],
    ) -> None:
        self._fetch = fetch
        self._release = release
        self._clock = clock
        self._ended = ended
        self._under_way: dict[str, Fetch] = {}

    def begin(self, model: Model) -> Fetch:
        """The fetch of the model, a new one unless there is one."""
        fetch = self._under_way.get(model.reference)
        if fetch is None:
            phases = Phases(self._clock)
            phases.enter(Phase.LIST)
            work = self._fetch(model, lambda phase: phases.enter(Phase(phase)))
            fetch = Fetch(model, phases, asyncio.ensure_future(_awaited(work)))
            self._under_way[model.reference] = fetch
            fetch.task.add_done_callback(lambda _: self._done(fetch))
        return fetch

    def get(self, reference: str) -> Fetch | None:
        return self._under_way.get(reference)

    def is_there(self, reference: str) -> bool:
        """The model's files are there, and nobody has taken them yet."""
        fetch = self._under_way.get(reference)
        return fetch is not None and fetch.fetched

    def is_under_way(self, reference: str) -> bool:
        """The model's files are being fetched."""
        fetch = self._under_way.get(reference)
        return fetch is not None and not fetch.fetched

    async def take(self, model: Model) -> tuple[Snapshot, Phases]:
        """The model's snapshot, which is the caller's to release then; raises what the fetch raised."""
        fetch = self.begin(model)
        try:
            snapshot = await fetch.task
        except asyncio.CancelledError:
            self.drop(model.reference)
            raise
        fetch.taken = True
        self._under_way.pop(model.reference, None)
        return snapshot, fetch.phases

    def drop(self, reference: str) -> None:
        """Nobody waits for it any more."""
        fetch = self._under_way.pop(reference, None)
        if fetch is None:
            return
        fetch.dropped = True
        if fetch.fetched:
            self._release(fetch.task.result())
        else:
            fetch.task.cancel()

    def close(self) -> None:
        for reference in list(self._under_way):
            self.drop(reference)

    def _done(self, fetch: Fetch) -> None:
        fetch.phases.enter(None)
        error = None if fetch.task.cancelled() else fetch.task.exception()
        if fetch.taken or fetch.dropped:
            return
        if not fetch.fetched:
            self._under_way.pop(fetch.model.reference, None)
        self._ended(fetch.model, error if isinstance(error, Exception) else None)


async def _awaited(work: Awaitable[Snapshot]) -> Snapshot:
    return await work
