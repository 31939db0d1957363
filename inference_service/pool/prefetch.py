"""Fetches ahead of the engine: a model's files are fetched as soon as a request waits for it.

Engines go on serving meanwhile. Owns each fetched snapshot until a slot takes it, or until no request waits
for it.
"""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from inference_service.checkpoints.snapshot import Snapshot
from inference_service.errors import LoadTimedOut
from inference_service.pool.phases import Phase, Phases
from inference_service.storage.model import Model

FetchModel = Callable[[Model, Callable[[str], None]], Awaitable[Snapshot]]


@dataclass(eq=False)
class Fetch:
    """One model's fetch, in progress or done; `taken` by an engine, or `dropped`; `takers` wait for it."""

    model: Model
    phases: Phases
    task: asyncio.Task[Snapshot]
    takers: int = 0
    kept_until: float = 0.0
    taken: bool = False
    dropped: bool = False

    @property
    def fetched(self) -> bool:
        return self.task.done() and not self.task.cancelled() and self.task.exception() is None


class Prefetcher:
    """At most one per model reference.

    `seconds`: the limit of one. `ended` is called for each that ends by itself and that no slot is about to
    take, with its error if any. `wanted`: whether a request waits for a reference; `dropped` is called with
    one that no request waits for any more.
    """

    def __init__(
        self,
        fetch: FetchModel,
        release: Callable[[Snapshot], None],
        *,
        clock: Callable[[], float],
        ended: Callable[[Model, Exception | None], None],
        wanted: Callable[[str], bool],
        dropped: Callable[[str], None] = lambda reference: None,
        seconds: float,
    ) -> None:
        self._fetch = fetch
        self._release = release
        self._clock = clock
        self._ended = ended
        self._wanted = wanted
        self._dropped = dropped
        self._seconds = seconds
        self._under_way: dict[str, Fetch] = {}

    def begin(self, model: Model) -> Fetch:
        """The fetch of the model, a new one unless there is one."""
        fetch = self._under_way.get(model.reference)
        if fetch is None:
            phases = Phases(self._clock)
            phases.enter(Phase.LIST)
            work = self._fetch(model, lambda phase: phases.enter(Phase(phase)))
            fetch = Fetch(model, phases, asyncio.create_task(self._in_time(model, work)))
            self._under_way[model.reference] = fetch
            fetch.task.add_done_callback(lambda _: self._done(fetch))
        return fetch

    def get(self, reference: str) -> Fetch | None:
        return self._under_way.get(reference)

    def is_there(self, reference: str) -> bool:
        """The model's files are fetched and not taken yet."""
        fetch = self._under_way.get(reference)
        return fetch is not None and fetch.fetched

    def is_under_way(self, reference: str) -> bool:
        """The model's files are being fetched."""
        fetch = self._under_way.get(reference)
        return fetch is not None and not fetch.fetched

    def snapshot(self, reference: str) -> Snapshot | None:
        """The model's snapshot, if it is fetched and not taken yet; the prefetcher keeps it."""
        fetch = self._under_way.get(reference)
        return fetch.task.result() if fetch is not None and fetch.fetched else None

    async def take(self, model: Model) -> tuple[Snapshot, Phases]:
        """The model's snapshot, which the caller releases; raises the fetch's error."""
        while True:
            fetch = self.begin(model)
            fetch.takers += 1
            try:
                await asyncio.wait({fetch.task})  # a cancellation does not reach the task
            except asyncio.CancelledError:
                fetch.takers -= 1
                if not (fetch.takers or fetch.taken or self._wanted(model.reference)):
                    self._drop(fetch)
                raise
            fetch.takers -= 1
            # If another taker was faster: each needs a hold of its own.
            if not (fetch.taken or fetch.dropped):
                snapshot = fetch.task.result()
                fetch.taken = True
                self._forget(fetch)
                return snapshot, fetch.phases

    def keep(self, reference: str, seconds: float) -> None:
        """Keep it for this long although no request waits for it."""
        fetch, loop = self._under_way.get(reference), asyncio.get_running_loop()
        if fetch is not None:
            fetch.kept_until = max(fetch.kept_until, loop.time() + seconds)
            loop.call_at(fetch.kept_until, self.drop, reference)

    def drop(self, reference: str) -> None:
        """Drop it, unless a request waits for it, a slot is about to take it, or `keep` holds it."""
        fetch = self._under_way.get(reference)
        if fetch is None or fetch.takers or self._wanted(reference):
            return
        if fetch.kept_until <= asyncio.get_running_loop().time():
            self._drop(fetch)

    def close(self) -> None:
        for fetch in list(self._under_way.values()):
            self._drop(fetch)

    def _drop(self, fetch: Fetch) -> None:
        self._forget(fetch)
        self._dropped(fetch.model.reference)
        fetch.dropped = True
        if fetch.fetched:
            self._give_back(fetch)
        else:
            fetch.task.cancel()

    def _give_back(self, fetch: Fetch) -> None:
        if not fetch.taken:
            fetch.taken = True
            self._release(fetch.task.result())

    def _forget(self, fetch: Fetch) -> None:
        if self._under_way.get(fetch.model.reference) is fetch:
            del self._under_way[fetch.model.reference]

    def _done(self, fetch: Fetch) -> None:
        fetch.phases.enter(None)
        if fetch.dropped and fetch.fetched:  # it was done just when it was cancelled
            self._give_back(fetch)
        if not fetch.fetched:
            self._forget(fetch)
        if fetch.dropped or fetch.task.cancelled():
            return
        error = fetch.task.exception()
        if not fetch.takers or self._wanted(fetch.model.reference):
            self._ended(fetch.model, error if isinstance(error, Exception) else None)

    async def _in_time(self, model: Model, work: Awaitable[Snapshot]) -> Snapshot:
        try:
            async with asyncio.timeout(self._seconds):
                return await work
        except TimeoutError as error:
            raise LoadTimedOut(
                f"The files of '{model.name}' did not arrive within {self._seconds:g} s (LOAD_TIMEOUT)."
            ) from error
