"""What a reader of a host's reply gets when the host or the service ends it."""

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from inference_service.engines.base import HostSpec
from inference_service.engines.host_client import HostClient
from inference_service.engines.process_engine import ProcessEngine
from inference_service.errors import EngineDied, EngineUnloaded
from tests.engines.test_host_client import OK, hosting

CHUNKED = OK + b"transfer-encoding: chunked\r\n\r\n"
Serve = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


def engine_over(client: HostClient, room: Path) -> ProcessEngine:
    """An engine that has started."""
    unused: Any = None
    engine = ProcessEngine(unused, HostSpec("m", "", "", (), {}, 1, 1.0), room / "engine", unused)
    engine._client = client
    return engine


def writes(content: bytes, *, then_closes: bool = False) -> Serve:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(content)
        await writer.drain()
        if then_closes:
            writer.close()

    return serve


async def test_a_head_with_nonsense_behind_it(tmp_path: Path) -> None:
    """In one piece: the reply fails before anybody has it."""
    async with hosting(writes(CHUNKED + b"zz\r\n"), tmp_path) as (client, _):
        engine = engine_over(client, tmp_path)

        async def whole() -> bytes:
            return await (await engine.forward("/", b"", "id")).read()

        with pytest.raises(EngineDied):
            await whole()


async def test_an_engine_that_is_unloaded_in_the_moment_the_head_arrives(tmp_path: Path) -> None:
    async with hosting(writes(CHUNKED), tmp_path) as (client, host):
        engine = engine_over(client, tmp_path)
        asked = asyncio.create_task(engine.forward("/", b"", "id"))
        await host.asked.wait()
        (connection,) = client._open
        while not connection._has_head:  # noqa: ASYNC110  (nothing reports it)
            await asyncio.sleep(0)
        engine.abort_all(EngineUnloaded("by the operator"))
        with pytest.raises(EngineUnloaded, match="by the operator"):
            await (await asked).chunk()


async def test_a_slow_reader_is_told_why_its_host_died(tmp_path: Path) -> None:
    async with hosting(writes(CHUNKED + b"5\r\nhello\r\n", then_closes=True), tmp_path) as (client, _):
        engine = engine_over(client, tmp_path)
        reply = await engine.forward("/", b"", "id")
        assert await reply.chunk() == b"hello"
        (connection,) = client._open
        while connection._error is None:  # noqa: ASYNC110  (nothing reports it)
            await asyncio.sleep(0.01)
        engine.abort_all(EngineDied("out of memory"))
        with pytest.raises(EngineDied, match="out of memory"):
            await reply.chunk()


async def test_a_reply_that_is_closed_again_does_not_touch_the_next_one(tmp_path: Path) -> None:
    async with hosting(writes(OK + b"content-length: 2\r\n\r\nok"), tmp_path) as (client, host):
        engine = engine_over(client, tmp_path)
        one = await engine.forward("/", b"", "id")
        await one.read()
        one.close()
        two = await engine.forward("/", b"", "id")
        one.close()
        one.abort_all(EngineDied("x"))
        assert await two.read() == b"ok"
        two.close()
        assert host.connections == 1
