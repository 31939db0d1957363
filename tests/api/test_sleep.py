"""Engines that sleep instead of ending, through HTTP, over engines whose script says how they behave."""

import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

from tests.api.test_swap import ONE, post
from tests.fixtures.fakes import Fakes
from tests.fixtures.service_process import ServiceProcess

LLAMA = {"swap_key": "llama", "memory_mib": 64}
QWEN = {"swap_key": "qwen", "memory_mib": 64}
SLEEPING = ONE | {"MAX_SLEEPING": "1"}


@pytest.fixture
def service(fakes: Fakes) -> Iterator[ServiceProcess]:
    """`a` sleeps, `b` serves; `a2` is of the kind of `a`."""
    fakes.put("a", script=LLAMA)
    fakes.put("a2", script=LLAMA)
    fakes.put("b", script=QWEN)
    with fakes.service(**SLEEPING) as service:
        assert [post(service, model).status_code for model in ("a", "b")] == [200, 200]
        yield service


def states(service: ServiceProcess) -> dict[str, str]:
    return {each["model"]: each["state"] for each in service.stats()["engines"]}


def test_models_of_two_kinds_alternate_in_their_own_processes(service: ServiceProcess) -> None:
    assert states(service) == {"a": "sleeping", "b": "ready"}
    processes = {model: service.engine(model)["process_id"] for model in ("a", "b")}
    for model in ("a", "b", "a"):
        answer = post(service, model)
        assert (answer.status_code, answer.json()["model"]) == (200, model)
        assert service.engine(model)["process_id"] == processes[model]
    metrics = service.http.get("/metrics").text
    assert 'inference_sleeps_total{model="a",status="asleep"} 2.0' in metrics
    assert 'inference_sleeps_total{model="a",status="woken"} 2.0' in metrics
    assert 'inference_engines{status="sleeping"} 1.0' in metrics
    assert len(service.descendants()) == 3, "the launcher and two hosts"


def test_a_sibling_wakes_the_engine(service: ServiceProcess) -> None:
    process = service.engine("a")["process_id"]
    assert post(service, "a2").status_code == 200
    assert service.engine("a2")["process_id"] == process


def test_what_it_keeps_is_measured_and_counted(service: ServiceProcess) -> None:
    stats = service.stats()
    by_model = {each["model"]: each for each in stats["engines"]}
    sleeper = by_model["a"]
    assert sleeper["asleep_bytes"] == sleeper["measured_bytes"] - (64 << 20)
    resident = psutil.Process(sleeper["process_id"]).memory_info().rss
    assert resident < psutil.Process(by_model["b"]["process_id"]).memory_info().rss - (32 << 20)
    reserved = sum(by_model["b"]["memory"].values()) + sleeper["asleep_bytes"]
    assert stats["budget"]["reserved_bytes"] == reserved
    assert stats["slots"]["used"] == 1


@pytest.mark.parametrize(
    "fault",
    [{"fail_sleep": "no"}, {"die_in_sleep": True}],
    ids=["error", "death"],
)
def test_an_engine_that_cannot_sleep_ends_and_nobody_notices(fakes: Fakes, fault: dict[str, object]) -> None:
    fakes.put("a", script=LLAMA | fault)
    fakes.put("b", script=QWEN)
    with fakes.service(**SLEEPING) as service:
        for model in ("a", "b", "a"):
            assert post(service, model).status_code == 200
        assert 'inference_sleeps_total{model="a",status="failed"} 1.0' in service.http.get("/metrics").text
        assert states(service) == {"a": "ready", "b": "sleeping"}


@pytest.mark.parametrize(
    "fault",
    [{"fail_swap": "no"}, {"die_in_swap": True}],
    ids=["error", "death"],
)
def test_an_engine_that_does_not_wake_is_replaced(fakes: Fakes, fault: dict[str, object]) -> None:
    fakes.put("a", script=LLAMA | fault)
    fakes.put("b", script=QWEN)
    with fakes.service(**SLEEPING) as service:
        for model in ("a", "b", "a"):
            assert post(service, model).status_code == 200
        assert states(service) == {"a": "ready", "b": "sleeping"}
        assert len(service.descendants()) == 3


def test_weights_that_do_not_come_back_are_found(fakes: Fakes) -> None:
    """The weight check compares with the first load of the revision."""
    fakes.put("a", script=LLAMA)
    fakes.put("a2", script=LLAMA | {"wrong_weights": True})
    fakes.put("b", script=QWEN)
    with fakes.service(**SLEEPING) as service:
        post(service, "a2")
        service.http.post("/admin/unload/a2").raise_for_status()
        for model in ("a", "b"):
            post(service, model)
        process = service.engine("a")["process_id"]
        assert post(service, "a2").status_code == 200
        assert service.engine("a2")["process_id"] != process
        assert 'inference_swaps_total{model="a2",status="failed"} 1.0' in service.http.get("/metrics").text


def test_a_sleeper_that_is_killed_is_only_a_fresh_load(service: ServiceProcess) -> None:
    psutil.Process(service.engine("a")["process_id"]).kill()
    service.wait_until(lambda: states(service) == {"b": "ready"}, 10)
    assert post(service, "a").status_code == 200
    assert states(service) == {"a": "ready", "b": "sleeping"}


def test_a_request_that_comes_while_its_engine_falls_asleep(fakes: Fakes, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    fakes.put("a", script=LLAMA | {"sleep_gate": str(gate)})
    fakes.put("b", script=QWEN)
    with fakes.service(**SLEEPING) as service, ThreadPoolExecutor(2) as pool:
        post(service, "a")
        process = service.engine("a")["process_id"]
        other = pool.submit(post, service, "b")
        service.wait_until(lambda: states(service) == {"a": "stopping"}, 10)
        again = pool.submit(post, service, "a")
        service.wait_until(lambda: len(service.stats()["waiters"]) == 2, 10)
        gate.touch()
        assert (other.result().status_code, again.result().status_code) == (200, 200)
        assert service.engine("a")["process_id"] == process


def test_a_service_ends_with_all_that_sleeps(service: ServiceProcess) -> None:
    hosts = service.descendants()
    assert len(hosts) == 3
    service.signal(signal.SIGTERM)
    assert service.process.wait(30) == 0
    assert not any(each.is_running() for each in hosts)


def test_the_operator_unloads_what_sleeps(service: ServiceProcess) -> None:
    assert service.http.post("/admin/unload/a").json()["unloaded"]
    assert states(service) == {"b": "ready"}


def test_where_engines_cannot_sleep_the_operator_is_told(fakes: Fakes) -> None:
    fakes.put("a", script=LLAMA)
    fakes.put("b", script=QWEN)
    with fakes.service(**SLEEPING, WEIGHT_SWAP="off") as service:
        for model in ("a", "b"):
            assert post(service, model).status_code == 200
        assert states(service) == {"b": "ready"}
        assert "MAX_SLEEPING has no effect: engines wake with other weights" in service.log_text()
