"""For every request: an id, its arrival time and one line in the log.

An unexpected error becomes a 500 in OpenAI's envelope.
"""

import logging
import re
import time
import uuid
from typing import Any

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from inference_service.errors import error_envelope

logger = logging.getLogger("inference_service.access")

_HEADER = b"x-request-id"
_SANE_ID = re.compile(rb"[\w.:/+=@-]{1,128}")
_QUIET_PATHS = ("/health", "/ready", "/metrics")


class RequestLog:
    """ASGI middleware. The client's x-request-id is echoed; the engine's is always our own, unique."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        arrived = time.monotonic()
        own_id = uuid.uuid4().hex
        request_id = _client_id(scope) or own_id.encode()
        scope.setdefault("state", {}).update(arrived=arrived, engine_request_id=own_id)
        status = 0

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", []), (_HEADER, request_id)]
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        except Exception:
            logger.exception("unexpected error", extra={"request_id": request_id.decode("latin-1")})
            if status == 0:
                await _internal_error()(scope, receive, send_with_id)
        finally:
            _log(scope, status, arrived, request_id)


def _internal_error() -> JSONResponse:
    message = "The service failed unexpectedly. Its log has the details."
    return JSONResponse(error_envelope(message, "server_error", code="internal_error"), 500)


def _client_id(scope: Scope) -> bytes | None:
    given: bytes | None = dict(scope["headers"]).get(_HEADER)
    return given if given and _SANE_ID.fullmatch(given) else None


def _log(scope: Scope, status: int, arrived: float, request_id: bytes) -> None:
    level = logging.DEBUG if scope["path"] in _QUIET_PATHS else logging.INFO
    fields: dict[str, Any] = {
        "status": status or "client left",
        "seconds": round(time.monotonic() - arrived, 3),
        "request_id": request_id.decode("latin-1"),
    }
    # The client chooses the path: escaped, so that it cannot forge a log line.
    logger.log(level, "%s %s", scope["method"], ascii(scope["path"])[1:-1], extra=fields)
