"""From bytes on the wire to a bounded, valid body, or a clear 400.

The body's size is limited before it is parsed; large bodies are parsed off the event loop.
"""

import asyncio
import math
import re
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from fastapi import Request
from pydantic import ValidationError
from pydantic_core import from_json
from starlette.requests import ClientDisconnect

from inference_service.api.schemas.requests import ChatBody, CompletionBody, GenerationBody
from inference_service.api.service import ServiceDep
from inference_service.errors import BodyTooLarge, ClientLeft, InvalidRequest, RequestTimedOut

MAX_BODY_BYTES = 4 << 20
# Parsing more than this would block the event loop, and every stream, for a noticeable time.
PARSE_ON_LOOP_BYTES = 64 << 10

# A float out of range becomes infinity, an integer beyond 64 bits overflows in engines; only bodies with such
# a number are checked again.
_HUGE_NUMBER = re.compile(rb"[eE]\+?\d{2}|\d{19}")
_INT64 = 2**63 - 1
_EXPECTED = "Input should be "
_PARSERS = ThreadPoolExecutor(max_workers=2, thread_name_prefix="parse")

Body = TypeVar("Body", bound=GenerationBody)


async def chat_body(request: Request, service: ServiceDep) -> ChatBody:
    return await _body(request, service.settings.request_timeout, ChatBody)


async def completion_body(request: Request, service: ServiceDep) -> CompletionBody:
    return await _body(request, service.settings.request_timeout, CompletionBody)


async def _body(request: Request, seconds: float, kind: type[Body]) -> Body:
    try:
        async with asyncio.timeout(seconds):
            raw = await _read(request)
    except TimeoutError as error:
        raise RequestTimedOut(seconds) from error
    except ClientDisconnect as error:
        raise ClientLeft("The client disconnected before its request was complete.") from error
    if len(raw) <= PARSE_ON_LOOP_BYTES:
        return parse(raw, kind)
    return await asyncio.get_running_loop().run_in_executor(_PARSERS, parse, raw, kind)


async def _read(request: Request) -> bytes:
    chunks: list[bytes] = []
    declared = request.headers.get("content-length", "")
    size = 0
    if declared.isdigit() and int(declared) > MAX_BODY_BYTES:
        raise _too_large()
    async for chunk in request.stream():
        size += len(chunk)
        if size > MAX_BODY_BYTES:
            raise _too_large()
        chunks.append(chunk)
    return b"".join(chunks)


def _too_large() -> BodyTooLarge:
    return BodyTooLarge(f"The request's body is larger than the maximum of {MAX_BODY_BYTES} bytes.")


def parse(raw: bytes, kind: type[Body]) -> Body:
    """A valid body; raises InvalidRequest that names the field.

    Strict JSON: no NaN, no Infinity, no number too large for a float, no lone surrogate.
    """
    try:
        value = from_json(raw, allow_inf_nan=False)
    except ValueError as error:
        raise InvalidRequest(f"The request's body is not valid JSON: {error}", param=None) from error
    if not isinstance(value, dict):
        raise InvalidRequest("The request's body must be a JSON object.")
    if _HUGE_NUMBER.search(raw):
        _refuse_huge_numbers(value)
    try:
        return kind.model_validate(value)
    except ValidationError as error:
        raise _invalid(error, kind) from error


def _refuse_huge_numbers(body: dict[str, Any]) -> None:
    for field, value in body.items():
        if _holds_huge_number(value):
            raise InvalidRequest(f"Invalid value for '{field}': a number is too large.", param=field)


def _holds_huge_number(value: Any) -> bool:
    if isinstance(value, int | float):
        return math.isinf(value) if isinstance(value, float) else abs(value) > _INT64
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return any(_holds_huge_number(part) for part in parts)


def _message(messages: list[str]) -> str:
    """What a field should be; a union has a message for each of its types."""
    expected = [each.removeprefix(_EXPECTED) for each in messages if each.startswith(_EXPECTED)]
    if len(expected) < len(messages):
        return messages[0]
    return _EXPECTED + " or ".join(dict.fromkeys(expected))


def _invalid(error: ValidationError, kind: type[GenerationBody]) -> InvalidRequest:
    problems = error.errors(include_url=False, include_input=False, include_context=False)
    problem = problems[0]
    # A union reports the branch that it tried; the client knows only the field.
    field = str(problem["loc"][0]) if problem["loc"] else None
    path = ".".join(map(str, problem["loc"])) if len(problems) == 1 else field
    if field == "chat_template":
        message = "a template in a request is not accepted; the model's own is used"
    else:
        message = _message([each["msg"] for each in problems if each["loc"][:1] == problem["loc"][:1]])
    return InvalidRequest(f"Invalid value for '{path}': {message}.", param=field)
