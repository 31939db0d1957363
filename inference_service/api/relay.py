"""The relay: one request's way from a lease to the client's last byte.

Owns the lease and the host's reply and releases both on every way out: the end, an error, the timeout,
shutdown, a client that disconnected. Closing the reply aborts the generation in the host. A class rather than
an async generator, whose `finally` does not run if it was never started.
"""

import asyncio
import time

from fastapi import Request
from pydantic_core import from_json
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from inference_service.api.schemas.requests import GenerationBody
from inference_service.api.service import Service
from inference_service.api.sse import StreamReader, error_event, host_error, progress_comment
from inference_service.engines.base import Reply
from inference_service.errors import (
    ClientLeft,
    EngineError,
    RequestTimedOut,
    ServiceError,
    ShuttingDown,
)
from inference_service.pool.leases import ANSWERING, Lease
from inference_service.storage.model import Model

# A client that does not read would otherwise block its error event, and this task, forever.
LAST_WORD_SECONDS = 2.0
# Proxies close silent connections, most of them after a minute.
COMMENT_SECONDS = 3.0
REVISION_HEADER = b"x-model-revision"
BASE_REVISION_HEADER = b"x-base-revision"
# In the scope of a request: the server's own `send`, beneath every middleware.
DIRECT_SEND = "inference_service.send"
_STREAM_HEADERS = [
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # nginx would buffer the events
]


class Relay(Response):
    """The response of a generation request; runs when Starlette calls it."""

    def __init__(self, service: Service, body: GenerationBody, request: Request) -> None:
        self.background = None
        self._service = service
        self._body = body
        # None until the name in the body is resolved.
        self._model: Model | None = None
        self._path = request.url.path
        self._engine_request_id: str = request.state.engine_request_id
        self._arrived: float = request.state.arrived
        loop = asyncio.get_running_loop()
        spent = time.monotonic() - self._arrived
        self._deadline = loop.time() + service.settings.request_timeout - spent
        self._limit: asyncio.Timeout | None = None
        self._cause: ServiceError | None = None
        self._client_left = False
        self._answered = False
        self._lease: Lease | None = None
        self._reply: Reply | None = None
        self._status: int | None = None
        self._grace: asyncio.TimerHandle | None = None
        self._comments: asyncio.Task[None] | None = None
        self.ended: asyncio.Future[None] = loop.create_future()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._service.relays.add(self)
        watcher = asyncio.create_task(self._watch_client(receive))
        error: ServiceError | None = None
        try:
            error = await self._run_within_limit(send, scope.get(DIRECT_SEND, send))
            await self._end_comments()
            self._close()
            if error is not None and not self._client_left:
                await self._last_word(error, scope, receive, send)
        finally:
            watcher.cancel()
            self._stop_comments()
            self._close()
            self._service.relays.discard(self)
            self._record(error)
            self.ended.set_result(None)

    def end_by(self, deadline: float) -> None:
        """End at `deadline` (the event loop's time) at the latest: the service shuts down."""
        if self._model is None:  # it still waits for the bucket, which may be slow
            deadline = asyncio.get_running_loop().time()
        if deadline < self._deadline:
            self._cut(deadline, ShuttingDown("The service is shutting down. Try again.", retry_after=5))

    async def _run_within_limit(self, send: Send, direct: Send) -> ServiceError | None:
        """The error that ended the request; None if it was answered. `direct` is the server's own `send`."""
        try:
            async with asyncio.timeout_at(self._deadline) as self._limit:
                await self._run(send, direct)
        except TimeoutError:
            return self._cause or RequestTimedOut(self._service.settings.request_timeout)
        except EngineError as error:
            return await self._death() or error
        except ServiceError as error:
            return error
        return None

    async def _death(self) -> ServiceError | None:
        """The error to report instead of the engine's own if the engine is dead."""
        if self._lease is None or self._client_left:
            return None
        return await self._service.pool.suspect(self._lease)

    async def _run(self, send: Send, direct: Send) -> None:
        def resolved(model: Model) -> None:
            self._model = model
            if self._body.stream:
                self._comment_after_grace(send, model)

        self._lease = await self._service.resolver.lease(self._body.model, self._arrived, resolved)
        self._reply = await self._lease.engine.forward(
            self._path, self._body.forwarded(self._lease.served_name), self._engine_request_id
        )
        if self._reply.status >= 400:
            raise host_error(self._reply.status, await self._reply.read())
        if self._body.stream:
            await self._stream(self._reply, send, direct)
        else:
            await self._collect(self._reply, send)

    async def _stream(self, reply: Reply, send: Send, direct: Send) -> None:
        reader = StreamReader(keep_usage=self._body.wants_usage)
        next_chunk, feed, first = reply.chunk, reader.feed, True
        while chunk := await next_chunk():
            if events := feed(chunk):
                if first:
                    first = False
                    await self._end_comments()
                    self._first_byte()
                    if self._status is not None:  # it was opened before its revision was known
                        events = self._revision_comment() + events
                    await self._open(send)
                await direct({"type": "http.response.body", "body": events, "more_body": True})
            if reader.error is not None:
                raise reader.error
            if reader.done:
                break
        if not reader.done:
            raise EngineError("The engine closed the stream before its end.")
        self._count_tokens(reader.usage)
        self._close()
        await send({"type": "http.response.body", "body": b"", "more_body": False})
        self._answered = True

    async def _collect(self, reply: Reply, send: Send) -> None:
        content = await reply.read()
        # The engine has done its part; a client that reads slowly does not hold it.
        self._close()
        self._count_tokens(from_json(content).get("usage"))
        headers = [
            (b"content-type", reply.content_type.encode("latin-1")),
            (b"content-length", str(len(content)).encode()),
            *self._revisions(),
        ]
        self._status = reply.status
        await send({"type": "http.response.start", "status": reply.status, "headers": headers})
        await send({"type": "http.response.body", "body": content, "more_body": False})
        self._answered = True

    async def _open(self, send: Send) -> None:
        """Open the stream, unless a comment has opened it."""
        if self._status is not None:
            return
        headers = [
            (b"content-type", b"text/event-stream; charset=utf-8"),
            *self._revisions(),
            *_STREAM_HEADERS,
        ]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        # Only now: a comment that is cancelled before it is sent has opened nothing.
        self._status = 200

    def _revisions(self) -> list[tuple[bytes, bytes]]:
        """The revision that answers, for an adapter also its base's; nothing until that is decided."""
        if self._lease is None:
            return []
        headers = [(REVISION_HEADER, self._lease.model.revision.encode())]
        if self._lease.adapter is not None:
            headers.append((BASE_REVISION_HEADER, self._lease.slot.model.revision.encode()))
        return headers

    def _revision_comment(self) -> bytes:
        return b"".join(b": " + name + b" " + value + b"\n\n" for name, value in self._revisions())

    def _comment_after_grace(self, send: Send, model: Model) -> None:
        """From COLD_START_GRACE to the first token, comments tell the client how far its model is."""

        def begin() -> None:
            self._comments = asyncio.create_task(self._comment(send, model))

        waited = time.monotonic() - self._arrived
        left = max(0.0, self._service.settings.cold_start_grace - waited)
        self._grace = asyncio.get_running_loop().call_later(left, begin)

    async def _comment(self, send: Send, model: Model) -> None:
        while True:
            await self._open(send)
            progress = ANSWERING if self._lease is not None else self._service.pool.progress(model)
            comment = progress_comment(model.name, progress)
            await send({"type": "http.response.body", "body": comment, "more_body": True})
            await asyncio.sleep(COMMENT_SECONDS)

    async def _end_comments(self) -> None:
        """When this returns, no comment is being sent."""
        self._stop_comments()
        if self._comments is not None:
            await asyncio.wait({self._comments})

    def _stop_comments(self) -> None:
        if self._grace is not None:
            self._grace.cancel()
        if self._comments is not None:
            self._comments.cancel()

    async def _last_word(self, error: ServiceError, scope: Scope, receive: Receive, send: Send) -> None:
        """A real status before the first byte; an error event, and no [DONE], after it."""
        try:
            async with asyncio.timeout(LAST_WORD_SECONDS):
                if self._status is None:
                    answer = JSONResponse(error.envelope(), error.status, error.headers())
                    answer.raw_headers.extend(self._revisions())
                    await answer(scope, receive, send)
                elif self._body.stream:
                    event = error_event(error)
                    await send({"type": "http.response.body", "body": event, "more_body": False})
        except TimeoutError:
            return

    async def _watch_client(self, receive: Receive) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        self._client_left = True
        self._cut(asyncio.get_running_loop().time(), None)

    def _cut(self, deadline: float, cause: ServiceError | None) -> None:
        self._deadline = deadline
        self._cause = cause
        if self._limit is not None and not self._limit.expired():
            try:
                self._limit.reschedule(deadline)
            except RuntimeError:  # the work within the limit has just ended
                return

    def _close(self) -> None:
        if self._reply is not None:
            self._reply.close()
        if self._lease is not None:
            self._lease.release()

    def _first_byte(self) -> None:
        waited = time.monotonic() - self._arrived
        self._service.metrics.first_token_seconds.labels(self._label).observe(waited)

    def _count_tokens(self, usage: dict[str, int] | None) -> None:
        if not usage:
            return
        metrics, name = self._service.metrics, self._label
        metrics.prompt_tokens.labels(name).inc(usage.get("prompt_tokens") or 0)
        metrics.generated_tokens.labels(name).inc(usage.get("completion_tokens") or 0)

    def _record(self, error: ServiceError | None) -> None:
        if self._client_left and not self._answered:
            status = ClientLeft.status
        else:
            status = error.status if error is not None else (self._status or 500)
        metrics = self._service.metrics
        metrics.requests.labels(self._label or (error.model if error is not None else ""), str(status)).inc()
        if self._model is not None:
            metrics.request_seconds.labels(self._label).observe(time.monotonic() - self._arrived)

    @property
    def _label(self) -> str:
        """The model's label in metrics; empty for an unresolved name, which the client could choose."""
        return "" if self._model is None else self._model.name
