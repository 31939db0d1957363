"""This service with the fake engine: a bucket, one loaded model and its host process."""

import json
import sys
import tempfile
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

from benchmarks.servers import DidNotStart, free_port, running
from inference_service.config import Settings

MODEL = "words"


@dataclass(frozen=True)
class FakeService:
    """A running service with its only model loaded."""

    address: str
    process: psutil.Process
    host: psutil.Process
    host_socket: str

    @property
    def processes(self) -> dict[str, list[psutil.Process]]:
        return {"service": [self.process], "host": [self.host]}


@contextmanager
def fake_service(tokens_per_second: float, **settings: str) -> Iterator[FakeService]:
    """The service with `settings` and defaults for the rest, regardless of this environment."""
    port = free_port()
    with tempfile.TemporaryDirectory() as directory:
        room = Path(directory)
        _write_model(room / "bucket/models" / MODEL)
        # An empty variable counts as unset.
        environment = {name.upper(): "" for name in (*Settings.model_fields, "K_SERVICE")} | {
            "GCS_BUCKET": f"file://{room}/bucket",
            "LOCAL_MODEL_CACHE": f"{room}/cache",
            "LISTEN_ADDRESS": "127.0.0.1",
            "PORT": str(port),
            "ENGINE": "fake",
            "FAKE_TOKENS_PER_SECOND": str(tokens_per_second),
            "DRAIN_TIMEOUT": "1",
            **settings,
        }
        command = [sys.executable, "-m", "inference_service"]
        with running("this service", command, environment, port, room, "/ready") as server:
            _load_model(server.url)
            host, socket = _find_host(server.process.pid)
            process = psutil.Process(server.process.pid)
            yield FakeService(f"127.0.0.1:{port}", process, host, socket)


def _write_model(directory: Path) -> None:
    """The files of a model; the fake engine does not read their contents."""
    directory.mkdir(parents=True)
    (directory / "config.json").write_text("{}")
    (directory / "tokenizer.json").write_text("{}")
    (directory / "model.safetensors").write_bytes(b"words" * 100)


def _load_model(url: str) -> None:
    """Load the model, and send twenty more requests to warm up."""
    body = json.dumps({"model": MODEL, "prompt": "Tell me of the fox.", "max_tokens": 1}).encode()
    for _ in range(21):
        request = urllib.request.Request(  # noqa: S310  (our own)
            f"{url}/v1/completions", body, {"content-type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=60) as answer:  # noqa: S310
            answer.read()


def _find_host(service: int) -> tuple[psutil.Process, str]:
    """The process that listens on the engine's unix socket, and the socket's path."""
    for process in psutil.Process(service).children(recursive=True):
        for found in process.net_connections("unix"):
            if str(found.laddr).endswith("host.sock"):
                return process, str(found.laddr)
    raise DidNotStart("the service has no host")
