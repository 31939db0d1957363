"""The operator's routes."""

from typing import Any

from fastapi import APIRouter

from inference_service.api.service import ServiceDep
from inference_service.models.responses import Unloaded

router = APIRouter(prefix="/admin")


@router.post("/unload/{name:path}")
async def unload(name: str, service: ServiceDep) -> Unloaded:
    """Tear the model's engine down once its running requests have ended; answers when it is gone."""
    model = await service.catalog.find(name)
    return Unloaded(model=model.name, unloaded=await service.pool.unload(model))


@router.get("/stats")
async def stats(service: ServiceDep) -> dict[str, Any]:
    """Slots, engines, leases and waiters, and the models that cannot be served with the reason."""
    models = await service.catalog.models()
    unservable = {model.name: model.unservable for model in models if model.unservable}
    return {**await service.pool.stats(), "models": len(models), "unservable": unservable}
