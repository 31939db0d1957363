"""What the operator can do: load, pin, unload, with force or without."""

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import openai
import pytest

from tests.fixtures.fakes import Fakes, ask


def test_load_answers_when_the_model_is_ready(fakes: Fakes) -> None:
    fakes.put("slow", start_seconds=1)
    fakes.put("broken", fail_start="no such layer")
    with fakes.service() as service:
        answer = service.http.post("/admin/load/slow")
        assert answer.json() == answer.json() | {"model": "slow", "state": "ready", "pinned": False}
        assert service.engine("slow")["state"] == "ready"
        assert service.http.post("/admin/load/slow").status_code == 200
        assert service.http.post("/admin/load/nobody").status_code == 404
        failed = service.http.post("/admin/load/broken")
        assert (failed.status_code, "no such layer" in failed.text) == (503, True)
        assert service.http.post("/admin/load/slow?wait=perhaps").status_code == 400


def test_load_without_waiting(fakes: Fakes) -> None:
    fakes.put("slow", start_seconds=1)
    with fakes.service() as service:
        answer = service.http.post("/admin/load/slow?wait=false")
        assert answer.status_code == 202
        service.wait_ready("slow", 10)


def test_pin_and_unpin(fakes: Fakes) -> None:
    for name in ("one", "two"):
        fakes.put(name)
    with fakes.service(MAX_CACHED_MODELS="1", MIN_RESIDENCY="0") as service:
        service.http.post("/admin/load/one").raise_for_status()
        assert service.http.post("/admin/pin/one").json()["pinned"]
        assert service.http.post("/admin/pin/nobody").status_code == 404
        assert service.engine("one")["pinned"]
        assert service.http.post("/v1/completions", json=ask("two")).status_code == 503
        assert not service.http.post("/admin/unpin/one").json()["pinned"]
        assert service.http.post("/v1/completions", json=ask("two")).status_code == 200
        assert service.http.post("/admin/pin/one").json() == service.http.post("/admin/pin/one").json()
        service.http.post("/admin/unload/two").raise_for_status()
        service.http.post("/admin/load/one").raise_for_status()
        assert service.engine("one")["pinned"], "a pin counts for the next load too"


def test_unload_of_a_busy_model_lets_its_stream_finish(fakes: Fakes) -> None:
    fakes.put("m")
    with fakes.service() as service, ThreadPoolExecutor(1) as threads:
        stream = service.openai.completions.create(model="m", prompt="x", max_tokens=250, stream=True)
        next(iter(stream))
        unloading = threads.submit(service.http.post, "/admin/unload/m")
        service.wait_until(lambda: service.engine("m")["state"] == "draining", 5)
        assert len(list(stream)) >= 249
        assert unloading.result().json() == {"model": "m", "unloaded": True}


def test_unload_by_force_ends_its_streams_with_an_error_event(fakes: Fakes) -> None:
    fakes.put("m")
    with fakes.service() as service:
        stream = service.openai.completions.create(model="m", prompt="x", max_tokens=10_000, stream=True)
        next(iter(stream))
        assert service.http.post("/admin/unload/m?force=true").json()["unloaded"]
        with pytest.raises(openai.APIError, match="unloaded by the operator"):
            list(stream)
        assert service.stats()["engines"] == []
        assert service.http.post("/v1/completions", json=ask("m")).status_code == 200


def test_unload_by_force_answers_a_whole_request_with_503(fakes: Fakes) -> None:
    fakes.put("m")
    with fakes.service() as service, ThreadPoolExecutor(1) as threads:
        asking = threads.submit(service.http.post, "/v1/completions", json=ask("m", max_tokens=10_000))
        service.wait_until(lambda: service.stats()["leases"] == 1, 10)
        service.http.post("/admin/unload/m?force=true").raise_for_status()
        answer = asking.result()
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "engine_unloaded")


def test_stats_show_everything(fakes: Fakes, tmp_path: Path) -> None:
    fakes.put("m")
    fakes.put("gated", gate=str(tmp_path / "gate"))
    with fakes.service(MAX_CACHED_MODELS="2", MIN_RESIDENCY="0") as service, ThreadPoolExecutor(1) as threads:
        service.http.post("/v1/completions", json=ask("m")).raise_for_status()
        asking = threads.submit(service.http.post, "/v1/completions", json=ask("gated"))
        service.wait_until(lambda: len(service.stats()["waiters"]) == 1, 5)
        stats = service.stats()
        assert stats["slots"] == {"total": 2, "used": 2}
        assert stats["victims"] == ["m"]
        assert set(stats["budget"]) == {"total_bytes", "reserved_bytes"}
        waiter = stats["waiters"][0]
        assert (waiter["model"], waiter["age_seconds"] >= 0) == ("gated", True)
        assert {"phase", "percent", "eta_seconds"} <= set(waiter)
        assert stats["leases"] == 0
        assert {engine["backend"] for engine in stats["engines"] if engine["model"] == "m"} == {"fake"}
        json.dumps(stats, allow_nan=False)
        (tmp_path / "gate").touch()
        assert asking.result().status_code == 200
