"""Liveness, readiness and metrics. None of them waits for a load, an engine or the bucket."""

from fastapi import APIRouter, Response

from inference_service import __version__
from inference_service.api.schemas.responses import Health
from inference_service.api.service import ServiceDep
from inference_service.errors import ShuttingDown
from inference_service.machine.device import resolve_dtype
from inference_service.metrics import CONTENT_TYPE

router = APIRouter()


@router.get("/health")
async def health(service: ServiceDep) -> Health:
    """The process is alive; on which device, with which backend and dtype (of bfloat16 checkpoints)."""
    return Health(
        device=service.device.kind,
        device_name=service.device.name,
        device_count=service.device.count,
        dtype=resolve_dtype(service.settings.dtype, service.device, service.backend, "bfloat16"),
        backend=service.backend,
        version=__version__,
        notes=service.pool.notes(),
    )


@router.get("/ready")
async def ready(service: ServiceDep) -> dict[str, str]:
    """Requests are accepted; 503 once the service shuts down."""
    if service.stopping:
        raise ShuttingDown("The service is shutting down.")
    return {"status": "ready"}


@router.get("/metrics")
async def metrics(service: ServiceDep) -> Response:
    """Prometheus' text format."""
    return Response(service.metrics.render(), media_type=CONTENT_TYPE)
