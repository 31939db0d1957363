"""The whole service with the fake engine: routes, envelopes, ids, limits, drains."""

import asyncio
import json
import random
import re
import signal
import socket
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import httpx2
import openai
import psutil
import pytest

from tests.fixtures.fakes import Fakes, ask
from tests.fixtures.service_process import ServiceProcess, running_service

# Memory may grow by what happens once.
ANY_SIZE = {"resident_bytes": None}


def body(**fields: object) -> dict[str, object]:
    return {"model": "alpha", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 3, **fields}


def test_port_is_open_while_the_launcher_still_imports(fake_service: ServiceProcess) -> None:
    assert fake_service.http.get("/ready").json() == {"status": "ready"}
    assert "launcher is ready" not in fake_service.log_text()[: fake_service.log_text().find("listening")]


def test_answers(fake_service: ServiceProcess) -> None:
    answer = fake_service.http.post("/v1/chat/completions", json=body()).json()
    assert answer["choices"][0]["message"]["content"] == "the quick brown"
    assert answer["model"] == "alpha"


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/nope", 404, "unknown_url"),
        ("DELETE", "/v1/models", 405, "method_not_allowed"),
        ("GET", "/v1/chat/completions", 405, "method_not_allowed"),
        ("GET", "/v1/models/nobody", 404, "model_not_found"),
        ("POST", "/admin/unload/nobody", 404, "model_not_found"),
        ("POST", "/v1/chat/completions", 400, "invalid_value"),
    ],
)
def test_every_error_has_openais_envelope_and_an_id(
    fake_service: ServiceProcess, method: str, path: str, status: int, code: str
) -> None:
    answer = fake_service.http.request(method, path)
    assert answer.status_code == status
    assert answer.headers["x-request-id"]
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["code"] == code


def test_request_ids(fake_service: ServiceProcess) -> None:
    own = fake_service.http.get("/health", headers={"x-request-id": "mine-1"})
    assert own.headers["x-request-id"] == "mine-1"
    odd = fake_service.http.get("/health", headers={"x-request-id": "no spaces"})
    assert odd.headers["x-request-id"] != "no spaces"
    many = [fake_service.http.post("/v1/chat/completions", json=body()) for _ in range(3)]
    assert len({answer.headers["x-request-id"] for answer in many}) == 3


def test_the_same_id_twice_at_once_is_two_requests(fake_service: ServiceProcess) -> None:
    def ask(_: int) -> int:
        headers = {"x-request-id": "twin"}
        return fake_service.http.post("/v1/chat/completions", json=body(), headers=headers).status_code

    with ThreadPoolExecutor(4) as threads:
        assert list(threads.map(ask, range(4))) == [200] * 4


def test_a_body_beyond_the_limit(fake_service: ServiceProcess) -> None:
    answer = fake_service.http.post("/v1/chat/completions", content=b" " * (5 << 20))
    assert (answer.status_code, answer.json()["error"]["code"]) == (413, "request_too_large")


def test_a_declared_body_beyond_the_limit_is_refused_before_it_comes(fake_service: ServiceProcess) -> None:
    with socket.create_connection(("127.0.0.1", fake_service.port), timeout=10) as client:
        client.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 99999999\r\n\r\n{")
        assert client.recv(65536).startswith(b"HTTP/1.1 413")


def test_slash_names(fake_service: ServiceProcess) -> None:
    assert fake_service.http.get("/v1/models/acme/gamma").json()["id"] == "acme-gamma"
    answer = fake_service.http.post("/v1/chat/completions", json=body(model="acme/gamma")).json()
    assert answer["model"] == "acme-gamma"


def test_metrics_have_known_models_only(fake_service: ServiceProcess) -> None:
    fake_service.http.post("/v1/chat/completions", json=body())
    fake_service.http.post("/v1/chat/completions", json=body(stream=True))
    fake_service.http.post("/v1/chat/completions", json=body(model="made-up"))
    metrics = fake_service.http.get("/metrics").text
    assert 'inference_requests_total{model="alpha",status="200"} 2.0' in metrics
    assert 'inference_requests_total{model="",status="404"} 1.0' in metrics
    assert 'inference_generated_tokens_total{model="alpha"} 6.0' in metrics
    assert 'inference_time_to_first_token_seconds_count{model="alpha"} 1.0' in metrics
    assert "made-up" not in metrics


def at_rest(service: ServiceProcess) -> dict[str, Any]:
    """What the process holds once its start, its first listing too, is over."""
    service.http.get("/v1/models").raise_for_status()
    service.wait_until(lambda: "launcher is ready" in service.log_text(), 30)
    looks = [service.stats()["process"]]

    def unchanged() -> bool:
        time.sleep(0.2)
        looks.append(service.stats()["process"])
        return bool(looks[-1] | ANY_SIZE == looks[-2] | ANY_SIZE)

    service.wait_until(unchanged, 10)
    return dict(looks[-1])


def test_stats_tell_what_the_process_holds(fake_service: ServiceProcess) -> None:
    before = at_rest(fake_service)
    process = psutil.Process(fake_service.process.pid)

    def as_the_system_says() -> bool:
        told = fake_service.stats()["process"]
        resident = pytest.approx(process.memory_info().rss, rel=0.1)
        system = {
            "resident_bytes": resident,
            "open_files": process.num_fds(),
            "threads": process.num_threads(),
        }
        return bool(told == told | system)

    fake_service.wait_until(as_the_system_says, 10)
    with socket.create_connection(("127.0.0.1", fake_service.port)) as client:
        client.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")
        fake_service.wait_until(lambda: fake_service.stats()["process"]["tasks"] > before["tasks"], 5)
        assert fake_service.stats()["process"]["open_files"] == before["open_files"] + 1
    fake_service.wait_until(lambda: fake_service.stats()["process"] | ANY_SIZE == before | ANY_SIZE, 5)


def narrow_service(
    room: Path, directory: Path, request_timeout: str
) -> AbstractContextManager[ServiceProcess]:
    """Two requests run, eight wait; 20 tokens a second."""
    return running_service(
        room,
        GCS_BUCKET=f"file://{directory}",
        ENGINE="fake",
        MAX_CONCURRENT_REQUESTS="2",
        REQUEST_TIMEOUT=request_timeout,
        FAKE_TOKENS_PER_SECOND="20",
    )


@pytest.fixture
def narrow(tmp_path: Path, words_directory: Path) -> Iterator[ServiceProcess]:
    with narrow_service(tmp_path, words_directory, "5") as service:
        yield service


@pytest.fixture
def patient(tmp_path: Path, words_directory: Path) -> Iterator[ServiceProcess]:
    """Its requests may run for as long as a test needs them to."""
    with narrow_service(tmp_path, words_directory, "60") as service:
        yield service


def test_concurrency_holds_and_the_overflow_is_refused(patient: ServiceProcess) -> None:
    patient.http.post("/v1/chat/completions", json=body())

    def answer(tokens: int) -> httpx2.Response:
        return patient.http.post("/v1/chat/completions", json=body(max_tokens=tokens))

    with ThreadPoolExecutor(10) as threads:
        asked = [threads.submit(answer, 120) for _ in range(2)]
        patient.wait_until(lambda: patient.stats()["leases"] == 2, 5)
        asked += [threads.submit(answer, 10) for _ in range(8)]
        patient.wait_until(lambda: len(patient.stats()["waiters"]) == 8, 5)
        refused = [answer(10) for _ in range(10)]
        running = [0]
        while not all(future.done() for future in asked):
            running.append(patient.engine("alpha")["running"] or 0)
            time.sleep(0.02)
    assert [each.status_code for each in refused] == [429] * 10, "two run, eight wait"
    assert [future.result().status_code for future in asked] == [200] * 10
    assert max(running) == 2
    assert refused[0].json()["error"]["code"] == "rate_limit_exceeded"
    assert int(refused[0].headers["retry-after"]) > 0
    assert patient.stats()["leases"] == 0


def test_a_waiter_that_left_is_forgotten(patient: ServiceProcess) -> None:
    with ThreadPoolExecutor(2) as threads:
        running = [
            threads.submit(patient.http.post, "/v1/chat/completions", json=body(max_tokens=120))
            for _ in range(2)
        ]
        patient.wait_until(lambda: patient.stats()["leases"] == 2, 5)
        with pytest.raises(openai.APITimeoutError):
            patient.client(timeout=0.3).completions.create(model="alpha", prompt="x")
        patient.wait_until(lambda: patient.stats()["waiters"] == [], 4)
        assert [future.result().status_code for future in running] == [200, 200]
    assert patient.stats()["leases"] == 0


def test_a_client_that_does_not_read_is_cut_at_the_timeout(narrow: ServiceProcess) -> None:
    """It holds no lease for ever: REQUEST_TIMEOUT covers the sending too."""
    payload = json.dumps(body(max_tokens=10**6, stream=True)).encode()
    with socket.create_connection(("127.0.0.1", narrow.port)) as client:
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(payload)}\r\n\r\n"
        client.sendall(head.encode() + payload)
        narrow.wait_until(lambda: narrow.stats()["leases"] == 1, 5)
        narrow.wait_until(lambda: narrow.stats()["leases"] == 0, 10)


def test_a_client_that_leaves_in_the_middle_of_its_body(narrow: ServiceProcess) -> None:
    with socket.create_connection(("127.0.0.1", narrow.port)) as client:
        client.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")
    narrow.wait_until(lambda: 'status="499"' in narrow.http.get("/metrics").text, 5)
    assert "Traceback" not in narrow.log_text()


def test_a_body_that_never_ends_is_cut_at_the_timeout(narrow: ServiceProcess) -> None:
    with socket.create_connection(("127.0.0.1", narrow.port), timeout=20) as client:
        client.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")
        assert client.recv(65536).startswith(b"HTTP/1.1 504")


async def test_an_abandonment_storm_leaves_nothing(fakes: Fakes) -> None:
    """One slot, three models, 200 clients; half of them leave while they are queued or during a load."""
    for name in ("alpha", "beta", "gamma"):
        fakes.put(name, start_seconds=0.3)
    chance = random.Random(7)
    settings = {
        "MAX_CACHED_MODELS": "1",
        "MIN_RESIDENCY": "0",
        "FAIRNESS_WAIT": "1",
        "MAX_QUEUED_REQUESTS": "200",
    }
    with fakes.service(**settings, MAX_CONCURRENT_REQUESTS="8") as service:
        async with httpx2.AsyncClient(base_url=service.url, timeout=120) as client:

            async def ask_for(number: int) -> str:
                model = ("alpha", "beta", "gamma")[number % 3]
                body = ask(model, stream=number % 4 == 0)
                await asyncio.sleep(chance.uniform(0, 1))
                if number % 2 == 0:
                    answer = await client.post("/v1/completions", json=body)
                    return "served" if answer.status_code == 200 and "quick" in answer.text else answer.text
                try:
                    async with asyncio.timeout(chance.uniform(0.01, 2)):
                        await client.post("/v1/completions", json=body)
                except TimeoutError:
                    return "left"
                return "served before it left"

            ends = Counter(await asyncio.gather(*(ask_for(number) for number in range(200))))
        assert ends["served"] == 100, ends
        assert ends["left"] > 50, ends
        service.wait_until(lambda: service.stats()["leases"] == 0 and not service.stats()["waiters"], 10)
        assert service.http.post("/v1/completions", json=ask("beta")).status_code == 200
        loads = re.findall(
            r'inference_loads_total{model="\w+",status="ok"} (\d+)', service.http.get("/metrics").text
        )
        assert sum(map(int, loads)) < 60, "it does not thrash"
        assert "Traceback" not in service.log_text()


def test_logs_are_json_on_cloud_run(tmp_path: Path, words_directory: Path) -> None:
    with running_service(
        tmp_path, GCS_BUCKET=f"file://{words_directory}", ENGINE="fake", LOG_FORMAT="json"
    ) as service:
        service.http.post("/v1/chat/completions", json=body())
        service.signal(signal.SIGTERM)
        assert service.process.wait(15) == 0
        entries = [json.loads(line) for line in service.log_text().splitlines()]
    assert all({"severity", "message", "time"} <= set(entry) for entry in entries)
    assert any(entry.get("model") == "alpha" for entry in entries)


def test_an_empty_bucket_directory(tmp_path: Path) -> None:
    (tmp_path / "gone").mkdir()
    with running_service(
        tmp_path, GCS_BUCKET=f"file://{tmp_path}/gone", ENGINE="fake", CATALOG_TTL="0"
    ) as service:
        (tmp_path / "gone").rmdir()
        answer = service.http.get("/v1/models")
        assert answer.status_code == 500
        assert "GCS_BUCKET" in answer.json()["error"]["message"]
        assert service.http.get("/health").status_code == 200
