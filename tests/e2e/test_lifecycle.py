"""Engines that come and go, on real parts: eviction, timeouts, deaths, shutdown."""

import json
import os
import signal
import socket
import stat
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import psutil
import pytest

from tests.e2e.conftest import real_service
from tests.e2e.engines import REAL, Engine, shows
from tests.e2e.test_openai_client import BASE, TUNED, ask
from tests.fixtures.bucket import Bucket
from tests.fixtures.service_process import ServiceProcess


@pytest.fixture(scope="module")
def small(
    bucket: Bucket, tmp_path_factory: pytest.TempPathFactory, engine: Engine
) -> Iterator[ServiceProcess]:
    """One slot, and every model in an engine of its own."""
    settings = {
        "GCS_BUCKET": f"gs://{bucket.name}",
        "MAX_CACHED_MODELS": "1",
        "WEIGHT_SWAP": "off",
        "DRAIN_TIMEOUT": "8",
    }
    with real_service(bucket, tmp_path_factory.mktemp("small"), engine, **settings) as service:
        yield service


def group_members(leader: int) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        try:
            if os.getpgid(process.pid) == leader:
                found.append(process)
        except ProcessLookupError:
            continue
    return found


def resident_bytes(processes: list[psutil.Process]) -> int:
    return sum(process.memory_info().rss for process in processes)


def test_two_models_in_one_slot(small: ServiceProcess, engine: Engine) -> None:
    assert ask(small, BASE) == "The capital of France is Paris."
    first = small.engine(BASE)["process_id"]
    alone = resident_bytes(small.descendants())
    assert len(group_members(first)) == engine.processes

    assert ask(small, TUNED) == "The capital of France is Zubrowka."
    assert not psutil.pid_exists(first)
    assert group_members(first) == []
    assert [engine["model"] for engine in small.stats()["engines"]] == [TUNED]
    assert resident_bytes(small.descendants()) < 1.2 * alone, "its memory is back"

    assert ask(small, BASE) == "The capital of France is Paris."
    assert 'inference_evictions_total{model="smollm2-135m-instruct"} 1.0' in small.http.get("/metrics").text


def test_a_busy_engine_is_never_evicted(small: ServiceProcess) -> None:
    """A request for the other model waits for the stream's end, and the stream has all its tokens."""
    ask(small, BASE)
    stream = small.openai.completions.create(
        model=BASE,
        prompt="Once",
        max_tokens=60,
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"ignore_eos": True},
    )
    next(iter(stream))
    answers: list[str] = []
    other = threading.Thread(target=lambda: answers.append(ask(small, TUNED)))
    other.start()
    small.wait_until(lambda: small.stats()["waiters"] != [], 5)
    *_, last = stream
    assert last.usage is not None
    assert last.usage.completion_tokens == 60
    other.join()
    assert answers == ["The capital of France is Zubrowka."]


def test_sockets_are_private(small: ServiceProcess) -> None:
    ask(small, BASE)
    sockets = [
        Path(str(found.laddr))
        for process in small.descendants()
        for found in process.net_connections("unix")
        if str(found.laddr).endswith("host.sock")
    ]
    assert sockets
    for path in sockets:
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert stat.S_IMODE(path.parent.parent.stat().st_mode) == 0o700


@shows("death")
@pytest.mark.engine(*REAL)
def test_a_killed_engine_fails_its_stream_and_is_replaced(small: ServiceProcess) -> None:
    ask(small, BASE)
    pid = small.engine(BASE)["process_id"]
    stream = small.openai.completions.create(
        model=BASE, prompt="Once", max_tokens=1500, stream=True, extra_body={"ignore_eos": True}
    )
    iterator = iter(stream)
    next(iterator)
    os.kill(pid, signal.SIGKILL)
    with pytest.raises(openai.APIError, match="went away"):
        for _ in iterator:
            pass
    small.wait_until(lambda: group_members(pid) == [], 5)
    assert ask(small, BASE) == "The capital of France is Paris."


@pytest.mark.engine("vllm")
def test_an_engine_core_ends_with_its_host_by_itself(small: ServiceProcess) -> None:
    """Also when the launcher, which would sweep it away, cannot."""
    ask(small, BASE)
    host = psutil.Process(small.engine(BASE)["process_id"])
    (core,) = host.children()
    launcher = host.parent()
    assert launcher is not None
    launcher.suspend()
    try:
        host.kill()
        # A zombie: the launcher, to which it falls, reaps nothing while it is suspended.
        small.wait_until(lambda: core.status() == psutil.STATUS_ZOMBIE, 5)
    finally:
        launcher.resume()
    small.wait_until(lambda: small.stats()["engines"] == [], 5)


def test_a_load_that_fails_says_the_engines_reason(
    small: ServiceProcess, bucket: Bucket, checkpoints: Any
) -> None:
    config = json.loads((checkpoints.base / "config.json").read_bytes()) | {"num_attention_heads": 7}
    bucket.upload(checkpoints.base, "models/broken", {"config.json": json.dumps(config).encode()})
    try:
        with pytest.raises(openai.InternalServerError) as caught:
            ask(small, "broken")
    finally:
        bucket.remove("models/broken/")
    assert caught.value.code == "engine_start_failed"
    assert "number of attention" in caught.value.message
    assert ask(small, BASE) == "The capital of France is Paris."


def test_the_hosts_log_is_tagged_with_the_model(small: ServiceProcess, engine: Engine) -> None:
    ask(small, BASE)
    lines = [line for line in small.log_text().splitlines() if "inference_service.host" in line]
    said = {"vllm": "EngineCore", "transformers": "max_seq_len=2048"}[engine.name]
    assert any(f"model={BASE}" in line and said in line for line in lines)


@pytest.fixture(scope="module")
def hasty(
    bucket: Bucket, tmp_path_factory: pytest.TempPathFactory, engine: Engine
) -> Iterator[ServiceProcess]:
    """REQUEST_TIMEOUT=3, loaded beforehand: a preload is no request."""
    room = tmp_path_factory.mktemp("hasty")
    with real_service(bucket, room, engine, REQUEST_TIMEOUT="3", PRELOAD_MODELS=BASE) as service:
        service.wait_ready(BASE)
        yield service


def test_request_timeout(hasty: ServiceProcess) -> None:
    with pytest.raises(openai.InternalServerError) as caught:
        hasty.openai.completions.create(
            model=BASE, prompt="Once", max_tokens=1500, extra_body={"ignore_eos": True}
        )
    assert (caught.value.status_code, caught.value.code) == (504, "timeout")
    hasty.wait_until(lambda: hasty.engine(BASE)["running"] == 0, 10)


def test_request_timeout_of_a_stream(hasty: ServiceProcess) -> None:
    stream = hasty.openai.completions.create(
        model=BASE, prompt="Once", max_tokens=1500, stream=True, extra_body={"ignore_eos": True}
    )
    with pytest.raises(openai.APIError, match="REQUEST_TIMEOUT"):
        for _ in stream:
            pass
    hasty.wait_until(lambda: hasty.engine(BASE)["running"] == 0, 10)


def start_stream(service: ServiceProcess, tokens: int) -> tuple[socket.socket, bytes]:
    """A raw client, so that the wire itself can be looked at; with the bytes up to a first token."""
    asked = {"model": BASE, "prompt": "Once", "max_tokens": tokens, "ignore_eos": True, "stream": True}
    body = json.dumps(asked | {"stream_options": {"include_usage": True}})
    client = socket.create_connection(("127.0.0.1", service.port), timeout=30)
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
    client.sendall((head + body).encode())
    received = b""
    while b"data: " not in received:
        received += client.recv(65536)
    return client, received


def test_ctrl_c_ends_everything(hasty: ServiceProcess, engine: Engine) -> None:
    family = hasty.descendants()
    assert len(family) == 1 + engine.processes, "launcher and host"
    hasty.signal(signal.SIGINT)
    assert hasty.process.wait(20) == 0
    assert psutil.wait_procs(family, timeout=10)[1] == []


def test_sigterm_during_a_stream_lets_it_finish(small: ServiceProcess) -> None:
    """The last test of `small`."""
    ask(small, BASE)
    family = small.descendants()
    client, received = start_stream(small, tokens=4)
    endless, endless_received = start_stream(small, tokens=1900)
    small.signal(signal.SIGTERM)
    small.wait_until(lambda: small.http.get("/ready").status_code == 503, 4)
    refused = small.http.post("/v1/completions", json={"model": BASE, "prompt": "x"})
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "shutting_down")
    with client, endless:
        while chunk := client.recv(65536):
            received += chunk
        while chunk := endless.recv(65536):
            endless_received += chunk
    assert b'"completion_tokens":4' in received
    assert received.rstrip(b"\r\n0").endswith(b"data: [DONE]"), "the short one ends as if nothing was"
    assert b"shutting_down" in endless_received, "the long one is told why"
    assert b"[DONE]" not in endless_received
    assert small.process.wait(20) == 0
    assert psutil.wait_procs(family, timeout=10)[1] == []
