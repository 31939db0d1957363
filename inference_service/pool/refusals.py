"""Errors for requests that the pool does not serve: what happened, to which model, what to do next."""

from inference_service.checkpoints.memory_profile import Footprint
from inference_service.checkpoints.reference import model_of
from inference_service.config import WaitLimit
from inference_service.errors import (
    EngineDied,
    EngineStartFailed,
    EngineUnloaded,
    NoRoom,
    Overloaded,
    QueueTimedOut,
    ShuttingDown,
    StillBusy,
    readable_bytes,
)
from inference_service.scheduler.state import EngineView, Policy


def shutting_down() -> ShuttingDown:
    return ShuttingDown("The service is shutting down. Try again.", retry_after=5)


def overloaded(policy: Policy, running: int, waiting: int, retry_after: int) -> Overloaded:
    return Overloaded(
        f"{waiting} requests wait, the maximum (MAX_QUEUED_REQUESTS={policy.queued}), and {running} are "
        f"running (MAX_CONCURRENT_REQUESTS={policy.concurrency}). Try again in {retry_after} s.",
        retry_after=retry_after,
    )


def no_room(name: str, footprint: Footprint, policy: Policy, engines: list[EngineView]) -> NoRoom:
    """The model cannot fit beside the pinned ones of `engines`, or not even alone."""
    pinned = [engine for engine in engines if engine.pinned]
    more = ""
    if policy.memory is not None and not pinned:
        return NoRoom(
            f"The model '{name}' needs {footprint}, and all engines together may use "
            f"{readable_bytes(policy.memory)} (GPU_MEMORY_UTILIZATION).",
            param="model",
        )
    if policy.memory is None or len(pinned) >= policy.slots:
        lack = f"every engine is pinned (MAX_CACHED_MODELS={policy.slots})"
        more = ", or raise MAX_CACHED_MODELS"
    else:
        free = policy.memory - sum(engine.bytes for engine in pinned)
        lack = (
            f"it needs {footprint}, and beside the pinned engines {readable_bytes(free)} of "
            f"{readable_bytes(policy.memory)} (GPU_MEMORY_UTILIZATION) are left"
        )
    names = [model_of(engine.key) for engine in pinned]
    sizes = [readable_bytes(engine.bytes) for engine in pinned]
    held = ", ".join(f"{name} ({size})" for name, size in zip(names, sizes, strict=True))
    return NoRoom(
        f"There is no room for the model '{name}': {lack}. Pinned: {held}. Unpin one (POST "
        f"/admin/unpin/MODEL, or its serving.json){more}.",
        param="model",
    )


def still_loading(name: str, *, loading: bool, limit: WaitLimit, retry_after: int) -> QueueTimedOut:
    state = "is still being loaded" if loading else "still waits for a free engine"
    goes_on = " Loading continues." if loading else ""
    return QueueTimedOut(
        f"The model '{name}' {state}; this request has waited for {limit}.{goes_on} Try again in "
        f"{retry_after} s.",
        retry_after=retry_after,
    )


def still_busy(name: str, running: int, policy: Policy, limit: WaitLimit, retry_after: int) -> StillBusy:
    return StillBusy(
        f"The model '{name}' is ready, but {running} of {policy.concurrency} requests run already "
        f"(MAX_CONCURRENT_REQUESTS); this one has waited for {limit}. Try again in {retry_after} s.",
        retry_after=retry_after,
    )


def died(name: str, reason: str) -> EngineDied:
    return EngineDied(
        f"The engine of '{name}' went away while it worked on this request: {reason}. Send it again: a fresh "
        "engine is started.",
        retry_after=1,
    )


def load_unloaded(name: str) -> EngineUnloaded:
    return EngineUnloaded(f"'{name}' was unloaded by the operator while it was being loaded. Send it again.")


def unloaded(name: str) -> EngineUnloaded:
    return EngineUnloaded(f"'{name}' was unloaded by the operator. Send the request again.")


def unexplained(name: str, error: Exception) -> EngineStartFailed:
    return EngineStartFailed(
        f"The model '{name}' could not be loaded: {type(error).__name__}: {error}", param="model"
    )
