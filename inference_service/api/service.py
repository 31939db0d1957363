"""What the routes work with: the parts that app.py has built, and which relays are under way."""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Annotated, Any, Protocol

from fastapi import Depends, Request

from inference_service.api.process_stats import LoopLag
from inference_service.config import Backend, Settings
from inference_service.errors import (
    ModelNotServable,
    ObjectReplaced,
    RequestTimedOut,
    ServiceError,
    ShuttingDown,
)
from inference_service.machine.device import Device
from inference_service.metrics import Metrics
from inference_service.pool.leases import Lease
from inference_service.pool.pool import Pool, Superseded
from inference_service.revisions.rollout import Rollout
from inference_service.storage.bucket.catalog import Catalog
from inference_service.storage.bucket.model import Model
from inference_service.storage.registry import Registry

logger = logging.getLogger(__name__)

# So often another revision may come between a request and its engine.
LEASE_ATTEMPTS = 5
NOT_LOADED = "not loaded: %s"
# For the error events of what ends with the shutdown; who does not read his is not waited for.
LAST_EVENTS_SECONDS = 0.2


class UnderWay(Protocol):
    """A request under way, as far as a shutdown is concerned with it."""

    ended: asyncio.Future[None]

    def end_by(self, deadline: float) -> None:
        """End at `deadline` (the event loop's time) at the latest."""
        ...


@dataclass
class Service:
    """One running service."""

    settings: Settings
    device: Device
    backend: Backend
    registry: Registry
    pool: Pool
    rollout: Rollout
    metrics: Metrics
    loop_lag: LoopLag = field(default_factory=LoopLag)
    relays: set[UnderWay] = field(default_factory=set)
    stopping: bool = False
    _asking: set[asyncio.Task[Any] | None] = field(default_factory=set)

    async def resolve(self, name: str, spent: float = 0.0) -> Model:
        """The bucket's model for `name`, servable or loaded; `spent`: seconds of the request so far."""
        return await self._in_time(self._resolve(name), spent)

    async def find(self, name: str) -> Model:
        """As `resolve`, also for a model that cannot be served."""
        return await self._in_time(_as_listed(lambda: self.registry.find(name)))

    async def lease(self, model: Model, arrived: float) -> Lease:
        """A lease on the model's engine; on an older revision's, where this one turns out not to serve.

        `arrived`: when the request came, in monotonic seconds. Raises as Pool.lease does.
        """
        for _ in range(LEASE_ATTEMPTS):
            try:
                lease = await self.pool.lease(model, time.monotonic() - arrived)
            except Superseded:
                model = await self._resolve(model.asked_for)
            except ObjectReplaced as error:
                if model.exact:
                    raise
                self.rollout.lost(_failed(model, error))
                model = await self._resolve(model.name)
            except ServiceError as error:
                failed = _failed(model, error)
                older = await self.rollout.older_than(failed, error)
                if older is None:
                    raise
                model = older if failed is model else await self._resolve(model.asked_for)
            else:
                self.rollout.served(model)
                return lease
        raise ObjectReplaced(
            f"The model '{model.name}' changes faster than it can be loaded. Try again.", retry_after=5
        )

    async def _in_time(self, asking: Awaitable[Model], spent: float = 0.0) -> Model:
        """Within REQUEST_TIMEOUT also where the bucket is slow, and not beyond a shutdown."""
        task = asyncio.current_task()
        self._asking.add(task)
        try:
            async with asyncio.timeout(self.settings.request_timeout - spent):
                return await asking
        except TimeoutError as error:
            raise RequestTimedOut(self.settings.request_timeout) from error
        except asyncio.CancelledError:
            if not self.stopping or task is None:
                raise
            task.uncancel()
            raise ShuttingDown("The service is shutting down. Try again.", retry_after=5) from None
        finally:
            self._asking.discard(task)

    async def _resolve(self, name: str) -> Model:
        return await _as_listed(lambda: self._resolved(name))

    async def _resolved(self, name: str) -> Model:
        model = self.rollout.meant(await self.registry.find(name))
        # What is loaded is served, also while the bucket is away.
        if self.pool.is_live(model):
            return model
        if model.unservable is not None or (
            model.base_model is not None and model.base_model.unservable is not None
        ):
            await self.catalog.look_again()  # its upload may have ended since it was listed
            model = self.rollout.meant(await self.registry.find(name))
        if model.base_model is not None and await self._has_older(model.base_model):
            model = self.rollout.meant(await self.registry.find(name))
        try:
            await self.registry.examine(model)
        except ModelNotServable as error:
            older = await self.rollout.older_than(model, error)
            if older is None:
                raise
            return older
        return model

    async def _has_older(self, base: Model) -> bool:
        """Whether an older revision of an adapter's base is to serve instead of one that cannot be served."""
        try:
            await self.registry.examine(base)
        except ModelNotServable as error:
            return await self.rollout.older_than(base, error) is not None
        return False

    @property
    def catalog(self) -> Catalog:
        return self.registry.catalog

    def preload(self) -> list[asyncio.Task[None]]:
        """Load PRELOAD_MODELS, and those whose serving.json says so; the service is ready meanwhile."""
        slots = self.settings.max_cached_models
        named, rest = self.settings.preload_models[:slots], self.settings.preload_models[slots:]
        if rest:
            message = "not preloaded, for there are only %s engines (MAX_CACHED_MODELS): %s"
            logger.warning(message, slots, ", ".join(rest))
        loading = [asyncio.create_task(self._load_or_log(name)) for name in named]
        return [*loading, asyncio.create_task(self._preload_wished(slots - len(named)))]

    async def _preload_wished(self, slots: int) -> None:
        try:
            models = await self.catalog.described()
        except ServiceError as error:
            logger.error("the bucket cannot be listed: %s", error)
            return
        wished = [model.name for model in models if model.serving.preload and model.unservable is None]
        others = [name for name in wished if name not in self.settings.preload_models]
        await asyncio.gather(*(self._load_or_log(name) for name in others[: max(0, slots)]))

    async def _load_or_log(self, name: str) -> None:
        try:
            await self.load(await self._resolve(name))
        except ServiceError as error:
            logger.error(NOT_LOADED, error, extra={"model": name})

    def load_soon(self, model: Model) -> None:
        """Begin to load the model; what its load raises is in the log. Raises what refuses it at once."""
        self.pool.order(model).add_done_callback(partial(_log_failure, model.name))

    async def load(self, model: Model) -> None:
        """Returns once the model's engine is ready; raises what its load raised."""
        for attempt in range(LEASE_ATTEMPTS):
            try:
                # Shielded: others may wait for the same.
                await asyncio.shield(self.pool.order(model))
                break
            except Superseded:
                if attempt == LEASE_ATTEMPTS - 1:
                    raise
                model = await self._resolve(model.asked_for)
        self.rollout.served(model)

    async def drain(self) -> None:
        """Stop admission and let running requests finish, until DRAIN_TIMEOUT ends the rest."""
        self.stopping = True
        self.pool.stop_admission()
        deadline = asyncio.get_running_loop().time() + self.settings.drain_timeout
        for task in self._asking:
            if task is not None:
                task.cancel()
        for relay in self.relays:
            relay.end_by(deadline)
        with suppress(TimeoutError):
            async with asyncio.timeout_at(deadline + LAST_EVENTS_SECONDS):
                while self.relays:
                    await asyncio.wait({relay.ended for relay in self.relays})


async def _as_listed(ask: Callable[[], Awaitable[Model]]) -> Model:
    """What is asked for, once more where an object was replaced since it was listed: that lists anew."""
    try:
        return await ask()
    except ObjectReplaced:
        return await ask()


def _failed(model: Model, error: ServiceError) -> Model:
    """What could not be had: the model, or an adapter's base."""
    of_base = model.base_model is not None and error.reference == model.base_model.reference
    return model.base_model if of_base and model.base_model is not None else model


def _log_failure(name: str, order: asyncio.Task[None]) -> None:
    if not order.cancelled() and (error := order.exception()) is not None:
        logger.error(NOT_LOADED, error, extra={"model": name})


async def _service(request: Request) -> Service:
    # Not a plain function: FastAPI would run it in a thread, for a fifth of a millisecond a request.
    service: Service = request.app.state.service
    return service


ServiceDep = Annotated[Service, Depends(_service)]
