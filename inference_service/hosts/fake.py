"""A host without a model: deterministic words at a fixed rate, the same HTTP API, no torch.

For load tests of the service and for developers of clients; never the default. `arguments` of its HostSpec:
tokens per second of one stream, and the maximum rank of its adapters. The key `fake` of the model's
config.json sets how else it behaves and fails (see Script).
"""

import asyncio
import itertools
import json
import os
import signal
import socket
import time
import uuid
import zlib
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import uvicorn
from fastapi import FastAPI, Request
from pydantic_core import to_json
from starlette.responses import JSONResponse, Response, StreamingResponse

from inference_service.checkpoints.reference import model_of
from inference_service.engines.base import HostSpec
from inference_service.engines.process_title import retitle

_WORDS = ("the", "quick", "brown", "fox", "jumps", "over", "the", "lazy", "dog")


@dataclass(frozen=True)
class Script:
    """How one fake model behaves. Tokens are counted per stream.

    Its start takes `start_seconds`, waits for the file `gate`, allocates `memory_mib`, or fails with the
    error `fail_start`. After the given number of tokens the process is killed (`die_after`), blocks forever
    (`hang_after`), or keeps answering but generates no further token (`stall_after`).

    Models with the same `swap_key` can be swapped for one another. Swapping in a model with `fail_swap`
    fails, with `die_in_swap` it kills the host, with `wrong_weights` the old weights appear to stay. An
    adapter with `fail_adapter` is rejected. Preparing a model takes `prepare_seconds`, or is refused with the
    reason `refuse_prepare`. An engine with `fail_sleep` fails to fall asleep, with `die_in_sleep` it is
    killed; with a `sleep_gate` it waits for that file first. One that sleeps has freed its `memory_mib`.
    """

    start_seconds: float = 0.0
    gate: str | None = None
    memory_mib: int = 0
    fail_start: str | None = None
    die_after: int | None = None
    hang_after: int | None = None
    stall_after: int | None = None
    ignore_sigterm: bool = False
    swap_key: str | None = None
    fail_swap: str | None = None
    die_in_swap: bool = False
    wrong_weights: bool = False
    fail_adapter: str | None = None
    prepare_seconds: float = 0.0
    refuse_prepare: str | None = None
    fail_sleep: str | None = None
    die_in_sleep: bool = False
    sleep_gate: str | None = None

    @classmethod
    def of(cls, directory: Path) -> "Script":
        """Raises TypeError for an unknown key."""
        file = directory / "config.json"
        return cls(**json.loads(file.read_text()).get("fake", {})) if file.exists() else cls()

    def start(self) -> bytearray:
        """Take the time and memory of a start; raises RuntimeError if it should fail."""
        time.sleep(self.start_seconds)
        _wait_for(self.gate)
        if self.fail_start is not None:
            raise RuntimeError(self.fail_start)
        return self.weights()

    def weights(self) -> bytearray:
        return bytearray(os.urandom(1 << 20) * self.memory_mib)

    async def after(self, tokens: int) -> None:
        """What happens to a stream that has generated `tokens` tokens."""
        if tokens == self.die_after:
            os.kill(os.getpid(), signal.SIGKILL)
        if tokens == self.hang_after:
            time.sleep(1e6)  # noqa: ASYNC251  (the whole process must hang)
        if tokens == self.stall_after:
            await asyncio.Event().wait()


def _wait_for(gate: str | None) -> None:
    while gate is not None and not Path(gate).exists():
        time.sleep(0.01)


def run(spec: HostSpec, listener: socket.socket) -> None:
    """Serve until SIGTERM."""
    script = Script.of(Path(spec.directory))
    config = uvicorn.Config(
        build_app(spec, script, script.start()),
        log_level="warning",
        access_log=False,
        timeout_graceful_shutdown=1,
    )
    server = _Stubborn(config) if script.ignore_sigterm else uvicorn.Server(config)
    server.run(sockets=[listener])


class _Stubborn(uvicorn.Server):
    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Ignore the signal."""


def build_app(spec: HostSpec, script: Script, weights: bytearray) -> FastAPI:
    fake = _Fake(spec, script, weights)
    app = FastAPI()
    app.add_api_route("/health", fake.health)
    app.add_api_route("/control/heartbeat", fake.heartbeat)
    app.add_api_route("/control/weight-check", fake.weight_check)
    app.add_api_route("/control/swap", fake.swap, methods=["POST"])
    app.add_api_route("/control/sleep", fake.sleep, methods=["POST"])
    app.add_api_route("/control/prepare", fake.prepare, methods=["POST"])
    app.add_api_route("/control/forget", fake.forget, methods=["POST"])
    app.add_api_route("/control/adapters", fake.add_adapter, methods=["POST"])
    app.add_api_route("/control/adapters/{name}", fake.remove_adapter, methods=["DELETE"])
    app.add_api_route("/v1/chat/completions", fake.chat, methods=["POST"])
    app.add_api_route("/v1/completions", fake.completion, methods=["POST"])
    return app


class _Fake:
    def __init__(self, spec: HostSpec, script: Script, weights: bytearray) -> None:
        self._spec = spec
        self._script = script
        self._weights: bytearray | None = weights
        rate, *rank = spec.arguments
        self._token_seconds = 1 / float(rate)
        # Fixed at the start: a swap does not change it.
        self._takes_adapters = rank != ["0"]
        self._adapters: set[str] = set()
        self._prepared: set[str] = set()
        self._fingerprint = _fingerprint(spec)
        self._running = 0
        self._steps = 0
        self._stalled = 0

    async def health(self) -> dict[str, str]:
        return {"status": "ok"}

    async def heartbeat(self) -> dict[str, int]:
        # A client that does not read delays its tokens, which is no stall: the poll itself counts as a step.
        self._steps += self._stalled == 0
        return {"running": self._running, "steps": self._steps}

    async def weight_check(self) -> dict[str, Any]:
        return {"fingerprint": self._fingerprint}

    async def swap(self, request: Request) -> Response:
        """Serve another model, or fail as its script says."""
        spec = HostSpec.from_json(await request.json())
        script = Script.of(Path(spec.directory))
        if script.die_in_swap:
            os.kill(os.getpid(), signal.SIGKILL)
        if script.fail_swap is not None:
            return JSONResponse({"error": script.fail_swap}, 422)
        self._spec, self._script = spec, script
        retitle(spec.model)
        self._adapters.clear()
        self._weights = script.weights()
        if not script.wrong_weights:
            self._fingerprint = _fingerprint(spec)
        seconds = {"weights": 0.0, "warm-up": 0.0}
        way = "prepared" if spec.directory in self._prepared else "mapped"
        moved = {"copied_bytes": 1, "total_bytes": 1, "copied_from": {way: 1}}
        return JSONResponse({"fingerprint": self._fingerprint, "seconds": seconds, **moved})

    async def sleep(self) -> Response:
        """Drop the weights, or fail as its script says."""
        await asyncio.to_thread(_wait_for, self._script.sleep_gate)
        if self._script.die_in_sleep:
            os.kill(os.getpid(), signal.SIGKILL)
        if self._script.fail_sleep is not None:
            return JSONResponse({"error": self._script.fail_sleep}, 422)
        freed, self._weights = len(self._weights or b""), None
        self._adapters.clear()
        return JSONResponse({"freed_bytes": freed})

    async def prepare(self, request: Request) -> dict[str, Any]:
        directory = (await request.json())["directory"]
        script = Script.of(Path(directory))
        await asyncio.sleep(script.prepare_seconds)
        if script.refuse_prepare is None:
            self._prepared.add(directory)
        ready = int(script.refuse_prepare is None)
        return {"ready_bytes": ready, "total_bytes": 1, "refused": script.refuse_prepare}

    async def forget(self, request: Request) -> dict[str, Any]:
        self._prepared.discard((await request.json())["directory"])
        return {}

    async def add_adapter(self, request: Request) -> Response:
        command = await request.json()
        script = Script.of(Path(command["directory"]))
        if script.fail_adapter is not None:
            return JSONResponse({"error": script.fail_adapter}, 422)
        if not self._takes_adapters:
            return JSONResponse({"error": "this engine was started without adapters"}, 422)
        self._adapters.add(command["name"])
        return JSONResponse({})

    async def remove_adapter(self, name: str) -> dict[str, Any]:
        self._adapters.discard(name)
        return {}

    async def chat(self, request: Request) -> Response:
        body = await request.json()
        limit = body.get("max_completion_tokens") or body.get("max_tokens")
        prompt = " ".join(str(message.get("content")) for message in body["messages"])
        return await self._answer(body, _ChatShape(), prompt, limit)

    async def completion(self, request: Request) -> Response:
        body = await request.json()
        return await self._answer(body, _TextShape(), str(body["prompt"]), body.get("max_tokens"))

    async def _answer(
        self, body: dict[str, Any], shape: "_Shape", prompt: str, limit: int | None
    ) -> Response:
        if self._weights is None:
            return JSONResponse({"error": {"message": "The engine sleeps."}}, 500)
        name = body.get("model", self._spec.model)
        if name not in {self._spec.model, *self._adapters}:
            message = f"The model `{name}` does not exist."
            return JSONResponse({"error": {"message": message, "param": "model"}}, 404)
        count = limit or self._spec.default_max_tokens
        head = {
            "id": f"{shape.prefix}-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": model_of(name),
        }
        usage = {
            "prompt_tokens": len(prompt.split()),
            "completion_tokens": count,
            "total_tokens": len(prompt.split()) + count,
        }
        if body.get("stream"):
            options = body.get("stream_options") or {}
            events = self._events(head, shape, count, usage if options.get("include_usage") else None)
            return StreamingResponse(events, media_type="text/event-stream")
        text = "".join([token async for token in self._tokens(count)])
        whole = {"object": shape.whole_object, "choices": [shape.whole(text)], "usage": usage}
        return JSONResponse(head | whole)

    async def _events(
        self,
        head: dict[str, Any],
        shape: "_Shape",
        count: int,
        usage: dict[str, int] | None,
    ) -> AsyncIterator[bytes]:
        head = head | {"object": shape.part_object}
        async for token in self._tokens(count):
            yield _event(head | {"choices": [shape.part(token, None)]})
        yield _event(head | {"choices": [shape.part("", "length")]})
        if usage is not None:
            yield _event(head | {"choices": [], "usage": usage})
        yield b"data: [DONE]\n\n"

    async def _tokens(self, count: int) -> AsyncIterator[str]:
        """Words in a fixed order, each at its due time, even if the previous one was late."""
        self._running += 1
        stalled = False
        try:
            started = time.monotonic()
            for number, word in enumerate(_words(count), start=1):
                due = started + number * self._token_seconds
                await asyncio.sleep(max(0.0, due - time.monotonic()))
                self._steps += 1
                yield word
                if number == self._script.stall_after:
                    self._stalled += 1
                    stalled = True
                await self._script.after(number)
        finally:
            self._running -= 1
            self._stalled -= stalled


def _fingerprint(spec: HostSpec) -> list[tuple[int, float]]:
    """Stands in for a computed one: equal for the same weights, different for others."""
    weights = Path(spec.directory, "model.safetensors")
    content = weights.read_bytes() if weights.exists() else b""
    return [(number, -float(zlib.crc32(content, number) % 1000)) for number in range(4)]


class _Shape:
    prefix: str
    whole_object: str
    part_object: str

    def whole(self, text: str) -> dict[str, Any]:
        raise NotImplementedError

    def part(self, text: str, finish: str | None) -> dict[str, Any]:
        raise NotImplementedError


class _ChatShape(_Shape):
    prefix, whole_object, part_object = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def whole(self, text: str) -> dict[str, Any]:
        message = {"role": "assistant", "content": text}
        return {"index": 0, "message": message, "finish_reason": "length", "logprobs": None}

    def part(self, text: str, finish: str | None) -> dict[str, Any]:
        delta = {"content": text} if finish is None else {}
        return {"index": 0, "delta": delta, "finish_reason": finish, "logprobs": None}


class _TextShape(_Shape):
    prefix, whole_object, part_object = "cmpl", "text_completion", "text_completion"

    def whole(self, text: str) -> dict[str, Any]:
        return self.part(text, "length")

    def part(self, text: str, finish: str | None) -> dict[str, Any]:
        return {"index": 0, "text": text, "finish_reason": finish, "logprobs": None}


def _words(count: int) -> Iterator[str]:
    for number, word in enumerate(itertools.islice(itertools.cycle(_WORDS), count)):
        yield word if number == 0 else f" {word}"


def _event(chunk: dict[str, Any]) -> bytes:
    return b"data: " + to_json(chunk) + b"\n\n"
