"""Which revision a model's plain name means, and how a new one takes over from the one that serves.

A new revision is fetched, verified and loaded while the old one serves; whatever fails on that way leaves the
old one serving. What was rejected, or rolled back by the operator, is not tried again.
"""

import asyncio
import logging
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import Any

from inference_service.errors import (
    AdapterRefused,
    EngineKilled,
    EngineStartFailed,
    EngineUnloaded,
    LoadTimedOut,
    ModelNotServable,
    NoPreviousRevision,
    ServiceError,
    SnapshotCorrupt,
    StoreError,
)
from inference_service.metrics import Metrics
from inference_service.pool.pool import Pool
from inference_service.scheduler.state import EngineState
from inference_service.storage.bucket.model import Model
from inference_service.storage.registry import Registry

logger = logging.getLogger(__name__)

MIN_POLL_INTERVAL = 0.3
KEPT = 16
ROLLED_BACK = "rolled back by the operator"
# The revision itself is at fault; everything else may be better at the next look.
_ITS_FAULT = (EngineStartFailed, SnapshotCorrupt, AdapterRefused, ModelNotServable)
_NOT_ITS_FAULT = (EngineKilled, LoadTimedOut)


@dataclass(eq=False)
class _Line:
    """The revisions of one model: the one that serves, those before it, and what must not serve and why.

    `candidate` is on its way to take over; `problem` is what keeps it from that for now. `seen`: the bucket's
    newest at the last look.
    """

    serving: Model
    before: list[Model] = field(default_factory=list)
    rejected: dict[str, str] = field(default_factory=dict)
    candidate: Model | None = None
    problem: str | None = None
    seen: str | None = None
    # One takes over at a time.
    turn: asyncio.Lock = field(default_factory=asyncio.Lock)

    def reject(self, revision: str, reason: str) -> None:
        self.rejected[revision] = reason
        while len(self.rejected) > KEPT:
            del self.rejected[next(iter(self.rejected))]

    def take_over(self, model: Model) -> None:
        """`model` serves from now on."""
        if self.serving.revision != model.revision and self.serving.revision not in self.rejected:
            self.before = [each for each in self.before if each.revision != self.serving.revision]
            self.before = [*self.before, self.serving][-KEPT:]
        self.before = [each for each in self.before if each.revision != model.revision]
        self.rejected.pop(model.revision, None)
        self.serving = model


class Rollout:
    """The lines of all models that have served, and the watch over the bucket for their next revisions."""

    def __init__(self, pool: Pool, registry: Registry, metrics: Metrics, poll_interval: float) -> None:
        self._pool = pool
        self._registry = registry
        self._metrics = metrics
        self._poll_interval = max(MIN_POLL_INTERVAL, poll_interval)
        self._lines: dict[str, _Line] = {}
        self._rolling: set[asyncio.Task[None]] = set()

    def meant(self, newest: Model) -> Model:
        """The revision that serves a request for a plain name; `newest` is the bucket's."""
        if newest.base_model is not None:
            newest = replace(newest, base_model=self._base_model(newest, newest.base_model))
        line = self._lines.get(newest.name)
        if line is None or newest.exact:
            return newest
        serving = self._placed(line.serving, newest)
        if line.candidate is not None and not self._admits(serving):
            return line.candidate
        if newest.revision == serving.revision:
            return serving
        wrong = newest.unservable is not None or newest.revision in line.rejected
        return serving if wrong or self._admits(serving) else newest

    def serving_revision(self, newest: Model) -> str:
        """The revision that a plain name means, for a list: nothing is begun for it."""
        line = self._lines.get(newest.name)
        if line is None:
            return newest.revision
        wrong = newest.unservable is not None or newest.revision in line.rejected
        return line.serving.revision if wrong or self._admits(line.serving) else newest.revision

    def served(self, model: Model) -> None:
        """The model serves: what its plain name means until another revision has taken over."""
        if model.base_model is not None:
            self.served(model.base_model)
        if model.exact:
            return
        line = self._lines.get(model.name)
        if line is None:
            self._lines[model.name] = _Line(model)
        elif line.candidate is None and line.serving.reference != model.reference:
            self._follow(line, model)

    def _follow(self, line: _Line, model: Model) -> None:
        """Another revision was loaded; a lease that was granted just before a rollout is no way back."""
        if not self._admits(self._placed(line.serving, model)):
            line.take_over(model)

    async def older_than(self, model: Model, error: ServiceError) -> Model | None:
        """The revision that serves instead of `model`, which failed with `error`; None where none does.

        Where none has served since the service began: the one on the disk that served last.
        """
        if model.exact or not _at_fault(model, error):
            return None
        if model.name not in self._lines:
            kept = await self._registry.kept_instead(model)
            if kept is not None:
                self._lines.setdefault(model.name, _Line(kept))
        line = self._lines.get(model.name)
        if line is None or line.serving.revision == model.revision:
            return None
        self._reject(line, model, error)
        return self._placed(line.serving, model)

    def _placed(self, serving: Model, newest: Model) -> Model:
        """The serving revision with its own base's engine: the newest's view of it, if they share it."""
        if serving.base_model is None:
            return serving
        same = newest.base_model is not None and newest.base_model.name == serving.base_model.name
        base = newest.base_model if same and newest.base_model is not None else serving.base_model
        return replace(serving, base_model=self._base_model(serving, base))

    def lost(self, model: Model) -> None:
        """The files of a revision are neither in the bucket nor on the disk any more."""
        line = self._lines.get(model.name)
        if line is not None and line.serving.revision == model.revision and line.candidate is None:
            del self._lines[model.name]

    async def rollback(self, newest: Model) -> Model:
        """Go back to the previous revision whose snapshot is on the disk; returns it once it serves.

        Raises NoPreviousRevision, and what its load raises.
        """
        line = self._lines.setdefault(newest.name, _Line(newest))
        asked = line.serving
        async with line.turn:
            current = line.serving
            if current is not asked and asked.revision in line.rejected:
                return current  # another rollback was faster
            previous = await self._previous(line, newest)
            await self._roll(line, previous)
            self._metrics.rollouts.labels(newest.name, "rolled_back").inc()
            line.before = [each for each in line.before if each.revision != current.revision]
            line.reject(current.revision, ROLLED_BACK)
        logger.info("rolled back", extra=_of(previous))
        return line.serving

    async def watch(self) -> None:
        """Look for new revisions of what an engine holds, until cancelled."""
        while True:
            await asyncio.sleep(self._poll_interval)
            try:
                await self._look_at_all()
            except StoreError as error:
                logger.warning("no look for new revisions: %s", error)
            except Exception:
                logger.exception("no look for new revisions")

    async def close(self) -> None:
        """End what is under way."""
        for task in self._rolling:
            task.cancel()
        await asyncio.gather(*self._rolling, return_exceptions=True)

    def describe(self) -> dict[str, dict[str, Any]]:
        """As /admin/stats shows the lines: of models with more than one revision."""
        return {
            name: {
                "serving": line.serving.revision,
                "candidate": None if line.candidate is None else line.candidate.revision,
                "problem": line.problem,
                "previous": [each.revision for each in reversed(line.before)],
                "rejected": line.rejected,
            }
            for name, line in sorted(self._lines.items())
            if line.before or line.rejected or line.candidate or line.problem
        }

    async def _look_at_all(self) -> None:
        names = self._pool.names() & self._lines.keys()
        if names:
            await self._registry.catalog.models()
        for name in sorted(names):
            with suppress(ServiceError):  # what is wrong with it is told to whom asks for it
                newest = await self._registry.find(name)
                if name in self._lines:
                    self._look(self._lines[name], newest)

    def _look(self, line: _Line, newest: Model) -> None:
        """Begin what is to be begun: a new revision that has stayed the same since the last look."""
        settled, line.seen = line.seen == newest.revision, newest.revision
        if newest.revision == line.serving.revision:
            line.problem = None
        elif newest.unservable is not None:
            line.problem = f"revision {newest.revision}: {newest.unservable}"
        elif settled and newest.revision not in line.rejected and line.candidate is None:
            self._begin(line, newest)

    def _begin(self, line: _Line, newest: Model) -> None:
        line.candidate = newest
        task = asyncio.create_task(self._roll_or_log(line, newest))
        self._rolling.add(task)
        task.add_done_callback(self._rolling.discard)

    async def _roll_or_log(self, line: _Line, newest: Model) -> None:
        try:
            async with line.turn:
                if newest.revision not in line.rejected:
                    old = line.serving.revision
                    await self._roll(line, newest)
                    if old != newest.revision:  # else it has only made room for an adapter
                        self._metrics.rollouts.labels(newest.name, "ok").inc()
        except ServiceError as error:
            logger.error("revision %s does not take over: %s", newest.revision, error, extra=_of(newest))
            if _at_fault(newest, error):
                self._reject(line, newest, error)
            else:
                line.problem = f"revision {newest.revision}: {error.message}"
            if not isinstance(error, EngineUnloaded):  # else the operator wants it gone
                await self._restore(line)
        finally:
            line.candidate = None

    async def _roll(self, line: _Line, model: Model) -> None:
        """Let `model` take over; raises what keeps it from that."""
        with _candidate(line, model):
            await self._registry.examine(model)
            if model.base_model is not None:
                (await self._pool.lease(self._placed(model, model))).release()
            else:
                same = model.revision == line.serving.revision
                what = "an engine with more room for adapters" if same else "another revision"
                logger.info("loading %s", what, extra={**_of(model), "instead_of": line.serving.revision})
                snapshot = await self._registry.fetch(model)
                try:
                    await asyncio.shield(self._pool.order(model, instead_of=line.serving.reference))
                finally:
                    self._registry.release(snapshot)
            old = line.serving
            line.take_over(model)
            line.problem = None
        if old.reference != model.reference:
            self._pool.retire(old.reference)
        logger.info("took over", extra={**_of(model), "instead_of": old.revision})

    async def _restore(self, line: _Line) -> None:
        """What served until now serves again, where its engine had to go."""
        serving = line.serving
        if serving.base_model is None and self._pool.state(serving.reference) is EngineState.STOPPED:
            try:
                await asyncio.shield(self._pool.order(serving))
            except ServiceError as error:
                logger.error("not loaded again: %s", error, extra=_of(serving))

    def _reject(self, line: _Line, model: Model, error: ServiceError) -> None:
        if model.revision not in line.rejected:
            self._metrics.rollouts.labels(model.name, "rejected").inc()
        line.reject(model.revision, error.message)

    def _base_model(self, adapter: Model, newest: Model) -> Model:
        """The base's engine for an adapter; another one than serves, where that takes no such adapter."""
        meant = self.meant(newest)
        if meant.rank >= adapter.rank or newest.rank < adapter.rank:
            return meant
        wanted = replace(meant, rank=newest.rank)
        line = self._lines.get(newest.name)
        if line is not None and line.candidate is None and self._admits(line.serving):
            self._begin(line, wanted)
        return wanted

    def _admits(self, model: Model) -> bool:
        """Whether an engine serves this revision, or is about to."""
        if model.base_model is not None:
            return self._pool.adapter(model) is not None
        return self._pool.state(model.reference) in (EngineState.READY, EngineState.STARTING)

    async def _previous(self, line: _Line, newest: Model) -> Model:
        known = [each.revision for each in reversed(line.before)]
        kept = await self._registry.kept_revisions(newest.name)
        unwanted = {line.serving.revision, *line.rejected}
        for revision in dict.fromkeys([*known, *kept]):
            found = None if revision in unwanted else await self._registry.kept(newest, revision)
            if found is not None:
                return found
        others = [revision for revision in kept if revision in line.rejected]
        there = f" On the disk, but rejected or rolled back: {', '.join(others)}." if others else ""
        raise NoPreviousRevision(
            f"No previous revision of '{newest.name}' is on the disk; {line.serving.revision} serves "
            f"on.{there} Upload the one that you want, it takes over by itself.",
            param="model",
        )


def _at_fault(model: Model, error: ServiceError) -> bool:
    """Whether this revision would fail again; an adapter is not at fault for its base."""
    own = error.reference in (None, model.reference)
    return own and isinstance(error, _ITS_FAULT) and not isinstance(error, _NOT_ITS_FAULT)


@contextmanager
def _candidate(line: _Line, model: Model) -> Iterator[None]:
    line.candidate = model
    try:
        yield
    finally:
        line.candidate = None


def _of(model: Model) -> dict[str, str]:
    return {"model": model.name, "revision": model.revision}
