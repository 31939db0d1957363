"""Wiring: the parts of the service, its lifespan, and how errors are rendered."""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from functools import partial
from pathlib import Path

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from inference_service import __version__
from inference_service.api import admin, health, openai
from inference_service.api.relay import DIRECT_SEND
from inference_service.api.request_log import RequestLog
from inference_service.api.service import Service
from inference_service.backends import source_tables
from inference_service.backends.compile_key import compile_key
from inference_service.backends.without_effect import why_no_sleep, why_not_compiled
from inference_service.checkpoints.memory_profile import Footprint
from inference_service.config import Backend, Settings, WeightSwap
from inference_service.engines.factory import EngineFactory
from inference_service.engines.launcher import Launcher
from inference_service.errors import InvalidRequest, ServiceError, error_envelope
from inference_service.machine.device import Device
from inference_service.machine.memory import free_bytes, free_host_bytes, lacking_beside, used_bytes
from inference_service.metrics import Metrics
from inference_service.pool.budget import Budget
from inference_service.pool.lifecycle import Limits
from inference_service.pool.loader import Parts
from inference_service.pool.pool import Pool
from inference_service.pool.preparation import HostMemory
from inference_service.pool.weight_check import WeightChecks
from inference_service.revisions.resolver import Resolver
from inference_service.revisions.rollout import Rollout
from inference_service.scheduler.state import Policy
from inference_service.storage.bucket.artefacts import open_artefacts
from inference_service.storage.bucket.catalog import Catalog
from inference_service.storage.bucket.documents import Documents
from inference_service.storage.compiled import CompileCache
from inference_service.storage.model import Checkpoint
from inference_service.storage.preflight import Preflight
from inference_service.storage.registry import Registry, open_store
from inference_service.storage.snapshots.cache import open_cache
from inference_service.storage.snapshots.page_lock import PageLock
from inference_service.storage.snapshots.snapshots import SnapshotStore
from inference_service.storage.snapshots.verify import Verifier

logger = logging.getLogger(__name__)

_GIB = 1 << 30
EXAMINED_AT_START = 32
DEFAULT_ENGINES = 2


class _App(FastAPI):
    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Keep the server's own `send`: a stream's chunks need none of the layers between it and a route."""
        scope[DIRECT_SEND] = send
        await super().__call__(scope, receive, send)


def build_app(settings: Settings, device: Device, backend: Backend, launcher: Launcher) -> FastAPI:
    """The ASGI application; its lifespan attaches the launcher and, at the end, closes the pool."""
    factory = EngineFactory(settings, device, backend, launcher)
    metrics = Metrics()
    registry = _registry(settings, device, backend, metrics)
    budget = _budget(settings, device, backend)
    parts = _parts(settings, device, registry, budget, factory)
    pool = Pool(parts, metrics, policy=_policy(settings, budget), limits=_limits(settings))
    metrics.watch_engines(pool.count_by_state)
    rollout = Rollout(pool, registry, metrics, settings.catalog_ttl)
    resolver = Resolver(registry, pool, rollout)
    service = Service(
        settings=settings,
        device=device,
        backend=backend,
        registry=registry,
        pool=pool,
        rollout=rollout,
        resolver=resolver,
        metrics=metrics,
    )
    app = _App(
        title="inference-service",
        redirect_slashes=False,
        version=__version__,
        lifespan=_lifespan(service, factory, launcher),
    )
    app.state.service = service
    for router in (openai.router, admin.router, health.router):
        app.include_router(router)
    app.add_middleware(RequestLog)
    _render_errors(app)
    return app


def _budget(settings: Settings, device: Device, backend: Backend) -> Budget:
    return Budget(
        device,
        backend,
        settings.gpu_memory_utilization,
        None if settings.max_cached_models == "auto" else settings.slots,
        settings.max_adapters,
        settings.concurrency,
        settings.max_sleeping if why_no_sleep(settings, device, backend) is None else 0,
    )


def _parts(
    settings: Settings, device: Device, registry: Registry, budget: Budget, factory: EngineFactory
) -> Parts:
    def footprint(model: Checkpoint) -> Footprint:
        return budget.footprint(registry.memory_profile(model), model.adapter_rank)

    def asleep_bytes(model: Checkpoint) -> int | None:
        return budget.asleep_bytes(registry.memory_profile(model)) if budget.sleepers else None

    return Parts(
        fetch=registry.fetch,
        release=registry.release,
        make_engine=factory.make,
        free_bytes=partial(asyncio.to_thread, free_bytes, device),
        used_bytes=lambda leader, before: asyncio.to_thread(used_bytes, device, leader, before),
        footprint=footprint,
        fetching=registry.fetching,
        swap_key=registry.swap_key if settings.weight_swap is WeightSwap.AUTO else _no_swap,
        weight_checks=WeightChecks(factory.conditions()),
        host_memory=_host_memory(settings, registry.snapshots),
        loaded=registry.loaded,
        asleep_bytes=asleep_bytes,
        lacking_beside=lambda leader: asyncio.to_thread(lacking_beside, leader),
    )


def _registry(settings: Settings, device: Device, backend: Backend, metrics: Metrics) -> Registry:
    store = open_store(settings.gcs_bucket)
    documents = Documents(store)
    catalog = Catalog(store, settings.gcs_model_prefix, settings.catalog_ttl, documents)
    layout, disk = open_cache(settings.local_model_cache, settings.disk_cache_gib)
    snapshots = SnapshotStore(store, layout, disk)
    preflight = Preflight(documents, settings, device, backend, disk.check_fits, snapshots.kept)
    page_lock = PageLock(int(settings.host_cache_gib * _GIB))
    disk.evicted = page_lock.forget
    compiled = None
    if settings.compile_cache is not None and why_not_compiled(settings, device, backend) is None:
        compiled = _compile_cache(settings.compile_cache, settings, device, layout.root, metrics)
    return Registry(catalog, preflight, snapshots, layout, Verifier(page_lock), compiled)


def _compile_cache(
    place: str, settings: Settings, device: Device, root: Path, metrics: Metrics
) -> CompileCache:
    return CompileCache(
        open_artefacts(place),
        root,
        partial(compile_key, settings, device),
        lambda status: metrics.compile_cache.labels("", status).inc(),
    )


def _host_memory(settings: Settings, snapshots: SnapshotStore) -> HostMemory:
    free = partial(asyncio.to_thread, _no_limit if snapshots.in_memory else free_host_bytes)
    return HostMemory(int(settings.host_cache_gib * _GIB), snapshots.hold, snapshots.release, free)


def _no_limit() -> None:
    """The snapshots are memory: nothing more is taken if they stay there."""


def _no_swap(model: Checkpoint) -> None:
    """WEIGHT_SWAP=off: every model is loaded into a fresh engine."""


def _policy(settings: Settings, budget: Budget) -> Policy:
    return Policy(
        slots=_slots(settings, budget),
        concurrency=settings.concurrency,
        queued=settings.queued,
        fairness_wait=settings.fairness_wait,
        min_residency=settings.min_residency,
        idle_ttl=settings.model_idle_ttl,
        memory=budget.total,
        sleepers=budget.sleepers,
    )


def _slots(settings: Settings, budget: Budget) -> int:
    """Where the memory is not known, as many engines as fit are as many as by default."""
    known = settings.max_cached_models != "auto" or budget.total is not None
    return settings.slots if known else DEFAULT_ENGINES


def _limits(settings: Settings) -> Limits:
    return Limits(
        settings.load_wait,
        settings.place_wait,
        settings.load_timeout,
        settings.engine_stall_timeout,
        max(settings.max_adapters, settings.max_cpu_adapters),
    )


def _lifespan(
    service: Service, factory: EngineFactory, launcher: Launcher
) -> Callable[[FastAPI], AbstractAsyncContextManager[None]]:
    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        launcher.attach()
        background = [
            *service.preload(),
            asyncio.create_task(service.rollout.watch()),
            asyncio.create_task(service.loop_lag.watch()),
            asyncio.create_task(_preload_architectures(service, launcher)),
        ]
        yield
        for task in background:
            task.cancel()
        await service.rollout.close()
        await service.pool.close()
        launcher.close()
        factory.close()

    return lifespan


async def _preload_architectures(service: Service, launcher: Launcher) -> None:
    """Let the launcher import what the models of the bucket will need."""
    if service.backend is not Backend.VLLM:
        return
    try:
        found = await service.registry.newest_architectures(EXAMINED_AT_START)
    except ServiceError as error:
        logger.warning("no architecture is preloaded: %s", error)
        return
    launcher.preload(await asyncio.to_thread(source_tables.modules_of, found))


def _render_errors(app: FastAPI) -> None:
    @app.exception_handler(ServiceError)
    async def service_error(request: Request, error: ServiceError) -> Response:
        service: Service = request.app.state.service
        service.metrics.requests.labels(error.model, str(error.status)).inc()
        return JSONResponse(error.envelope(), error.status, error.headers())

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> Response:
        message = f"{error.detail}: {request.method} {request.url.path}"
        code = {404: "unknown_url", 405: "method_not_allowed"}.get(error.status_code)
        envelope = error_envelope(message, "invalid_request_error", code=code)
        return JSONResponse(envelope, error.status_code, error.headers)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        problem = error.errors()[0]
        field = ".".join(map(str, problem["loc"][1:]))
        rendered = InvalidRequest(f"Invalid value for '{field}': {problem['msg']}.", param=field)
        return JSONResponse(rendered.envelope(), rendered.status)
