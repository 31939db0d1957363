"""The real engines when things go wrong: killed, stopped, truncated, cancelled, swapped for hours."""

import json
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import httpx2
import openai
import psutil
import pytest

from tests.e2e.conftest import NOISE, real_service
from tests.e2e.engines import Engine
from tests.e2e.test_lifecycle import group_members, start_stream
from tests.e2e.test_openai_client import BASE, TUNED, ask
from tests.fixtures.bucket import Bucket
from tests.fixtures.checkpoints import Checkpoints
from tests.fixtures.service_process import ServiceProcess

ENDLESS = {"ignore_eos": True}
STALL_SECONDS = 10
# For what is told at once, on a machine that has other things to do: sooner than a stall is noticed.
SOON_SECONDS = 8.0
# Loads of one process: a leak of each shows between the first few and the last few.
CYCLES = [8, pytest.param(24, marks=pytest.mark.slow)]


@pytest.fixture(scope="module")
def frail(
    family: Bucket, tmp_path_factory: pytest.TempPathFactory, engine: Engine
) -> Iterator[ServiceProcess]:
    """One slot, and engines that may not hang for long."""
    settings = {
        "MAX_CACHED_MODELS": "1",
        "MIN_RESIDENCY": "0",
        "WEIGHT_SWAP": "off",
        "ENGINE_STALL_TIMEOUT": str(STALL_SECONDS),
        "CATALOG_TTL": "0",
    }
    with real_service(family, tmp_path_factory.mktemp("frail"), engine, **settings) as service:
        yield service


def core_of(service: ServiceProcess) -> psutil.Process:
    """What computes: vLLM's engine core, the host's only child; else the host itself."""
    host = psutil.Process(service.engine(BASE)["process_id"])
    return next(iter(host.children()), host)


def endless_stream(service: ServiceProcess) -> "openai.Stream[openai.types.Completion]":
    stream = service.openai.completions.create(
        model=BASE, prompt="Once", max_tokens=1500, stream=True, extra_body=ENDLESS
    )
    next(stream)
    return stream


@pytest.mark.parametrize(
    ("number", "seconds"),
    [(signal.SIGKILL, SOON_SECONDS), (signal.SIGSTOP, STALL_SECONDS + SOON_SECONDS)],
    ids=["killed", "stopped"],
)
def test_an_engine_core_that_is_gone_fails_its_requests_in_seconds(
    frail: ServiceProcess, number: signal.Signals, seconds: float
) -> None:
    assert ask(frail, BASE) == "The capital of France is Paris."
    stream = endless_stream(frail)
    host = frail.engine(BASE)["process_id"]
    core = core_of(frail)
    started = time.monotonic()
    core.send_signal(number)
    with pytest.raises(openai.APIError):
        list(stream)
    assert time.monotonic() - started < seconds
    frail.wait_until(lambda: group_members(host) == [], 5)
    assert ask(frail, BASE) == "The capital of France is Paris.", "a fresh engine"
    stats = frail.stats()
    assert (stats["leases"], len(stats["engines"])) == (0, 1)


def test_whole_answers_of_a_core_that_is_killed_are_errors(frail: ServiceProcess) -> None:
    ask(frail, BASE)
    core = core_of(frail)
    body = {"model": BASE, "prompt": "Once", "max_tokens": 1500, "ignore_eos": True}
    with ThreadPoolExecutor(1) as threads:
        asking = threads.submit(frail.http.post, "/v1/completions", json=body)
        frail.wait_until(lambda: frail.engine(BASE)["running"] == 1, 10)
        killed = time.monotonic()
        core.kill()
        assert asking.result().status_code in (502, 503)
        assert time.monotonic() - killed < SOON_SECONDS


def test_truncated_weights_are_told_and_harm_nobody(
    frail: ServiceProcess, family: Bucket, checkpoints: Checkpoints
) -> None:
    ask(frail, BASE)
    weights = (checkpoints.base / "model.safetensors").read_bytes()
    family.upload(checkpoints.base, "models/cut", {"model.safetensors": weights[: len(weights) // 2]})
    try:
        with pytest.raises(openai.APIStatusError) as caught:
            ask(frail, "cut")
        assert caught.value.status_code in (422, 503)
        assert "model.safetensors" in caught.value.message
        assert "cut off" in caught.value.message or "incomplete" in caught.value.message
        assert ask(frail, BASE) == "The capital of France is Paris."
    finally:
        family.remove("models/cut/")


def test_weights_that_do_not_match_their_config_are_told_in_plain_words(
    frail: ServiceProcess, family: Bucket, checkpoints: Checkpoints
) -> None:
    config = json.loads((checkpoints.base / "config.json").read_bytes()) | {"num_hidden_layers": 31}
    family.upload(checkpoints.base, "models/mixed", {"config.json": json.dumps(config).encode()})
    try:
        with pytest.raises(openai.InternalServerError) as caught:
            ask(frail, "mixed")
        assert caught.value.code == "engine_start_failed"
        assert "its weights do not match its config.json" in caught.value.message
        with pytest.raises(openai.InternalServerError, match="failed once"):
            ask(frail, "mixed")
    finally:
        family.remove("models/mixed/")
    assert ask(frail, BASE) == "The capital of France is Paris."


def test_a_load_cancelled_halfway_leaves_nothing(frail: ServiceProcess, engine: Engine) -> None:
    def states() -> list[str]:
        return [engine["state"] for engine in frail.stats()["engines"] if engine["model"] == BASE]

    ask(frail, BASE)  # its files are there: what is cancelled is the engine's start
    ask(frail, TUNED)
    cancelled = 0
    for share in (0.05, 0.1, 0.5):
        with pytest.raises(openai.APITimeoutError):
            frail.client(timeout=share * engine.load_seconds).completions.create(
                model=BASE, prompt="x", max_tokens=1
            )
        frail.wait_until(lambda: frail.stats()["waiters"] == [], 10)
        frail.wait_until(lambda: states() in ([], ["ready"]), 30)
        cancelled += states() == []
        for model in (BASE, TUNED):  # the one before may be there still: it gives way at the last moment
            frail.http.post(f"/admin/unload/{model}").raise_for_status()
        frail.wait_until(lambda: len(frail.descendants()) == 1, 6)  # nothing but the launcher
    assert cancelled >= 1, "a load takes longer than it is kept up for a client that may come back"
    assert ask(frail, TUNED) == "The capital of France is Zubrowka."


@pytest.mark.parametrize("cycles", CYCLES)
def test_memory_and_processes_stay_flat_over_many_loads(frail: ServiceProcess, cycles: int) -> None:
    """Many loads and evictions, two models in turn."""
    sizes, processes, descriptors = [], [], []
    answers: dict[str, set[str]] = {model: set() for model in NOISE}
    for number in range(cycles):
        model = NOISE[number % 2]
        answers[model].add(ask(frail, model))
        family = [psutil.Process(frail.process.pid), *frail.descendants()]
        sizes.append(sum(process.memory_full_info().pss for process in family))
        processes.append(len(family))
        descriptors.append([process.num_fds() for process in family[:2]])
    assert [len(texts) for texts in answers.values()] == [1, 1]
    # The first few fill allocators and caches.
    first, last = min(sizes[2:5]), min(sizes[-3:])
    assert last < 1.05 * first, [size >> 20 for size in sizes]
    assert len(set(processes)) == 1, processes
    # One that is open for a moment is no leak: that would be one for each load, three by then.
    assert max(map(max, descriptors[-3:])) <= max(map(max, descriptors[2:5])) + 2, descriptors


def has_process(service: ServiceProcess, model: str) -> bool:
    """An engine that is loaded for nobody in particular may not be there at once."""
    return any(each["model"] == model and each["process_id"] for each in service.stats()["engines"])


def test_sigterm_twice_during_a_load_with_twenty_streams(
    bucket: Bucket, tmp_path: Path, engine: Engine
) -> None:
    settings = {"PRELOAD_MODELS": BASE, "MAX_CACHED_MODELS": "2"}
    with real_service(bucket, tmp_path, engine, **settings) as service, ExitStack() as connections:
        service.wait_ready(BASE)
        clients = [connections.enter_context(start_stream(service, tokens=1900)[0]) for _ in range(20)]
        httpx2.post(f"{service.url}/admin/load/{TUNED}?wait=false", timeout=60).raise_for_status()
        service.wait_until(lambda: has_process(service, TUNED), 60)
        family = service.descendants()
        started = time.monotonic()
        service.signal(signal.SIGTERM)
        time.sleep(0.5)
        service.signal(signal.SIGTERM)
        ends = []
        for client in clients:
            received = b""
            while chunk := client.recv(65536):
                received += chunk
            ends.append(received)
        assert all(b"shutting_down" in end for end in ends), "each is told"
        assert service.process.wait(20) == 0
        assert time.monotonic() - started < 15
        assert psutil.wait_procs(family, timeout=10)[1] == []


def test_a_second_model_waits_until_the_firsts_memory_is_back(
    bucket: Bucket, tmp_path: Path, engine: Engine
) -> None:
    """Two slots, memory for one engine: the other goes, though a slot is free. A SIGKILL leaves nothing."""
    total = psutil.virtual_memory().total
    one_and_a_half = 1.7 * (1 << 30)
    settings = {"GPU_MEMORY_UTILIZATION": f"{one_and_a_half / total:.4f}", "MIN_RESIDENCY": "0"}
    with real_service(bucket, tmp_path, engine, **settings) as service:
        ask(service, BASE)
        reserved = service.stats()["budget"]["reserved_bytes"]
        assert reserved <= one_and_a_half < 2 * reserved
        first = service.engine(BASE)
        used = sum(process.memory_full_info().uss for process in group_members(first["process_id"]))
        assert used < 1.1 * sum(first["memory"].values()), "what is reserved is what is used"
        assert 0.5 * used < first["measured_bytes"] < 1.1 * sum(first["memory"].values())
        assert ask(service, TUNED) == "The capital of France is Zubrowka."
        assert [engine["model"] for engine in service.stats()["engines"]] == [TUNED]
        family = service.descendants()
        assert len(family) == 1 + engine.processes
        service.signal(signal.SIGKILL)
        service.process.wait()
        _, left = psutil.wait_procs(family, timeout=15)
        assert left == []


def test_sigkill_of_the_service_during_a_load_leaves_no_process(frail: ServiceProcess) -> None:
    """The last test of `frail`."""
    frail.http.post(f"/admin/load/{TUNED}").raise_for_status()
    frail.http.post(f"/admin/load/{BASE}?wait=false").raise_for_status()
    frail.wait_until(lambda: has_process(frail, BASE), 60)
    family = frail.descendants()
    assert len(family) >= 2, "launcher and host"
    frail.signal(signal.SIGKILL)
    frail.process.wait()
    _, left = psutil.wait_procs(family, timeout=15)
    assert left == []
