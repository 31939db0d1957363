"""Which revision a model's plain name means, and how a new one takes over from the one that serves.

A new revision is fetched, verified and loaded while the old one serves; if anything fails, the old one goes
on serving. A revision that was rejected, or rolled back by the operator, is not tried again.
"""

import asyncio
import logging
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
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
from inference_service.storage.bucket.model import ListedModel
from inference_service.storage.model import Adapter, AnyModel, Checkpoint, Model, Requested, Unservable
from inference_service.storage.registry import Registry

logger = logging.getLogger(__name__)

MIN_POLL_INTERVAL = 0.3
KEPT = 16
ROLLED_BACK = "rolled back by the operator"
# The revision itself is at fault; any other error may be gone at the next poll.
_ITS_FAULT = (EngineStartFailed, SnapshotCorrupt, AdapterRefused, ModelNotServable)
_NOT_ITS_FAULT = (EngineKilled, LoadTimedOut)


@dataclass(eq=False)
class _Line:
    """The revisions of one model: the one that serves, those before it, and the rejected ones with the
    reason.

    `candidate` is about to take over; `problem` is what prevents that for now. `seen`: the bucket's newest
    revision at the last poll.
    """

    serving: AnyModel
    before: list[AnyModel] = field(default_factory=list)
    rejected: dict[str, str] = field(default_factory=dict)
    candidate: AnyModel | None = None
    problem: str | None = None
    seen: str | None = None
    # One rollout at a time.
    turn: asyncio.Lock = field(default_factory=asyncio.Lock)

    def reject(self, revision: str, reason: str) -> None:
        self.rejected[revision] = reason
        while len(self.rejected) > KEPT:
            del self.rejected[next(iter(self.rejected))]

    def take_over(self, model: AnyModel) -> None:
        """`model` serves from now on."""
        if self.serving.revision != model.revision and self.serving.revision not in self.rejected:
            self.before = [each for each in self.before if each.revision != self.serving.revision]
            self.before = [*self.before, self.serving][-KEPT:]
        self.before = [each for each in self.before if each.revision != model.revision]
        self.rejected.pop(model.revision, None)
        self.serving = model


class Rollout:
    """The revisions of all models that have served; polls the bucket for new ones."""

    def __init__(self, pool: Pool, registry: Registry, metrics: Metrics, poll_interval: float) -> None:
        self._pool = pool
        self._registry = registry
        self._metrics = metrics
        self._poll_interval = max(MIN_POLL_INTERVAL, poll_interval)
        self._lines: dict[str, _Line] = {}
        self._rolling: set[asyncio.Task[None]] = set()

    def meant(self, requested: Requested[AnyModel]) -> AnyModel:
        """The revision that serves a request: the bucket's newest, or the one that still serves its name."""
        newest = requested.model
        if isinstance(newest, Adapter):
            newest = newest.on(self._base_of(newest, newest.base))
        return newest if requested.exact else self._meant_by_name(newest)

    def _meant_by_name(self, newest: AnyModel) -> AnyModel:
        line = self._lines.get(newest.name)
        if line is None:
            return newest
        serving = self._placed(line.serving, newest)
        if line.candidate is not None and not self._admits(serving):
            return line.candidate
        if newest.revision == serving.revision:
            return serving
        wrong = isinstance(newest, Unservable) or newest.revision in line.rejected
        return serving if wrong or self._admits(serving) else newest

    def serving_revision(self, newest: ListedModel) -> str:
        """The revision that a plain name means, for a listing: starts nothing."""
        line = self._lines.get(newest.name)
        if line is None:
            return newest.revision
        wrong = newest.unservable is not None or newest.revision in line.rejected
        return line.serving.revision if wrong or self._admits(line.serving) else newest.revision

    def served(self, requested: Requested[Model]) -> None:
        """The model serves: its plain name means this revision until another takes over."""
        model = requested.model
        if isinstance(model, Adapter):
            self._follow(model.engine_model)
        if not requested.exact:
            self._follow(model)

    def _follow(self, model: Model) -> None:
        line = self._lines.get(model.name)
        if line is None:
            self._lines[model.name] = _Line(model)
        elif line.candidate is None and line.serving.reference != model.reference:
            self._replace_lost(line, model)

    def _replace_lost(self, line: _Line, model: Model) -> None:
        """Another revision was loaded; a lease granted just before a rollout must not undo it."""
        if not self._admits(self._placed(line.serving, model)):
            line.take_over(model)

    async def older_than(self, model: AnyModel, error: ServiceError) -> Model | None:
        """The revision that serves instead of `model`, which failed with `error`; None if none does.

        If none has served since the service started: the one on the disk that served last.
        """
        if not _at_fault(model, error):
            return None
        if model.name not in self._lines:
            kept = await self._registry.kept_instead(model.described)
            if kept is not None:
                self._lines.setdefault(model.name, _Line(kept))
        line = self._lines.get(model.name)
        if line is None or line.serving.revision == model.revision:
            return None
        self._reject(line, model, error)
        older = self._placed(line.serving, model)
        return None if isinstance(older, Unservable) else older

    def _placed(self, serving: AnyModel, newest: AnyModel) -> AnyModel:
        """The serving revision with its own base's engine: the newest's view of it, if they share it."""
        if not isinstance(serving, Adapter):
            return serving
        same = isinstance(newest, Adapter) and newest.base.name == serving.base.name
        base = newest.base if isinstance(newest, Adapter) and same else serving.base
        return serving.on(self._base_of(serving, base))

    def lost(self, model: Model) -> None:
        """The files of a revision are neither in the bucket nor on the disk any more."""
        line = self._lines.get(model.name)
        if line is not None and line.serving.revision == model.revision and line.candidate is None:
            del self._lines[model.name]

    async def rollback(self, newest: AnyModel) -> AnyModel:
        """Go back to the previous revision whose snapshot is on the disk; returns it once it serves.

        Raises NoPreviousRevision, and what its load raises.
        """
        line = self._lines.setdefault(newest.name, _Line(newest))
        asked = line.serving
        async with line.turn:
            current = line.serving
            if current is not asked and asked.revision in line.rejected:
                return current  # another rollback came first
            previous = await self._previous(line, newest)
            await self._roll(line, previous)
            self._metrics.rollouts.labels(newest.name, "rolled_back").inc()
            line.before = [each for each in line.before if each.revision != current.revision]
            line.reject(current.revision, ROLLED_BACK)
        logger.info("rolled back", extra=_of(previous))
        return line.serving

    async def watch(self) -> None:
        """Poll for new revisions of loaded models, until cancelled."""
        while True:
            await asyncio.sleep(self._poll_interval)
            try:
                await self._look_at_all()
            except StoreError as error:
                logger.warning("cannot poll for new revisions: %s", error)
            except Exception:
                logger.exception("cannot poll for new revisions")

    async def close(self) -> None:
        """Cancel all rollouts in progress."""
        for task in self._rolling:
            task.cancel()
        await asyncio.gather(*self._rolling, return_exceptions=True)

    def describe(self) -> dict[str, dict[str, Any]]:
        """For /admin/stats: models with more than one revision."""
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
            with suppress(ServiceError):  # requests for the model report it
                newest = (await self._registry.find(name)).model
                if name in self._lines:
                    self._look(self._lines[name], newest)

    def _look(self, line: _Line, newest: AnyModel) -> None:
        """Start the rollout of a new revision that has stayed the same since the last poll."""
        settled, line.seen = line.seen == newest.revision, newest.revision
        if newest.revision == line.serving.revision:
            line.problem = None
        elif isinstance(newest, Unservable):
            line.problem = f"revision {newest.revision}: {newest.reason}"
        elif settled and newest.revision not in line.rejected and line.candidate is None:
            self._begin(line, newest)

    def _begin(self, line: _Line, newest: AnyModel) -> None:
        line.candidate = newest
        task = asyncio.create_task(self._roll_or_log(line, newest))
        self._rolling.add(task)
        task.add_done_callback(self._rolling.discard)

    async def _roll_or_log(self, line: _Line, newest: AnyModel) -> None:
        try:
            async with line.turn:
                if newest.revision not in line.rejected:
                    old = line.serving.revision
                    await self._roll(line, newest)
                    if old != newest.revision:  # else only its engine was replaced, for an adapter
                        self._metrics.rollouts.labels(newest.name, "ok").inc()
        except ServiceError as error:
            logger.error("revision %s does not take over: %s", newest.revision, error, extra=_of(newest))
            if _at_fault(newest, error):
                self._reject(line, newest, error)
            else:
                line.problem = f"revision {newest.revision}: {error.message}"
            if not isinstance(error, EngineUnloaded):  # else the operator has unloaded it
                await self._restore(line)
        finally:
            line.candidate = None

    async def _roll(self, line: _Line, newest: AnyModel) -> None:
        """Let `newest` take over; raises the error that prevents it."""
        with _candidate(line, newest):
            model = await self._registry.examine(newest)
            if isinstance(model, Adapter):
                placed = model.on(self._base_of(model, model.base))
                (await self._pool.lease(placed)).release()
            else:
                same = model.revision == line.serving.revision
                what = "an engine with more room for adapters" if same else "another revision"
                logger.info("loading %s", what, extra={**_of(model), "instead_of": line.serving.revision})
                snapshot = await self._registry.fetch(model)
                try:
                    await asyncio.shield(self._pool.operator_load(model, instead_of=line.serving.reference))
                finally:
                    self._registry.release(snapshot)
            old = line.serving
            line.take_over(model)
            line.problem = None
        if old.reference != model.reference:
            self._pool.retire(old.reference)
        logger.info("took over", extra={**_of(model), "instead_of": old.revision})

    async def _restore(self, line: _Line) -> None:
        """Load the serving revision again if its engine was replaced."""
        serving = line.serving
        if isinstance(serving, Checkpoint) and self._pool.state(serving.reference) is EngineState.STOPPED:
            try:
                await asyncio.shield(self._pool.operator_load(serving))
            except ServiceError as error:
                logger.error("not loaded again: %s", error, extra=_of(serving))

    def _reject(self, line: _Line, model: AnyModel, error: ServiceError) -> None:
        if model.revision not in line.rejected:
            self._metrics.rollouts.labels(model.name, "rejected").inc()
        line.reject(model.revision, error.message)

    def _base_of(self, adapter: Adapter, newest: Checkpoint | Unservable) -> Checkpoint | Unservable:
        """The base's engine for an adapter; a new one if the current one cannot take its rank."""
        meant = self._meant_by_name(newest)
        if isinstance(meant, Adapter):  # the name of the base was an adapter's before
            return newest
        if isinstance(meant, Unservable) or isinstance(newest, Unservable):
            return meant
        if meant.adapter_rank >= adapter.rank or newest.adapter_rank < adapter.rank:
            return meant
        wanted = meant.with_rank(newest.adapter_rank)
        line = self._lines.get(newest.name)
        if line is not None and line.candidate is None and self._admits(line.serving):
            self._begin(line, wanted)
        return wanted

    def _admits(self, model: AnyModel) -> bool:
        """Whether an engine serves this revision, or is about to."""
        if isinstance(model, Adapter):
            return isinstance(model.base, Checkpoint) and self._pool.adapter(model) is not None
        return self._pool.state(model.reference) in (EngineState.READY, EngineState.STARTING)

    async def _previous(self, line: _Line, newest: AnyModel) -> AnyModel:
        known = [each.revision for each in reversed(line.before)]
        kept = await self._registry.kept_revisions(newest.name)
        unwanted = {line.serving.revision, *line.rejected}
        for revision in dict.fromkeys([*known, *kept]):
            found = None if revision in unwanted else await self._registry.kept(newest.described, revision)
            if found is not None:
                return found
        others = [revision for revision in kept if revision in line.rejected]
        there = f" On the disk, but rejected or rolled back: {', '.join(others)}." if others else ""
        raise NoPreviousRevision(
            f"No previous revision of '{newest.name}' is on the disk; the current one is "
            f"{line.serving.revision}.{there} Upload the revision that you want; it takes over by itself.",
            param="model",
        )


def _at_fault(model: AnyModel, error: ServiceError) -> bool:
    """Whether this revision would fail again; an adapter is not at fault for its base."""
    own = error.reference in (None, model.reference)
    return own and isinstance(error, _ITS_FAULT) and not isinstance(error, _NOT_ITS_FAULT)


@contextmanager
def _candidate(line: _Line, model: AnyModel) -> Iterator[None]:
    line.candidate = model
    try:
        yield
    finally:
        line.candidate = None


def _of(model: AnyModel) -> dict[str, str]:
    return {"model": model.name, "revision": model.revision}
