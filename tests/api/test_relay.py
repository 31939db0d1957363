"""The relay in-process: whatever moment a request ends in, it leaves nothing behind."""

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
from fastapi import Request
from starlette.types import Message

from inference_service.api.relay import Relay
from inference_service.api.schemas.requests import CompletionBody
from inference_service.api.service import Service
from inference_service.checkpoints.memory_profile import Footprint
from inference_service.checkpoints.snapshot import Snapshot
from inference_service.config import Backend, Settings, WaitLimit
from inference_service.engines.base import Reply
from inference_service.machine.device import Device, DeviceKind
from inference_service.metrics import Metrics
from inference_service.pool.lifecycle import Limits
from inference_service.pool.loader import Parts
from inference_service.pool.pool import Pool
from inference_service.revisions.resolver import Resolver
from inference_service.revisions.rollout import Rollout
from inference_service.scheduler.state import Policy
from inference_service.storage.model import Model, Requested
from inference_service.storage.registry import Registry
from tests.pool.gated import GatedEngine, model

# More turns of the loop than a request takes from its start to its end.
MOMENTS = 60


class SlowReply:
    """Three words, a turn of the loop before each."""

    status = 200

    def __init__(self, *, stream: bool) -> None:
        self.content_type = "text/event-stream" if stream else "application/json"
        self.closed = False
        self._words = iter(("the", "quick", "brown"))

    async def chunk(self) -> bytes:
        await asyncio.sleep(0)
        word = next(self._words, None)
        if word is None:
            return b"data: [DONE]\n\n"
        return b"data: " + json.dumps({"choices": [{"text": word}]}).encode() + b"\n\n"

    async def read(self) -> bytes:
        await asyncio.sleep(0)
        return b'{"choices": [], "usage": {"prompt_tokens": 1, "completion_tokens": 3}}'

    def close(self) -> None:
        self.closed = True


class SlowEngine(GatedEngine):
    def __init__(self, snapshot: Snapshot) -> None:
        super().__init__(snapshot)
        self.replies: list[SlowReply] = []
        self.started.set_result(None)
        self.may_close.set_result(None)

    async def forward(self, path: str, body: bytes, request_id: str) -> Reply:
        await asyncio.sleep(0)
        reply = SlowReply(stream=json.loads(body)["stream"])
        self.replies.append(reply)
        return reply


class Client:
    """The two ends of an ASGI connection."""

    def __init__(self) -> None:
        self.left = asyncio.Event()
        self.messages: list[Message] = []

    async def receive(self) -> Message:
        await self.left.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Message) -> None:
        await asyncio.sleep(0)  # as a client that reads slowly makes it
        self.messages.append(message)


class KnownModel(Resolver):
    """Every name is the model's own."""

    async def resolve(self, name: str) -> Requested[Model]:
        return Requested(model(name))


class Bench:
    def __init__(self, grace: float) -> None:
        self.engines: list[SlowEngine] = []
        metrics = Metrics()
        self.pool = Pool(
            Parts(
                self._fetch,
                lambda snapshot: None,
                self._make,
                self._free_bytes,
                lambda model: Footprint(1, 0, 0),
            ),
            metrics,
            policy=Policy(slots=1, concurrency=2),
            limits=Limits(WaitLimit(100), WaitLimit(100), load_timeout=100),
        )
        rollout = Rollout(self.pool, cast(Registry, None), metrics, 1000)
        self.service = Service(
            Settings(cold_start_grace=grace, gcs_bucket="file:///"),
            Device(DeviceKind.CPU, "cpu"),
            Backend.FAKE,
            cast(Registry, None),
            self.pool,
            rollout,
            KnownModel(cast(Registry, None), self.pool, rollout),
            metrics,
        )

    async def _fetch(self, model: Model, entered: Callable[[str], None]) -> Snapshot:
        await asyncio.sleep(0)
        return Snapshot(model.name, model.revision, Path("/nowhere"), 1)

    def _make(self, snapshot: Snapshot, footprint: Footprint) -> SlowEngine:
        self.engines.append(SlowEngine(snapshot))
        return self.engines[-1]

    async def _free_bytes(self) -> int | None:
        return None

    def ask(self, client: Client, *, stream: bool) -> "asyncio.Task[None]":
        scope: dict[str, Any] = {
            "type": "http",
            "method": "POST",
            "path": "/v1/completions",
            "headers": [],
            "query_string": b"",
            "server": ("x", 80),
            "scheme": "http",
            "state": {"engine_request_id": "id", "arrived": 0.0},
        }
        scope["state"]["arrived"] = asyncio.get_running_loop().time()
        body = CompletionBody.model_validate({"model": "m", "prompt": "x", "stream": stream})
        relay = Relay(self.service, body, Request(scope, client.receive))
        return asyncio.create_task(relay(scope, client.receive, client.send))


async def settle() -> None:
    for _ in range(MOMENTS):
        await asyncio.sleep(0)


@pytest.mark.parametrize("stream", [True, False], ids=["stream", "whole"])
@pytest.mark.parametrize("end", ["client leaves", "task is cancelled", "service stops", "engine dies"])
@pytest.mark.parametrize("grace", [100.0, 0.0], ids=["", "with comments"])
async def test_whatever_moment_a_request_ends_in_nothing_is_left(
    end: str, stream: bool, grace: float
) -> None:
    for moment in range(MOMENTS):
        bench, client = Bench(grace), Client()
        request = bench.ask(client, stream=stream)
        for _ in range(moment):
            await asyncio.sleep(0)
        if end == "client leaves":
            client.left.set()
        elif end == "task is cancelled":
            request.cancel()
        elif end == "service stops":
            for relay in bench.service.relays:
                relay.end_by(0.0)
        elif bench.engines and not bench.engines[0].dead.done():
            bench.engines[0].dead.set_result("killed")
        await asyncio.wait({request}, timeout=5)
        assert request.done(), f"moment {moment}"
        await settle()
        assert (await bench.pool.stats())["leases"] == 0, f"moment {moment}"
        assert all(reply.closed for engine in bench.engines for reply in engine.replies), f"moment {moment}"
        assert not bench.service.relays
        assert "waiting: none" in repr(bench.pool)
        starts = [message for message in client.messages if message["type"] == "http.response.start"]
        assert len(starts) <= 1, "a response begins once"
        await bench.pool.close()
        left = asyncio.all_tasks() - {asyncio.current_task()}
        assert not left, f"moment {moment}: {left}"


async def test_a_request_that_nothing_ends_is_answered() -> None:
    for stream in (True, False):
        bench, client = Bench(0.0), Client()
        await asyncio.wait_for(bench.ask(client, stream=stream), 5)
        assert client.messages[0]["status"] == 200
        assert client.messages[-1]["more_body"] is False
        await bench.pool.close()
