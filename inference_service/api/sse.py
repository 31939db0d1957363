"""What the relay reads in a stream of server-sent events.

Pure: bytes in, bytes out. Chunks pass as they are unless one holds the usage event or an error.
"""

import re
from typing import Any

from pydantic_core import from_json, to_json

from inference_service.errors import (
    ContextLengthExceeded,
    EngineError,
    InvalidRequest,
    ServiceError,
)
from inference_service.pool.leases import LoadProgress

EVENT_END = b"\n\n"
DONE = b"data: [DONE]\n\n"
# Neither can be imitated by generated text: inside JSON its quotes are escaped.
_USAGE = b'"choices":[]'
_ERROR = b'data: {"error"'
_CONTEXT_LENGTH = re.compile(r"context length|max_model_len|maximum model length", re.IGNORECASE)


class StreamReader:
    """Takes a host's chunks and returns what the client may see.

    `usage` holds the usage that the host reported, `done` whether the stream ended properly.
    """

    def __init__(self, *, keep_usage: bool) -> None:
        self._keep_usage = keep_usage
        self._partial = b""
        self.usage: dict[str, Any] | None = None
        self.error: ServiceError | None = None
        self.done = False

    def feed(self, chunk: bytes) -> bytes:
        """The complete events in `chunk` and the rest before it, up to an error of the host."""
        if self._partial or not chunk.endswith(EVENT_END):
            whole, end, self._partial = (self._partial + chunk).rpartition(EVENT_END)
            chunk = whole + end
        if _USAGE in chunk or _ERROR in chunk:
            chunk = self._without_notices(chunk)
        if chunk.endswith(DONE):
            self.done = True
        return chunk

    def _without_notices(self, chunk: bytes) -> bytes:
        kept = b""
        for event in chunk.removesuffix(EVENT_END).split(EVENT_END):
            if event.startswith(_ERROR):
                payload = event.removeprefix(b"data: ")
                self.error = host_error(_status_in(payload), payload)
                return kept
            if _USAGE in event:
                self.usage = from_json(event.removeprefix(b"data: ")).get("usage")
                if not self._keep_usage:
                    continue
            kept += event + EVENT_END
        return kept


def _status_in(payload: bytes) -> int:
    code = from_json(payload)["error"].get("code")
    return code if isinstance(code, int) else 500


def host_error(status: int, body: bytes) -> ServiceError:
    """A host's error answer in this service's words."""
    try:
        error = from_json(body)["error"]
        message, param = str(error["message"]), error.get("param")
    except (ValueError, KeyError, TypeError, AttributeError):
        message, param = body[:500].decode(errors="replace") or "no reason given", None
    if status in (400, 413, 422, 501):
        invalid = InvalidRequest(message, param=None if param is None else str(param))
        if _CONTEXT_LENGTH.search(message):
            return ContextLengthExceeded(invalid.message, param=invalid.param)
        return invalid
    return EngineError(f"The engine answered {status}: {message}")


def progress_comment(model: str, progress: LoadProgress) -> bytes:
    """`: loading my-model phase=start 43% eta 12s`: clients ignore it, proxies see traffic."""
    parts = [f": loading {model} phase={progress.phase}"]
    if progress.percent is not None:
        parts.append(f"{progress.percent}%")
    if progress.eta_seconds is not None:
        parts.append(f"eta {progress.eta_seconds:.0f}s")
    return " ".join(parts).encode() + EVENT_END


def error_event(error: ServiceError) -> bytes:
    """The event that ends a stream in which something failed; no [DONE] follows it."""
    return b"data: " + to_json(error.envelope()) + EVENT_END
