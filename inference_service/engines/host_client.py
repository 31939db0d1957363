"""HTTP/1.1 to a host over its unix socket, with as little work as possible for each chunk of a stream.

A general client passes each chunk through its own streams and iterators: a quarter of the processor time that
a streamed token costs the service. httptools parses, as in the server.
"""

import asyncio
from collections.abc import Callable, Mapping
from urllib.parse import quote

import httptools

# A connection is not read while so much of its reply waits for a client that reads slowly.
HIGH_WATER_BYTES = 256 << 10
_SAFE_IN_PATH = "/@:+.~-_"


class HostGone(ConnectionError):
    """The host closed the connection, or what came is not HTTP."""


class HostClient:
    """Connections to one host. An idle one is used again within `keep_alive` seconds."""

    def __init__(self, path: str, keep_alive: float) -> None:
        self.closed = False
        self._path = path
        self._keep_alive = keep_alive
        self._idle: list[HostConnection] = []
        self._open: set[HostConnection] = set()

    async def request(
        self, method: str, path: str, body: bytes = b"", headers: Mapping[str, str] | None = None
    ) -> "HostConnection":
        """A connection on which the reply's head has come; raises OSError, HostGone among others.

        `path` has no query. The caller closes the connection.
        """
        connection = await self._connected()
        try:
            await connection.ask(method, path, body, headers or {})
        except BaseException:
            connection.close()
            raise
        return connection

    def close(self) -> None:
        """Cut every connection; who reads gets HostGone."""
        self.closed = True
        for connection in list(self._open):
            connection.cut()
        self._idle.clear()

    async def _connected(self) -> "HostConnection":
        if self.closed:
            raise HostGone("the connections are closed")
        loop = asyncio.get_running_loop()
        while self._idle:
            connection = self._idle.pop()
            if connection.usable and loop.time() - connection.idle_since < self._keep_alive:
                return connection
            connection.cut()
        connection = HostConnection(self._ended, loop)
        await loop.create_unix_connection(lambda: connection, self._path)
        self._open.add(connection)
        if self.closed:
            connection.cut()
        return connection

    def _ended(self, connection: "HostConnection") -> None:
        """Its reply has been read, or it is closed."""
        if connection.usable and not self.closed:
            connection.idle_since = connection.loop.time()
            self._idle.append(connection)
        else:
            connection.cut()
            self._open.discard(connection)


def _as_it_is(error: Exception) -> Exception:
    return error


class HostConnection(asyncio.Protocol):
    """One connection, with one reply at a time."""

    def __init__(self, ended: "Callable[[HostConnection], None]", loop: asyncio.AbstractEventLoop) -> None:
        # Up to Python 3.11, to ask for the running loop is a system call.
        self.loop = loop
        # From an error to the one that a reader gets.
        self.translate: Callable[[Exception], Exception] = _as_it_is
        self.status = 0
        self.content_type = "application/octet-stream"
        self.idle_since = 0.0
        self._ended = ended
        self._transport: asyncio.Transport | None = None
        self._parser = httptools.HttpResponseParser(self)
        self._pieces: list[bytes] = []
        self._waiting_bytes = 0
        self._paused = False
        self._has_head = self._complete = False
        self._busy = self._keeps = False
        self._error: Exception | None = None
        self._waiter: asyncio.Future[None] | None = None

    @property
    def usable(self) -> bool:
        """Whether another request may be sent: the last reply is whole, and the host keeps the connection."""
        alive = self._transport is not None and not self._transport.is_closing()
        return alive and self._error is None and not self._busy

    async def ask(self, method: str, path: str, body: bytes, headers: Mapping[str, str]) -> None:
        """Send a request; returns when the reply's head is there."""
        lines = [f"{method} {quote(path, safe=_SAFE_IN_PATH)} HTTP/1.1", "host: host"]
        lines += [f"{name}: {value}" for name, value in headers.items()]
        lines.append(f"content-length: {len(body)}")
        self.content_type = "application/octet-stream"
        self.translate = _as_it_is
        self._has_head = self._complete = False
        self._busy = True
        if self._transport is None or self._error is not None:
            raise self._error or HostGone("the connection is closed")
        self._transport.write("\r\n".join([*lines, "", ""]).encode("latin-1") + body)
        while not self._has_head:
            await self._more()

    async def chunk(self) -> bytes:
        """All bytes of the reply that have arrived, at least one; none at its end. Raises HostGone."""
        while not self._pieces:
            if self._complete:
                return b""
            # As in _more, without a coroutine for each chunk.
            if self._error is not None:
                raise self.translate(self._error) from self._error
            self._waiter = self.loop.create_future()
            await self._waiter
        pieces, self._pieces = self._pieces, []
        self._waiting_bytes = 0
        if self._paused:
            self._paused = False
            if self._transport is not None and not self._transport.is_closing():
                self._transport.resume_reading()
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    async def read(self) -> bytes:
        """The whole reply; raises HostGone."""
        pieces = []
        while piece := await self.chunk():
            pieces.append(piece)
        return b"".join(pieces)

    def close(self) -> None:
        """Keep the connection for another request if the reply is whole, else cut it. Idempotent."""
        if self._busy:
            # One that is not read any more is of no use to the next request.
            if self._complete and self._error is None and self._keeps and not self._paused:
                self._busy = False
                self._pieces.clear()
            self._ended(self)

    def cut(self, error: Exception | None = None) -> None:
        """Close it at once; who reads gets `error`."""
        self._fail(error or HostGone("the connection was closed"))
        if self._transport is not None:
            self._transport.abort()

    async def _more(self) -> None:
        """Returns when something has arrived."""
        if self._error is not None:
            raise self.translate(self._error) from self._error
        self._waiter = self.loop.create_future()
        await self._waiter

    def _fail(self, error: Exception) -> None:
        if self._error is None:
            self._error = error
        self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    # asyncio's protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # Not isinstance: uvloop's transports do not inherit from asyncio's.
        self._transport = transport  # type: ignore[assignment]

    def data_received(self, data: bytes) -> None:
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            self.cut(HostGone(f"the host's reply is not HTTP: {error}"))
            return
        waiter = self._waiter
        if waiter is not None and not waiter.done():
            waiter.set_result(None)

    def connection_lost(self, error: Exception | None) -> None:
        self._fail(HostGone(str(error) if error else "the host closed the connection"))
        if not self._busy:
            self._ended(self)

    # httptools' callbacks

    def on_header(self, name: bytes, value: bytes) -> None:
        if name.lower() == b"content-type":
            self.content_type = value.decode("latin-1")

    def on_headers_complete(self) -> None:
        self.status = self._parser.get_status_code()
        self._has_head = True

    def on_body(self, body: bytes) -> None:
        self._pieces.append(body)
        self._waiting_bytes += len(body)
        if self._waiting_bytes > HIGH_WATER_BYTES and not self._paused and self._transport is not None:
            self._paused = True
            self._transport.pause_reading()

    def on_message_complete(self) -> None:
        self._complete = True
        self._keeps = bool(self._parser.should_keep_alive())
