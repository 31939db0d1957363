"""The operator's routes."""

import asyncio
from typing import Any

from fastapi import APIRouter, Depends, Response, status

from inference_service.api.admin_access import admit_operator
from inference_service.api.process_stats import process_stats
from inference_service.api.schemas.responses import Placement, Unloaded
from inference_service.api.service import Service, ServiceDep
from inference_service.storage.bucket.model import canonical_name
from inference_service.storage.model import AnyModel

router = APIRouter(prefix="/admin", dependencies=[Depends(admit_operator)])


@router.post("/load/{name:path}")
async def load(name: str, service: ServiceDep, response: Response, wait: bool = True) -> Placement:
    """Load the model; answers once it is ready, or with 202 at once if `wait` is false."""
    requested = await service.resolve(name)
    if wait:
        await service.resolver.load(requested)
    else:
        service.resolver.load_soon(requested.model)
        response.status_code = status.HTTP_202_ACCEPTED
    return _placement(service, service.resolver.meant(requested))


@router.post("/unload/{name:path}")
async def unload(name: str, service: ServiceDep, force: bool = False) -> Unloaded:
    """Stop the model's engine; answers when it is gone.

    Its running requests finish first; if `force` is true they end now, with an error.
    """
    name = canonical_name(name)
    if name not in service.pool.names():
        name = (await service.find(name)).model.name  # an alias or a revision; an unknown name is a 404
    return Unloaded(model=name, unloaded=await service.pool.unload(name, force=force))


@router.post("/rollback/{name:path}")
async def rollback(name: str, service: ServiceDep) -> Placement:
    """Go back to the previous revision, whose snapshot is on the disk; answers once it serves.

    The revision that is rolled back does not return by itself; the next upload takes over again.
    """
    requested = await service.find(name)
    return _placement(service, await service.rollout.rollback(requested.model))


@router.post("/pin/{name:path}")
async def pin(name: str, service: ServiceDep) -> Placement:
    """Never evict the model's engine for another model; does not load it."""
    return await _pin(service, name, pinned=True)


@router.post("/unpin/{name:path}")
async def unpin(name: str, service: ServiceDep) -> Placement:
    """Let the model's engine be evicted again, whatever its serving.json says."""
    return await _pin(service, name, pinned=False)


@router.get("/stats")
async def stats(service: ServiceDep) -> dict[str, Any]:
    """Slots, budget, engines, leases, waiters; fetches and the disk; what cannot be served; this process."""
    models = service.catalog.listed
    unservable = {model.name: model.unservable for model in models if model.unservable}
    return {
        **await service.pool.stats(),
        **await asyncio.to_thread(service.registry.stats),
        "models": len(models),
        "unservable": unservable,
        "rollouts": service.rollout.describe(),
        "alias_conflicts": service.catalog.conflicts,
        "process": {**process_stats(), "loop_lag_seconds": service.loop_lag.take()},
    }


async def _pin(service: Service, name: str, *, pinned: bool) -> Placement:
    requested = await service.find(name)
    service.pool.pin(requested.model, pinned=pinned)
    return _placement(service, service.resolver.meant(requested))


def _placement(service: Service, model: AnyModel) -> Placement:
    return Placement(
        model=model.name,
        revision=model.revision,
        state=service.pool.standing(model).value,
        pinned=service.pool.pinned(model),
    )
