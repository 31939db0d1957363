"""State shared by the routes: the parts that app.py has built, and the relays in progress."""

import asyncio
import logging
from collections.abc import Awaitable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Annotated, Any, Protocol, TypeVar

from fastapi import Depends, Request

from inference_service.api.process_stats import LoopLag
from inference_service.config import Backend, Settings
from inference_service.errors import (
    RequestTimedOut,
    ServiceError,
    ShuttingDown,
)
from inference_service.machine.device import Device
from inference_service.metrics import Metrics
from inference_service.pool.pool import Pool
from inference_service.revisions.resolver import Resolver
from inference_service.revisions.rollout import Rollout
from inference_service.storage.bucket.catalog import Catalog
from inference_service.storage.bucket.model import DescribedModel
from inference_service.storage.model import AnyModel, Model, Requested
from inference_service.storage.registry import Registry

logger = logging.getLogger(__name__)

_T = TypeVar("_T")
# For the error events of requests that the shutdown ends; clients that do not read them are not waited for.
LAST_EVENTS_SECONDS = 0.2


class UnderWay(Protocol):
    """A request in progress, as a shutdown sees it."""

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
    resolver: Resolver
    metrics: Metrics
    loop_lag: LoopLag = field(default_factory=LoopLag)
    relays: set[UnderWay] = field(default_factory=set)
    stopping: bool = False
    _asking: set[asyncio.Task[Any] | None] = field(default_factory=set)

    async def resolve(self, name: str) -> Requested[Model]:
        """The revision that serves the name, within REQUEST_TIMEOUT; raises as Resolver.resolve does."""
        return await self._in_time(self.resolver.resolve(name))

    async def find(self, name: str) -> Requested[AnyModel]:
        """As `resolve`, also for a model that cannot be served."""
        return await self._in_time(self.resolver.find(name))

    async def _in_time(self, asking: Awaitable[_T]) -> _T:
        """Bound by REQUEST_TIMEOUT, even if the bucket is slow, and ended by a shutdown."""
        task = asyncio.current_task()
        self._asking.add(task)
        try:
            async with asyncio.timeout(self.settings.request_timeout):
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

    @property
    def catalog(self) -> Catalog:
        return self.registry.catalog

    def preload(self) -> list[asyncio.Task[None]]:
        """Load PRELOAD_MODELS, and those whose serving.json says so; the service is ready meanwhile."""
        slots = self.settings.slots
        named, rest = self.settings.preload_models[:slots], self.settings.preload_models[slots:]
        if rest:
            message = "not preloaded, the maximum is %s engines (MAX_CACHED_MODELS): %s"
            logger.warning(message, slots, ", ".join(rest))
        loading = [asyncio.create_task(self.resolver.load_or_log(name)) for name in named]
        return [*loading, asyncio.create_task(self._preload_marked(slots - len(named)))]

    async def _preload_marked(self, slots: int) -> None:
        try:
            models = await self.catalog.described()
        except ServiceError as error:
            logger.error("the bucket cannot be listed: %s", error)
            return
        described = [model for model in models if isinstance(model, DescribedModel)]
        marked = [model.name for model in described if model.serving.preload and model.unservable is None]
        others = [name for name in marked if name not in self.settings.preload_models]
        await asyncio.gather(*(self.resolver.load_or_log(name) for name in others[: max(0, slots)]))

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


async def _service(request: Request) -> Service:
    # Not a plain function: FastAPI would run it in a thread, for a fifth of a millisecond a request.
    service: Service = request.app.state.service
    return service


ServiceDep = Annotated[Service, Depends(_service)]
