"""The steps of `make bench-gpu`: one that fails, takes too long or is not reached does not end the others."""

import time
from collections.abc import Mapping
from typing import Any

import pytest

from benchmarks.gpu.steps import NotHere, Step, run, show

# A step's time limit is a timer that pytest-timeout's would be in the way of.
pytestmark = pytest.mark.timeout(60, method="thread")


def fine() -> Mapping[str, Any]:
    return {"seconds_ratio": 0.5}


def broken() -> Mapping[str, Any]:
    raise ValueError("it broke")


def slow() -> Mapping[str, Any]:
    time.sleep(50)
    return {}


def elsewhere() -> Mapping[str, Any]:
    raise NotHere("no GPU")


def test_each_step_ends_for_itself(capsys: pytest.CaptureFixture[str]) -> None:
    cleaned: list[int] = []
    steps = [
        Step("broken", 10, broken),
        Step("slow", 0.2, slow),
        Step("elsewhere", 10, elsewhere),
        Step("fine", 10, fine),
        Step("last", 10, slow),
        Step("never", 10, fine),
    ]
    started = time.monotonic()
    results = run(steps, 2.5, lambda: cleaned.append(1))
    assert time.monotonic() - started < 10
    statuses = ["failed", "failed", "not here", "ok", "failed", "not reached"]
    assert [result.status for result in results] == statuses
    assert [result.reason for result in results[:3]] == [
        "ValueError: it broke",
        "it took more than 0 s",
        "no GPU",
    ]
    assert len(cleaned) == 3
    show(results)
    assert "not reached" in capsys.readouterr().out
