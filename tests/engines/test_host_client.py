"""HTTP to a host: pieces as they come, connections used again, and what a host that misbehaves causes."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from inference_service.engines import host_client
from inference_service.engines.host_client import HostClient, HostConnection, HostGone

Serve = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]
OK = b"HTTP/1.1 200 OK\r\ncontent-type: text/plain\r\n"


class Host:
    """A server on a unix socket whose replies a test writes byte by byte."""

    def __init__(self, serve: Serve, path: Path) -> None:
        self.connections = 0
        self.requests: list[bytes] = []
        self.asked = asyncio.Event()
        self.handling: list[asyncio.Task[None]] = []
        self.path = path
        self._serve = serve

    async def handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self.handling.append(task)
        self.connections += 1
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                length = int(head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0])
                self.requests.append(head + await reader.readexactly(length))
                self.asked.set()
                await self._serve(reader, writer)
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()
            await asyncio.sleep(0.01)


@asynccontextmanager
async def hosting(
    serve: Serve, tmp_path: Path, keep_alive: float = 60
) -> AsyncIterator[tuple[HostClient, Host]]:
    host = Host(serve, tmp_path / "s")
    server = await asyncio.start_unix_server(host.handle, str(host.path))
    client = HostClient(str(host.path), keep_alive)
    try:
        yield client, host
    finally:
        client.close()
        server.close()
        await asyncio.gather(*host.handling)


def replying(*pieces: bytes, pause: float = 0.0) -> Serve:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for piece in pieces:
            writer.write(piece)
            await writer.drain()
            await asyncio.sleep(pause)

    return serve


async def fetched(client: HostClient, path: str = "/a") -> bytes:
    reply = await client.request("GET", path)
    try:
        return await reply.read()
    finally:
        reply.close()


async def test_a_connection_is_used_again(tmp_path: Path) -> None:
    async with hosting(replying(OK + b"content-length: 2\r\n\r\nhi"), tmp_path) as (client, host):
        assert [await fetched(client) for _ in range(3)] == [b"hi"] * 3
        assert host.connections == 1
        reply = await client.request("POST", "/b c/ü@1", b"body", {"x-request-id": "7"})
        assert (reply.status, reply.content_type, await reply.read()) == (200, "text/plain", b"hi")
        reply.close()
        reply.close()
        assert host.requests[-1].startswith(
            b"POST /b%20c/%C3%BC@1 HTTP/1.1\r\nhost: host\r\nx-request-id: 7\r\n"
        )
        assert host.requests[-1].endswith(b"\r\n\r\nbody")
        both = await asyncio.gather(fetched(client), fetched(client))
        assert list(both) == [b"hi", b"hi"]
        assert host.connections == 2


async def test_an_old_connection_is_not_used_again(tmp_path: Path) -> None:
    async with hosting(replying(OK + b"content-length: 0\r\n\r\n"), tmp_path, keep_alive=0) as (client, host):
        assert [await fetched(client) for _ in range(2)] == [b"", b""]
        assert host.connections == 2


async def test_a_connection_that_the_host_has_closed_is_not_used_again(tmp_path: Path) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(OK + b"content-length: 2\r\n\r\nhi")
        await writer.drain()
        writer.close()

    async with hosting(serve, tmp_path) as (client, host):
        for _ in range(3):
            assert await fetched(client) == b"hi"
            await asyncio.sleep(0.02)
        assert host.connections == 3
        assert client._open == set()


async def test_pieces_come_as_they_arrive_whatever_the_bytes_are_cut_into(tmp_path: Path) -> None:
    stream = OK + b"transfer-encoding: chunked\r\n\r\n5\r\nfirst\r\n6\r\nsecond\r\n0\r\n\r\n"
    async with hosting(replying(*(stream[n : n + 1] for n in range(len(stream)))), tmp_path) as (client, _):
        assert await fetched(client) == b"firstsecond"
    head, *chunks = OK + b"transfer-encoding: chunked\r\n\r\n", b"1\r\na\r\n", b"1\r\nb\r\n", b"0\r\n\r\n"
    async with hosting(replying(head, *chunks, pause=0.05), tmp_path) as (client, _):
        reply = await client.request("GET", "/")
        assert [await reply.chunk() for _ in range(4)] == [b"a", b"b", b"", b""]
        reply.close()


async def test_what_has_arrived_meanwhile_comes_at_once(tmp_path: Path) -> None:
    chunks = [b"1\r\na\r\n"] * 5
    async with hosting(replying(OK + b"transfer-encoding: chunked\r\n\r\n", *chunks), tmp_path) as (
        client,
        _,
    ):
        reply = await client.request("GET", "/")
        await asyncio.sleep(0.1)
        assert await reply.chunk() == b"aaaaa"
        reply.close()


@pytest.mark.parametrize(
    "answer",
    [
        pytest.param(b"", id="nothing"),
        pytest.param(b"no HTTP at all\r\n\r\n", id="no HTTP"),
        pytest.param(b"HTTP/1.1 200", id="half a head"),
    ],
)
async def test_a_host_without_an_answer(tmp_path: Path, answer: bytes) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(answer)
        await writer.drain()
        writer.close()

    async with hosting(serve, tmp_path) as (client, _):
        with pytest.raises(HostGone):
            await client.request("GET", "/")
        await asyncio.sleep(0.02)
        assert client._open == set()


async def test_a_host_that_dies_in_the_middle(tmp_path: Path) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(OK + b"content-length: 100\r\n\r\nhalf")
        await writer.drain()
        writer.transport.abort()

    async with hosting(serve, tmp_path) as (client, _):
        reply = await client.request("GET", "/")
        assert await reply.chunk() == b"half"
        with pytest.raises(HostGone):
            await reply.chunk()
        reply.close()
        assert client._open == set()


async def test_a_reply_that_is_closed_early_closes_its_connection(tmp_path: Path) -> None:
    gone = asyncio.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(OK + b"transfer-encoding: chunked\r\n\r\n1\r\na\r\n")
        await writer.drain()
        assert await reader.read() == b""
        gone.set()

    async with hosting(serve, tmp_path) as (client, _):
        reply = await client.request("GET", "/")
        reply.close()
        async with asyncio.timeout(10):
            await gone.wait()


@pytest.mark.parametrize("when", ["before the head", "in a stream"])
async def test_closing_the_client_wakes_who_waits(tmp_path: Path, when: str) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if when == "in a stream":
            writer.write(OK + b"transfer-encoding: chunked\r\n\r\n")
        await reader.read()

    async with hosting(serve, tmp_path) as (client, host):
        waiting = asyncio.create_task(fetched(client))
        await host.asked.wait()
        client.close()
        with pytest.raises(HostGone):
            async with asyncio.timeout(10):
                await waiting
        with pytest.raises(HostGone):
            await client.request("GET", "/")


async def test_a_cancelled_request_leaves_no_connection(tmp_path: Path) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()

    async with hosting(serve, tmp_path) as (client, host):
        waiting = asyncio.create_task(fetched(client))
        await host.asked.wait()
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        assert client._open == set()


async def test_a_slow_reader_holds_the_host_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_client, "HIGH_WATER_BYTES", 64 << 10)
    total, written = 64 << 20, 0

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal written
        writer.write(OK + f"content-length: {total}\r\n\r\n".encode())
        while written < total:
            writer.write(bytes(1 << 16))
            await writer.drain()
            written += 1 << 16

    async with hosting(serve, tmp_path) as (client, _):
        reply: HostConnection = await client.request("GET", "/")
        await asyncio.sleep(0.3)
        assert written < 8 << 20
        assert len(await reply.read()) == total
        reply.close()


async def test_a_connection_that_is_not_read_any_more_serves_no_other_request(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The whole reply is there, more than may wait, and its client has left."""
    monkeypatch.setattr(host_client, "HIGH_WATER_BYTES", 1000)

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(OK + b"content-length: 2000\r\n\r\n" + b"x" * 2000)

    async with hosting(serve, tmp_path) as (client, host):
        reply = await client.request("GET", "/")
        while not reply._complete:  # noqa: ASYNC110  (nothing reports it)
            await asyncio.sleep(0.01)
        reply.close()
        async with asyncio.timeout(10):
            assert len(await (await client.request("GET", "/")).read()) == 2000
        assert host.connections == 2
