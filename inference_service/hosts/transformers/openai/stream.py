"""A request's answers from the engine to a client that may disconnect at any time."""

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import suppress
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from inference_service.hosts.transformers.generation.runner import RunnerDead
from inference_service.hosts.transformers.generation.sequence import Failure, Sequence, Token
from inference_service.hosts.transformers.openai.choice import Choice, TextChunk
from inference_service.hosts.transformers.openai.errors import RequestError

logger = logging.getLogger(__name__)

DONE = b"data: [DONE]\n\n"
Begin = Callable[[Callable[[Token | Failure], None]], Sequence]


async def chunks(
    begins: list[tuple[Choice, Begin]], cancel: Callable[[Sequence], None]
) -> AsyncIterator[tuple[Choice, TextChunk]]:
    """The chunks of all choices as they arrive; when the iteration ends, their sequences are cancelled.

    Raises RequestError if the engine fails.
    """
    results: asyncio.Queue[tuple[Choice, Token | Failure]] = asyncio.Queue()
    sequences: dict[int, Sequence] = {}
    try:
        for choice, begin in begins:
            sequences[choice.index] = begin(_into(results, choice))
        left = len(begins)
        while left:
            choice, result = await results.get()
            if choice.finished:
                continue
            if isinstance(result, Failure):
                raise _refusal(result)
            chunk = choice.take(result)
            if choice.finished:
                left -= 1
                cancel(sequences[choice.index])
            if chunk is not None:
                yield choice, chunk
    except RunnerDead as error:
        raise RequestError(f"The engine failed: {error}", status=500) from error
    finally:
        for sequence in sequences.values():
            cancel(sequence)


def _refusal(failure: Failure) -> RequestError:
    if failure.refused:
        return RequestError(f"The request cannot be processed: {failure.reason}")
    return RequestError(f"The engine failed: {failure.reason}", status=500)


def _unforeseen(error: Exception) -> RequestError:
    """An internal error: it fails only this request, and its traceback is logged."""
    logger.exception("a request failed", exc_info=error)
    return RequestError(f"The engine failed on this request: {type(error).__name__}: {error}", status=500)


def _into(
    results: "asyncio.Queue[tuple[Choice, Token | Failure]]", choice: Choice
) -> Callable[[Token | Failure], None]:
    return lambda result: results.put_nowait((choice, result))


async def unless_gone(request: Request, work: Coroutine[Any, Any, Response]) -> Response:
    """The result of `work`, which is cancelled, with everything it started, if the client disconnects."""
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_left(request.receive))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            return Response(status_code=499)
        return await working
    except RequestError as refused:
        return refused.response()
    except Exception as error:
        return _unforeseen(error).response()
    finally:
        leaving.cancel()
        working.cancel()
        with suppress(asyncio.CancelledError, Exception):
            await working


class EventStream(Response):
    """Server-sent events; an error is the last one. However it ends, it closes `events`."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncIterator[bytes]) -> None:
        super().__init__()
        del self.headers["content-length"]
        self._events = events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        sending = asyncio.ensure_future(self._send(send))
        leaving = asyncio.ensure_future(_left(receive))
        try:
            await asyncio.wait({sending, leaving}, return_when=asyncio.FIRST_COMPLETED)
            if sending.done():
                await sending
        finally:
            for task in (sending, leaving):
                task.cancel()
            await asyncio.gather(sending, leaving, return_exceptions=True)

    async def _send(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        events = self._told()
        try:
            async for event in events:
                await send({"type": "http.response.body", "body": event, "more_body": True})
            await send({"type": "http.response.body", "body": b""})
        finally:
            await events.aclose()  # type: ignore[attr-defined]

    async def _told(self) -> AsyncIterator[bytes]:
        try:
            async for event in self._events:
                yield event
            yield DONE
        except RequestError as refused:
            yield refused.event()
        except Exception as error:
            yield _unforeseen(error).event()
        finally:
            await self._events.aclose()  # type: ignore[attr-defined]


async def _left(receive: Callable[[], Awaitable[Any]]) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
