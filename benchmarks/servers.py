"""The measured servers, as child processes: this service, and vLLM's own."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from inference_service.backends.base import choose_backend
from inference_service.backends.environment import launcher_environment
from inference_service.backends.vllm import vllm_arguments
from inference_service.checkpoints.memory_profile import Footprint, Weights, memory_profile_of
from inference_service.checkpoints.safetensors import LENGTH_BYTES, header_bytes, parse_header
from inference_service.checkpoints.serving_config import Serving
from inference_service.checkpoints.snapshot import Snapshot
from inference_service.config import Backend, Settings
from inference_service.machine.device import Device, find_device
from inference_service.pool.budget import Budget

START_SECONDS = 300.0
SHARE_OF_MEMORY = 0.4
_ERROR = re.compile(r"\w(Error|Exception): ")


class DidNotStart(Exception):
    """A measured server ended, or did not listen in time. The message holds its last errors."""


@dataclass(frozen=True)
class Server:
    """A running server under measurement. `name`: its name in the tables."""

    name: str
    url: str
    process: subprocess.Popen[bytes]

    @property
    def address(self) -> str:
        return self.url.removeprefix("http://")

    def processes(self) -> list[psutil.Process]:
        """The server's process and its descendants."""
        leader = psutil.Process(self.process.pid)
        return [leader, *leader.children(recursive=True)]

    def wait_until_up(self, path: str, log: Path) -> None:
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                break
            try:
                urllib.request.urlopen(self.url + path, timeout=2).close()  # noqa: S310  (our own)
                return
            except (urllib.error.URLError, ConnectionError, TimeoutError):
                time.sleep(0.2)
        errors = [line for line in log.read_text(errors="replace").splitlines() if _ERROR.search(line)]
        raise DidNotStart(f"{self.name} did not start: {' | '.join(errors[-6:])}")


@contextmanager
def this_service(model: Path, settings: Settings, **more: str) -> Iterator[Server]:
    """The service over the directory that holds `model`, which is loaded by the first request."""
    prefix = f"{model.parent.name}/"
    with this_service_over(model.parent.parent, settings, GCS_MODEL_PREFIX=prefix, **more) as server:
        yield server


@contextmanager
def this_service_over(bucket: Path, settings: Settings, **more: str) -> Iterator[Server]:
    """The service over a directory as its bucket, with its own cache. `more`: further settings."""
    port = free_port()
    environment = {
        "GCS_BUCKET": f"file://{bucket}",
        "MAX_MODEL_LEN": str(settings.max_model_len),
        "MAX_CACHED_MODELS": str(settings.max_cached_models),
        "LISTEN_ADDRESS": "127.0.0.1",
        "PORT": str(port),
        "LOG_LEVEL": "WARNING",
        **more,
    }
    with tempfile.TemporaryDirectory() as room:
        environment["LOCAL_MODEL_CACHE"] = f"{room}/cache"
        command = [sys.executable, "-m", "inference_service"]
        with running("this service", command, environment, port, Path(room), "/ready") as server:
            yield server


@contextmanager
def vllm_server(name: str, model: Path, settings: Settings | None, *, tuned: bool = True) -> Iterator[Server]:
    """`python -m vllm.entrypoints.openai.api_server`.

    With `settings`: the arguments, and if `tuned` the environment, that this service gives its engine.
    Without: vLLM's defaults, except for the share of memory. By default vLLM does not start unless 92 % of
    the machine's memory is free, which is never the case beside another server.
    """
    port = free_port()
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
    command += ["--host", "127.0.0.1", "--port", str(port)]
    environment = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
    if settings is None:
        command += ["--model", str(model), "--served-model-name", model.name]
        command += ["--gpu-memory-utilization", str(SHARE_OF_MEMORY)]
    else:
        device = find_device()
        snapshot = Snapshot(model.name, "", model, 0)
        command += vllm_arguments(settings, device, snapshot, _footprint(settings, device, model))
        if tuned:
            environment = launcher_environment(choose_backend(settings.engine, device), device)
    with (
        tempfile.TemporaryDirectory() as room,
        running(name, command, environment, port, Path(room), "/health") as server,
    ):
        yield server


def _footprint(settings: Settings, device: Device, model: Path) -> Footprint:
    """The footprint that this service would compute for an engine of the checkpoint."""
    weights = Weights({})
    for file in model.glob("*.safetensors"):
        with file.open("rb") as opened:
            size = file.stat().st_size
            length = header_bytes(opened.read(LENGTH_BYTES), size)
            weights.tensors.update(parse_header(opened.read(length), size))
    config = json.loads((model / "config.json").read_text())
    budget = Budget(device, Backend.VLLM, settings.gpu_memory_utilization, settings.slots)
    return budget.footprint(memory_profile_of(config, Serving(), weights, settings, device, Backend.VLLM))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@contextmanager
def running(
    name: str, command: list[str], environment: dict[str, str], port: int, room: Path, path: str
) -> Iterator[Server]:
    """Run `command` until the block ends. It is up once GET `path` is answered. `room`: holds its log."""
    log = room / "server.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            env=os.environ | environment,
            cwd=room,  # without a .env
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    server = Server(name, f"http://127.0.0.1:{port}", process)
    try:
        server.wait_until_up(path, log)
        yield server
    finally:
        _end(process)


def _end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    with suppress(subprocess.TimeoutExpired):
        process.wait(20)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
