"""Engines that die, hang, lie or do not fit, with the fake host through the whole service."""

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import openai
import pytest

from tests.fixtures.fakes import Fakes, ask

FAST = {"ENGINE_STALL_TIMEOUT": "1", "REQUEST_TIMEOUT": "30"}


@pytest.mark.parametrize("fault", ["die_after", "hang_after", "stall_after"])
def test_a_stream_on_an_engine_that_fails_ends_with_an_error_event(fakes: Fakes, fault: str) -> None:
    fakes.put("bad", script={fault: 4})
    fakes.put("good")
    with fakes.service(**FAST) as service:
        service.http.post("/v1/completions", json=ask("good")).raise_for_status()
        stream = service.openai.completions.create(model="bad", prompt="x", max_tokens=9, stream=True)
        words = [next(stream).choices[0].text for _ in range(4)]
        started = time.monotonic()
        with pytest.raises(openai.APIError, match=r"went away|made no progress"):
            next(stream)
        assert "".join(words) == "the quick brown fox"
        assert time.monotonic() - started < 15, (
            "at its death or after ENGINE_STALL_TIMEOUT, not REQUEST_TIMEOUT"
        )
        service.wait_until(lambda: [e["model"] for e in service.stats()["engines"]] == ["good"], 5)
        answer = service.http.post("/v1/completions", json=ask("bad"))
        assert answer.json()["choices"][0]["text"] == "the quick brown", "a fresh engine"
        assert service.stats()["leases"] == 0
        assert 'inference_engine_deaths_total{model="bad"} 1.0' in service.http.get("/metrics").text


@pytest.mark.parametrize("fault", ["die_after", "hang_after", "stall_after"])
def test_a_whole_answer_of_an_engine_that_fails_is_a_503(fakes: Fakes, fault: str) -> None:
    fakes.put("bad", script={fault: 4})
    with fakes.service(**FAST) as service:
        answer = service.http.post("/v1/completions", json=ask("bad", max_tokens=9))
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "engine_died")
        assert answer.headers["retry-after"] == "1"


def test_an_engine_that_does_not_end_is_killed(fakes: Fakes) -> None:
    fakes.put("stubborn", ignore_sigterm=True)
    fakes.put("other")
    with fakes.service(MAX_CACHED_MODELS="1", MIN_RESIDENCY="0") as service:
        service.http.post("/v1/completions", json=ask("stubborn")).raise_for_status()
        stubborn = service.engine("stubborn")["process_id"]
        service.http.post("/v1/completions", json=ask("other")).raise_for_status()
        assert stubborn not in [process.pid for process in service.descendants()]


def test_as_many_engines_live_as_fit(fakes: Fakes) -> None:
    """Memory for three and a half, and no number of slots."""
    names = ["one", "two", "three", "four"]
    for name in names:
        fakes.put(name, serving={"kv_cache_gib": 1})
    with fakes.service(MIN_RESIDENCY="0", MAX_CACHED_MODELS="auto", **_memory(3.5)) as service:
        for name in names:
            service.http.post("/v1/completions", json=ask(name)).raise_for_status()
        stats = service.stats()
        live = {engine["model"] for engine in stats["engines"]}
        assert (len(live), "four" in live) == (3, True)
        assert stats["budget"]["reserved_bytes"] <= stats["budget"]["total_bytes"]


def test_models_share_the_memory_that_there_is(fakes: Fakes) -> None:
    """Two slots, and memory for one and a half."""
    for name in ("one", "two"):
        fakes.put(name, serving={"kv_cache_gib": 1})
    fakes.put("huge", serving={"kv_cache_gib": 1.4})
    with fakes.service(MIN_RESIDENCY="0", **_memory(1.5)) as service:
        service.http.post("/v1/completions", json=ask("one")).raise_for_status()
        service.http.post("/v1/completions", json=ask("two")).raise_for_status()
        stats = service.stats()
        assert [engine["model"] for engine in stats["engines"]] == ["two"]
        assert stats["budget"]["reserved_bytes"] <= stats["budget"]["total_bytes"]
        assert stats["engines"][0]["memory"]["kv_cache"] == 1 << 30
        service.http.post("/admin/pin/two").raise_for_status()
        answer = service.http.post("/v1/completions", json=ask("huge"))
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "no_room")
        assert "it needs 1.4 GiB" in answer.json()["error"]["message"]
        assert "Pinned: two (1.0 GiB)" in answer.json()["error"]["message"]
        service.http.post("/admin/unpin/two").raise_for_status()
        service.http.post("/v1/completions", json=ask("huge")).raise_for_status()


def _memory(gib: float) -> dict[str, str]:
    """The share of this machine's memory that makes so many GiB."""
    from inference_service.machine.device import memory_bytes

    return {"GPU_MEMORY_UTILIZATION": str(gib * (1 << 30) / memory_bytes())}


def test_a_load_that_hangs_is_given_up(fakes: Fakes, tmp_path: Path) -> None:
    fakes.put("gated", gate=str(tmp_path / "never"))
    fakes.put("good")
    with fakes.service(LOAD_TIMEOUT="5") as service:
        answer = service.http.post("/v1/completions", json=ask("gated"))
        assert answer.status_code == 503
        assert "LOAD_TIMEOUT" in answer.json()["error"]["message"]
        service.http.post("/v1/completions", json=ask("good")).raise_for_status()
        service.wait_until(lambda: [e["model"] for e in service.stats()["engines"]] == ["good"], 20)


def test_a_new_upload_of_a_model_that_failed_is_tried_at_once(fakes: Fakes) -> None:
    fakes.put("m", fail_start="broken")
    with fakes.service(CATALOG_TTL="0") as service:
        assert service.http.post("/v1/completions", json=ask("m")).status_code == 503
        answer = service.http.post("/v1/completions", json=ask("m"))
        assert "failed once" in answer.json()["error"]["message"]
        fakes.put("m", start_seconds=0)
        service.wait_until(lambda: service.http.post("/v1/completions", json=ask("m")).status_code == 200, 5)


def test_a_load_that_outlasts_the_request_tells_when_to_come_again(fakes: Fakes, tmp_path: Path) -> None:
    """At default settings nothing but the request's own time ends the wait for a load, and not with a 504."""
    fakes.put("gated", gate=str(tmp_path / "gate"))
    with fakes.service(REQUEST_TIMEOUT="10") as service:
        began = time.monotonic()
        answer = service.http.post("/v1/completions", json=ask("gated"))
        assert time.monotonic() - began >= 9.5
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "model_loading")
        assert "for 9.5 s (REQUEST_TIMEOUT less 0.5 s)" in answer.json()["error"]["message"]
        assert 1 <= int(answer.headers["retry-after"]) <= 120
        (tmp_path / "gate").touch()
        service.wait_ready("gated", 40)


def test_who_waits_for_a_free_engine_is_not_told_of_a_load(fakes: Fakes, tmp_path: Path) -> None:
    fakes.put("gated", gate=str(tmp_path / "gate"))
    fakes.put("other")
    with fakes.service(QUEUE_TIMEOUT="1", MAX_CACHED_MODELS="1") as service, ThreadPoolExecutor(1) as threads:
        asking = threads.submit(service.http.post, "/v1/completions", json=ask("gated"))
        service.wait_until(lambda: service.stats()["slots"]["used"] == 1, 20)
        said = service.http.post("/v1/completions", json=ask("other")).json()["error"]["message"]
        assert "'other' still waits for a free engine" in said
        assert "Loading continues" not in said
        assert "Loading continues" in asking.result().json()["error"]["message"]


def test_the_queue_timeout_tells_when_to_come_again(fakes: Fakes, tmp_path: Path) -> None:
    fakes.put("gated", gate=str(tmp_path / "gate"))
    with fakes.service(QUEUE_TIMEOUT="0.5") as service:
        answer = service.http.post("/v1/completions", json=ask("gated"))
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "model_loading")
        assert 1 <= int(answer.headers["retry-after"]) <= 120
        (tmp_path / "gate").touch()
        service.wait_ready("gated", 10)
