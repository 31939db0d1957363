"""The operator's routes."""

import asyncio
from typing import Any

from fastapi import APIRouter

from inference_service.api.service import ServiceDep
from inference_service.models.responses import Unloaded
from inference_service.storage.model import canonical_name

router = APIRouter(prefix="/admin")


@router.post("/unload/{name:path}")
async def unload(name: str, service: ServiceDep) -> Unloaded:
    """Tear the model's engine down once its running requests have ended; answers when it is gone."""
    name = canonical_name(name)
    if not service.pool.holds(name):
        name = (await service.find(name)).name  # an alias, a revision; nobody's name is a 404
    return Unloaded(model=name, unloaded=await service.pool.unload(name))


@router.get("/stats")
async def stats(service: ServiceDep) -> dict[str, Any]:
    """Slots, engines, leases and waiters; fetches and the disk; the models that cannot be served."""
    models = service.catalog.listed
    unservable = {model.name: model.unservable for model in models if model.unservable}
    return {
        **await service.pool.stats(),
        **await asyncio.to_thread(service.registry.sync.stats),
        "models": len(models),
        "unservable": unservable,
        "alias_conflicts": service.catalog.conflicts,
    }
