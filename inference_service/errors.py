"""Every error that a client can meet, with its HTTP status and OpenAI's `type` and `code`.

Errors are raised where a library's own error is translated; `app.py` renders them, in one place.

    ServiceError
    ├── InvalidRequest          400   a field is missing, mistyped or out of range
    │   ├── ContextLengthExceeded
    │   └── BodyTooLarge        413
    ├── AdminKeyWrong           401   /admin wants a key: none was given, or another
    ├── AdminForbidden          403   /admin does not answer this peer, or this web page; says what would help
    ├── ModelNotFound           404
    ├── ModelNotServable        422   the model is there and cannot be served; says why
    ├── NoPreviousRevision      409   there is nothing on the disk to roll back to
    ├── Overloaded              429   too many requests are waiting
    ├── QueueTimedOut           503   it has waited for the maximum time; its load goes on
    │   └── StillBusy                 its engine is ready, and too many requests run
    ├── NoRoom                  503   it does not fit beside the pinned engines; gives the numbers
    ├── StoreError                    the bucket cannot be read; says why
    │   ├── StoreUnavailable    503   it does not answer, answers 429 or 5xx, or stalls: try again
    │   ├── ObjectReplaced      503   an object changed between the listing and its fetch
    │   ├── BucketNotFound      500   GCS_BUCKET names no bucket
    │   ├── StoreForbidden      500   the service lacks a permission; says which
    │   └── SnapshotCorrupt     502   the bytes that arrived are not those that the listing names
    ├── CacheError              500   LOCAL_MODEL_CACHE cannot be written
    │   └── DiskFull            507   it has no space for the model; says how much is missing
    ├── EngineError             502   the engine answered with an error of its own
    │   ├── EngineStartFailed   503   the engine could not be started; says the engine's reason
    │   │   ├── EngineKilled          it was killed while it started
    │   │   └── LoadTimedOut          it did not start within LOAD_TIMEOUT
    │   ├── LauncherGone        503   the launcher died during the load; another is started
    │   ├── OutOfMemory         503   the device has no memory for it; says how much is missing
    │   ├── SwapFailed          503   an engine could not take other weights; it is replaced by a fresh one
    │   ├── AdapterRefused      422   the engine does not take the adapter; says why
    │   ├── EngineUnloaded      503   the operator unloaded it during the request
    │   └── EngineDied          503   the engine's process died, or hangs, during the request
    ├── RequestTimedOut         504
    ├── ClientLeft              499   for metrics and the log: no client sees it
    └── ShuttingDown            503
"""

from typing import Any, ClassVar


class ServiceError(Exception):
    """Base of every error that clients can receive.

    `param` names the field at fault, `retry_after` (seconds) is sent as Retry-After.
    `model` is the catalog's name of the model concerned, empty if unknown; `reference` the reference of what
    could not be loaded, for an adapter possibly its base's.
    """

    status: ClassVar[int] = 500
    type: ClassVar[str] = "server_error"
    code: ClassVar[str | None] = None

    def __init__(self, message: str, *, param: str | None = None, retry_after: int | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.retry_after = retry_after
        self.model = ""
        self.reference: str | None = None

    def again(self, message: str, *, retry_after: int | None) -> "ServiceError":
        """The same error for another request."""
        error = ServiceError.__new__(type(self), message)
        error.__dict__ |= {**self.__dict__, "message": message, "retry_after": retry_after}
        return error

    def envelope(self) -> dict[str, Any]:
        """OpenAI's error body."""
        return error_envelope(self.message, self.type, self.param, self.code)

    def headers(self) -> dict[str, str]:
        return {} if self.retry_after is None else {"retry-after": str(self.retry_after)}


def readable_bytes(count: float) -> str:
    """`1536` -> `1.5 KiB`."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def error_envelope(
    message: str, kind: str, param: str | None = None, code: str | None = None
) -> dict[str, Any]:
    """`{"error": {...}}` with the four keys that OpenAI's clients read."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


class InvalidRequest(ServiceError):
    status = 400
    type = "invalid_request_error"
    code = "invalid_value"


class ContextLengthExceeded(InvalidRequest):
    code = "context_length_exceeded"


class BodyTooLarge(InvalidRequest):
    status = 413
    code = "request_too_large"

    def headers(self) -> dict[str, str]:
        # The rest of the body is not read.
        return {**super().headers(), "connection": "close"}


class AdminKeyWrong(ServiceError):
    status = 401
    type = "invalid_request_error"
    code = "invalid_api_key"

    def headers(self) -> dict[str, str]:
        return {**super().headers(), "www-authenticate": "Bearer"}


class AdminForbidden(ServiceError):
    status = 403
    type = "invalid_request_error"
    code = "admin_forbidden"


class ModelNotFound(ServiceError):
    status = 404
    type = "invalid_request_error"
    code = "model_not_found"

    def __init__(self, name: str, hint: str | None = None) -> None:
        hint = hint or "GET /v1/models and `inference-service models` list those that do."
        super().__init__(f"The model '{name}' does not exist in the bucket. {hint}", param="model")


class ModelNotServable(ServiceError):
    status = 422
    type = "invalid_request_error"
    code = "model_not_servable"

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(f"The model '{name}' cannot be served: {reason}", param="model")
        self.model = name


class NoPreviousRevision(ServiceError):
    status = 409
    type = "invalid_request_error"
    code = "no_previous_revision"


class Overloaded(ServiceError):
    status = 429
    type = "rate_limit_error"
    code = "rate_limit_exceeded"


class QueueTimedOut(ServiceError):
    status = 503
    code = "model_loading"


class StillBusy(QueueTimedOut):
    code = "overloaded"


class NoRoom(ServiceError):
    status = 503
    code = "no_room"

    def headers(self) -> dict[str, str]:
        return {**super().headers(), "x-should-retry": "false"}


class StoreError(ServiceError):
    code = "store_error"


class StoreUnavailable(StoreError):
    status = 503
    code = "store_unavailable"


class ObjectReplaced(StoreError):
    status = 503
    code = "object_replaced"


class BucketNotFound(StoreError):
    code = "bucket_not_found"


class StoreForbidden(StoreError):
    code = "store_forbidden"


class SnapshotCorrupt(StoreError):
    status = 502
    code = "snapshot_corrupt"


class CacheError(ServiceError):
    code = "cache_error"


class DiskFull(CacheError):
    """`missing`: bytes that would have to be freed; None if freeing held snapshots would not help."""

    status = 507
    code = "disk_full"
    missing: int | None = None

    def headers(self) -> dict[str, str]:
        # The client library retries every 5xx; unless a fetch ends, the disk is as full a second later.
        retry = {} if self.retry_after is not None else {"x-should-retry": "false"}
        return super().headers() | retry


class EngineError(ServiceError):
    status = 502
    code = "engine_error"


class EngineStartFailed(EngineError):
    status = 503
    code = "engine_start_failed"

    def headers(self) -> dict[str, str]:
        # The client library retries a 503 twice; a load that failed because of the model would fail again.
        return {**super().headers(), "x-should-retry": "false"}


class EngineKilled(EngineStartFailed):
    """The host was killed, by a user or the system; the model may not be at fault."""


class LoadTimedOut(EngineStartFailed):
    """The host is alive, as far as is known."""


class LauncherGone(EngineError):
    status = 503
    code = "engine_start_failed"


class OutOfMemory(EngineError):
    status = 503
    code = "out_of_memory"


class SwapFailed(EngineError):
    status = 503
    code = "swap_failed"


class AdapterRefused(EngineError):
    status = 422
    type = "invalid_request_error"
    code = "adapter_refused"


class EngineUnloaded(EngineError):
    status = 503
    code = "engine_unloaded"


class EngineDied(EngineError):
    status = 503
    code = "engine_died"


class RequestTimedOut(ServiceError):
    status = 504
    type = "timeout_error"
    code = "timeout"

    def __init__(self, seconds: float) -> None:
        super().__init__(f"The request took longer than {seconds:g} s (REQUEST_TIMEOUT).")


class ClientLeft(ServiceError):
    status = 499
    type = "invalid_request_error"
    code = "client_left"


class ShuttingDown(ServiceError):
    status = 503
    code = "shutting_down"
