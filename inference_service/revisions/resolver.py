"""From the name in a request to a lease: which revision it means, and which serves if that one cannot."""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from functools import partial
from typing import TypeVar

from inference_service.errors import ModelNotServable, ObjectReplaced, ServiceError
from inference_service.pool.leases import Lease
from inference_service.pool.pool import Pool, Superseded
from inference_service.revisions.rollout import Rollout
from inference_service.storage.model import Adapter, AnyModel, Model, Requested, Unservable
from inference_service.storage.registry import Registry

_T = TypeVar("_T")
logger = logging.getLogger(__name__)

# How often another revision may take over between a request and its lease.
LEASE_ATTEMPTS = 5
NOT_LOADED = "not loaded: %s"


class Resolver:
    """Finds models by the names that clients use, and gets them engines."""

    def __init__(self, registry: Registry, pool: Pool, rollout: Rollout) -> None:
        self._registry = registry
        self._pool = pool
        self._rollout = rollout

    async def find(self, name: str) -> Requested[AnyModel]:
        """The bucket's model of that name, servable or not; raises ModelNotFound and StoreError."""
        return await _listed_again(lambda: self._registry.find(name))

    async def resolve(self, name: str) -> Requested[Model]:
        """The revision that serves the name; raises as `find` does, ModelNotServable and DiskFull."""
        return await _listed_again(lambda: self._resolve(name))

    def meant(self, requested: Requested[AnyModel]) -> AnyModel:
        """The revision that the name stands for now, loaded or not."""
        return self._rollout.meant(requested)

    async def lease(self, name: str, arrived: float, resolved: Callable[[Model], None]) -> Lease:
        """A lease on the engine that serves the name; on an older revision's if the newest fails.

        `arrived`: when the request came, in monotonic seconds. `resolved` is called with the model before its
        engine is waited for. Raises as `resolve` and Pool.lease do.
        """
        requested = await self.resolve(name)
        resolved(requested.model)
        for _ in range(LEASE_ATTEMPTS):
            waited = time.monotonic() - arrived
            try:
                lease = await self._pool.lease(requested.model, waited, exact=requested.exact)
            except Superseded:
                requested = await self.resolve(requested.name)
            except ServiceError as error:
                requested = await self._instead(requested, error)
            else:
                self._rollout.served(requested)
                return lease
        raise ObjectReplaced(
            f"The model '{requested.model.name}' changes faster than it can be loaded. Try again.",
            retry_after=5,
        )

    async def load(self, requested: Requested[Model]) -> None:
        """Returns once the model's engine is ready; raises the error of its load."""
        for attempt in range(LEASE_ATTEMPTS):
            try:
                # Shielded: others may wait for the same load.
                await asyncio.shield(self._pool.operator_load(requested.model))
                break
            except Superseded:
                if attempt == LEASE_ATTEMPTS - 1:
                    raise
                requested = await self.resolve(requested.name)
        self._rollout.served(requested)

    def load_soon(self, model: Model) -> None:
        """Start to load the model; an error of the load is logged. Raises if the load is refused at once."""
        self._pool.operator_load(model).add_done_callback(partial(_log_failure, model.name))

    async def load_or_log(self, name: str) -> None:
        """Load the model of that name; an error is logged."""
        try:
            await self.load(await self.resolve(name))
        except ServiceError as error:
            logger.error(NOT_LOADED, error, extra={"model": name})

    async def _instead(self, requested: Requested[Model], error: ServiceError) -> Requested[Model]:
        """What serves instead of a model whose load failed with `error`; raises `error` if nothing does."""
        model = requested.model
        failed = _failed(model, error)
        if isinstance(error, ObjectReplaced):
            if requested.exact:
                raise error
            self._rollout.lost(failed)
            return await self.resolve(model.name)
        if requested.exact and failed is model:
            raise error
        older = await self._rollout.older_than(failed, error)
        if older is None:
            raise error
        return Requested(older) if failed is model else await self.resolve(requested.name)

    async def _resolve(self, name: str) -> Requested[Model]:
        requested = await self._registry.find(name)
        model = self._rollout.meant(requested)
        # A loaded model is served even while the bucket cannot be reached.
        live = self._live(model)
        if live is not None:
            return Requested(live, requested.exact)
        if isinstance(model, Unservable) or (
            isinstance(model, Adapter) and isinstance(model.base, Unservable)
        ):
            await self._registry.catalog.look_again()  # its upload may have ended since it was listed
            requested = await self._registry.find(name)
            model = self._rollout.meant(requested)
        if isinstance(model, Adapter) and await self._has_older(model.base):
            requested = await self._registry.find(name)
            model = self._rollout.meant(requested)
        try:
            return Requested(await self._registry.examine(model), requested.exact)
        except ModelNotServable as error:
            older = None if requested.exact else await self._rollout.older_than(model, error)
            if older is None:
                raise
            return Requested(older)

    def _live(self, model: AnyModel) -> Model | None:
        """The model if an engine serves it, also if it could not be loaded again as it is listed now."""
        if not isinstance(model, Unservable):
            return model if self._pool.is_live(model) else None
        same = (live for live in self._pool.live(model.name) if live.revision == model.revision)
        return next(same, None)

    async def _has_older(self, base: AnyModel) -> bool:
        """Whether an older revision of an adapter's base serves, because the newest cannot be served."""
        try:
            await self._registry.examine(base)
        except ModelNotServable as error:
            return await self._rollout.older_than(base, error) is not None
        return False


async def _listed_again(ask: Callable[[], Awaitable[_T]]) -> _T:
    """The answer, asked again if an object was replaced since it was listed: that lists the bucket again."""
    try:
        return await ask()
    except ObjectReplaced:
        return await ask()


def _failed(model: Model, error: ServiceError) -> Model:
    """The model whose load failed: this one, or an adapter's base."""
    of_base = isinstance(model, Adapter) and error.reference == model.engine_model.reference
    return model.engine_model if of_base else model


def _log_failure(name: str, load: asyncio.Task[None]) -> None:
    if not load.cancelled() and (error := load.exception()) is not None:
        logger.error(NOT_LOADED, error, extra={"model": name})
