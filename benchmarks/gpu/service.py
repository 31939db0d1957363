"""The service under measurement: one at a time, started for the first step that wants it."""

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.fixtures.host_socket import weight_digests
from tests.fixtures.service_process import ServiceProcess

PROMPT = "Tell me of the fox."
TOKENS = 16
WAIT_SECONDS = 300.0


class Services:
    """Starts the service with the settings that a step wants, unless it runs with them already."""

    def __init__(self, bucket: Path, room: Path, **always: str) -> None:
        self.started_in = 0.0
        self._bucket = bucket
        self._room = room
        self._always = always
        self._running: tuple[dict[str, str], ServiceProcess] | None = None
        self._number = 0

    def get(self, **settings: str) -> "Measured":
        if self._running is None or self._running[0] != settings:
            self.close()
            self._running = (settings, self._start(settings))
        return Measured(self._running[1])

    def close(self) -> None:
        """End it, with all its processes."""
        if self._running is not None:
            self._running[1].close()
            self._running = None

    def _start(self, settings: dict[str, str]) -> ServiceProcess:
        self._number += 1
        room = self._room / f"service-{self._number}"
        room.mkdir()
        # One cache for all: what was fetched and compiled is there for the next.
        always = {"GCS_BUCKET": f"file://{self._bucket}", "LOCAL_MODEL_CACHE": str(self._room / "cache")}
        always |= {"LOAD_TIMEOUT": "600", "REQUEST_TIMEOUT": "900", "QUEUE_TIMEOUT": "600"} | self._always
        started = time.monotonic()
        service = ServiceProcess(room, **(always | settings))
        self.started_in = time.monotonic() - started
        return service


class Measured:
    """One running service, and what the steps ask of it."""

    def __init__(self, process: ServiceProcess) -> None:
        self.process = process

    def first_token(self, model: str, since: float | None = None) -> tuple[float, str]:
        """Seconds to the first token, from now or from `since` (monotonic), and the whole greedy text."""
        started, first, text = since or time.monotonic(), None, ""
        for at, event in self._events(model, TOKENS):
            first = first or at
            text += event["choices"][0]["text"] if event["choices"] else ""
        if first is None:
            raise RuntimeError(f"{model} returned no token")
        return first - started, text

    def text(self, model: str) -> str:
        return self.first_token(model)[1]

    def engine(self, model: str) -> dict[str, Any]:
        return self.process.engine(model)

    def digests(self, model: str) -> dict[str, str]:
        return weight_digests(self.engine(model)["process_id"])

    def unload(self) -> None:
        for engine in self.process.stats()["engines"]:
            self.process.http.post(f"/admin/unload/{engine['model']}?force=true").raise_for_status()

    def fresh(self, model: str) -> float:
        """Seconds to the first token of a fresh engine."""
        self.unload()
        return self.first_token(model)[0]

    def wait_until(self, true: Callable[[], bool]) -> None:
        self.process.wait_until(true, WAIT_SECONDS)

    @contextmanager
    def busy(self, model: str) -> "Iterator[list[float]]":
        """A stream of `model` that goes on until the end of the block; the times of its tokens."""
        times: list[float] = []
        ending = threading.Event()

        def read() -> None:
            for at, _ in self._events(model, 4_000):
                times.append(at)
                if ending.is_set():
                    return

        reading = threading.Thread(target=read, daemon=True)
        reading.start()
        self.wait_until(lambda: len(times) > 2)
        try:
            yield times
        finally:
            ending.set()
            reading.join(60)

    def _events(self, model: str, tokens: int) -> Iterator[tuple[float, dict[str, Any]]]:
        body = {"model": model, "prompt": PROMPT, "max_tokens": tokens, "stream": True}
        body |= {"temperature": 0, "ignore_eos": True}
        with self.process.http.stream("POST", "/v1/completions", json=body, timeout=900) as answer:
            if answer.status_code != 200:
                raise RuntimeError(f"{model}: {answer.status_code} {answer.read()[:300]!r}")
            for line in answer.iter_lines():
                if line.startswith("data: {"):
                    event = json.loads(line.removeprefix("data: "))
                    if "error" in event:
                        raise RuntimeError(event["error"]["message"])
                    yield time.monotonic(), event
