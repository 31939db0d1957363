"""SIGTERM: what runs may finish until DRAIN_TIMEOUT, the rest is told, nothing holds the end up."""

import json
import signal
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.fixtures.fakes import Fakes, ask
from tests.fixtures.service_process import ServiceProcess

# Of which 1.35 s are the service's own and the rest is a busy machine's.
SLACK_SECONDS = 8.0


def stream(service: ServiceProcess, model: str, tokens: int) -> socket.socket:
    """A raw client that has asked for a stream and reads nothing yet."""
    body = json.dumps(ask(model, max_tokens=tokens, stream=True)).encode()
    client = socket.create_connection(("127.0.0.1", service.port), timeout=30)
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
    client.sendall(head.encode() + body)
    return client


def read_all(client: socket.socket) -> bytes:
    received = b""
    with client:
        while chunk := client.recv(65536):
            received += chunk
    return received


@pytest.mark.parametrize("signals", [1, 2], ids=["once", "twice"])
def test_during_a_load_with_twenty_streams(fakes: Fakes, tmp_path: Path, signals: int) -> None:
    fakes.put("m")
    fakes.put("gated", gate=str(tmp_path / "never"))
    settings = {"DRAIN_TIMEOUT": "4", "FAKE_TOKENS_PER_SECOND": "20"}
    with fakes.service(**settings) as service, ThreadPoolExecutor(1) as threads, ExitStack() as clients:
        endless = [clients.enter_context(stream(service, "m", 100_000)) for _ in range(10)]
        service.wait_until(lambda: service.stats()["leases"] == 10, 10)
        short = [clients.enter_context(stream(service, "m", 60)) for _ in range(10)]
        waiting = threads.submit(service.http.post, "/v1/completions", json=ask("gated"))
        service.wait_until(lambda: service.stats()["leases"] == 20, 10)
        service.wait_until(lambda: any(e["model"] == "gated" for e in service.stats()["engines"]), 5)
        family = service.descendants()
        started = time.monotonic()
        service.signal(signal.SIGTERM)
        for _ in range(signals - 1):
            time.sleep(0.3)
            service.signal(signal.SIGTERM)
        refused = waiting.result()
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "shutting_down")
        assert all(b"[DONE]" in read_all(client) for client in short)
        ends = [read_all(client) for client in endless]
        assert all(b"shutting_down" in end and b"[DONE]" not in end for end in ends)
        assert service.process.wait(20) == 0
        assert time.monotonic() - started < 4 + SLACK_SECONDS
        assert psutil.wait_procs(family, timeout=10)[1] == []
        assert "Traceback" not in service.log_text()


@pytest.mark.parametrize(
    "script",
    [{"ignore_sigterm": True}, {"hang_after": 2}, {"stall_after": 2}],
    ids=["ignores SIGTERM", "hangs", "stalls"],
)
def test_an_engine_that_does_not_end_holds_nothing_up(fakes: Fakes, script: dict[str, Any]) -> None:
    fakes.put("m", script=script)
    with fakes.service(DRAIN_TIMEOUT="1") as service:
        client = stream(service, "m", 100_000)
        service.wait_until(lambda: service.stats()["leases"] == 1, 10)
        time.sleep(0.2)
        family = service.descendants()
        started = time.monotonic()
        service.signal(signal.SIGTERM)
        assert b"shutting_down" in read_all(client)
        assert service.process.wait(20) == 0
        assert time.monotonic() - started < 1 + SLACK_SECONDS
        assert psutil.wait_procs(family, timeout=10)[1] == []


def test_a_client_that_does_not_read_holds_nothing_up(fakes: Fakes) -> None:
    fakes.put("m")
    with (
        fakes.service(DRAIN_TIMEOUT="1", FAKE_TOKENS_PER_SECOND="1000000") as service,
        stream(service, "m", 10_000_000),
    ):
        service.wait_until(lambda: service.stats()["leases"] == 1, 10)
        time.sleep(1)
        started = time.monotonic()
        service.signal(signal.SIGTERM)
        assert service.process.wait(20) == 0
        assert time.monotonic() - started < 1 + SLACK_SECONDS


def test_an_operator_who_waits_for_a_busy_engine_holds_nothing_up(fakes: Fakes) -> None:
    fakes.put("m")
    with fakes.service(DRAIN_TIMEOUT="1") as service, ThreadPoolExecutor(1) as threads:
        client = stream(service, "m", 100_000)
        service.wait_until(lambda: service.stats()["leases"] == 1, 10)
        unloading = threads.submit(service.http.post, "/admin/unload/m")
        service.wait_until(lambda: service.engine("m")["state"] == "draining", 5)
        started = time.monotonic()
        service.signal(signal.SIGTERM)
        assert b"shutting_down" in read_all(client)
        assert service.process.wait(20) == 0
        assert time.monotonic() - started < 1 + SLACK_SECONDS
        assert unloading.exception() is not None or unloading.result().status_code == 200
