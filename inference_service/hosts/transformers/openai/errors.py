"""A rejected or failed request, in OpenAI's error format."""

from typing import Any

from pydantic_core import to_json
from starlette.responses import Response


class RequestError(Exception):
    """What is wrong, with which field, and what to do next."""

    def __init__(self, message: str, param: str | None = None, *, status: int = 400) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.status = status

    def envelope(self) -> dict[str, Any]:
        kind = "invalid_request_error" if self.status < 500 else "internal_error"
        # The service reads the status of an error in a stream from `code`.
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.status}}

    def response(self) -> Response:
        return Response(to_json(self.envelope()), self.status, media_type="application/json")

    def event(self) -> bytes:
        return b"data: " + to_json(self.envelope()) + b"\n\n"
