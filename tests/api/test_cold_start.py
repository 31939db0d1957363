"""The cold-start contract: a real status before COLD_START_GRACE, progress in comments after it."""

import json
import re
import time
from pathlib import Path

import openai
import pytest

from tests.fixtures.fakes import Fakes, ask

COMMENT = re.compile(r": loading slow phase=start \d+% eta \d+s")


def test_a_stream_that_waits_tells_its_progress_until_the_first_token(fakes: Fakes) -> None:
    fakes.put("slow", start_seconds=5)
    with fakes.service(COLD_START_GRACE="0.3") as service:
        started = time.monotonic()
        with service.http.stream("POST", "/v1/completions", json=ask("slow", stream=True)) as answer:
            opened = time.monotonic() - started
            lines = [line for line in answer.iter_lines() if line]
        assert answer.status_code == 200
        assert answer.headers["content-type"].startswith("text/event-stream")
        assert answer.headers["x-accel-buffering"] == "no"
        assert opened < 4.9, "it opens long before the model is there"
        comments = [line for line in lines if line.startswith(":")]
        assert len(comments) >= 2
        assert all(COMMENT.fullmatch(comment) for comment in comments[1:-1]), comments
        assert re.fullmatch(": x-model-revision [0-9a-f]{12}", comments[-1]), "named once it is decided"
        assert lines[: len(comments)] == comments, "no comment after the first token"
        assert lines[-1] == "data: [DONE]"
        assert sum('"text":"' in line and "null" in line for line in lines) >= 3


def test_the_openai_client_sees_none_of_it(fakes: Fakes) -> None:
    fakes.put("slow", start_seconds=1.5)
    with fakes.service(COLD_START_GRACE="0.1") as service:
        stream = service.openai.completions.create(model="slow", prompt="x", max_tokens=3, stream=True)
        assert "".join(chunk.choices[0].text for chunk in stream) == "the quick brown"
        counted = 'inference_requests_total{model="slow",status="200"} 1.0'
        service.wait_until(lambda: counted in service.http.get("/metrics").text, 5)


def test_without_a_stream_the_answer_comes_when_it_comes(fakes: Fakes) -> None:
    fakes.put("slow", start_seconds=1.5)
    with fakes.service(COLD_START_GRACE="0.1") as service:
        answer = service.http.post("/v1/completions", json=ask("slow"))
        assert answer.json()["choices"][0]["text"] == "the quick brown"


def test_a_failure_before_the_grace_is_a_status(fakes: Fakes) -> None:
    fakes.put("broken", fail_start="no such layer")
    with fakes.service(COLD_START_GRACE="30") as service:
        answer = service.http.post("/v1/completions", json=ask("broken", stream=True))
        assert answer.status_code == 503
        assert answer.json()["error"]["code"] == "engine_start_failed"
        assert "no such layer" in answer.json()["error"]["message"]


def test_a_failure_after_the_grace_is_an_error_event(fakes: Fakes) -> None:
    fakes.put("broken", start_seconds=1.5, fail_start="no such layer")
    with fakes.service(COLD_START_GRACE="0.2") as service:
        answer = service.http.post("/v1/completions", json=ask("broken", stream=True))
        assert answer.status_code == 200
        events = [event for event in answer.text.split("\n\n") if event.startswith("data: ")]
        assert "[DONE]" not in answer.text
        (event,) = events
        assert json.loads(event.removeprefix("data: "))["error"]["code"] == "engine_start_failed"
        with pytest.raises(openai.InternalServerError, match="failed once"):
            service.openai.completions.create(model="broken", prompt="x", stream=True)


def test_a_client_that_leaves_a_stream_that_has_only_comments(fakes: Fakes, tmp_path: Path) -> None:
    fakes.put("gated", gate=str(tmp_path / "gate"))
    with fakes.service(COLD_START_GRACE="0.1") as service:
        with service.http.stream("POST", "/v1/completions", json=ask("gated", stream=True)) as answer:
            assert next(answer.iter_lines()).startswith(": loading gated")
        service.wait_until(lambda: service.stats()["waiters"] == [], 10)
        service.wait_until(lambda: service.stats()["engines"] == [], 20)
        assert "Traceback" not in service.log_text()


def test_stats_show_how_far_a_load_is(fakes: Fakes, tmp_path: Path) -> None:
    fakes.put("gated", gate=str(tmp_path / "gate"))
    with fakes.service(PRELOAD_MODELS="gated") as service:
        assert service.http.get("/ready").status_code == 200
        service.wait_until(lambda: service.stats()["waiters"] != [], 5)
        service.wait_until(lambda: service.stats()["waiters"][0]["phase"] == "start", 5)
        loading = service.engine("gated")["loading"]
        assert (loading["phase"], 0 <= loading["percent"] < 100) == ("start", True)
        assert loading["eta_seconds"] > 0
        (tmp_path / "gate").touch()
        service.wait_ready("gated", 30)
