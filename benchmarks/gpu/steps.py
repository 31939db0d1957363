"""Steps with a time limit each; one that fails, or is not reached, does not end the others."""

import signal
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

from benchmarks.report import print_table, say

Figures = Mapping[str, Any]


class OutOfTime(Exception):
    """A step has used up its time."""


class NotHere(Exception):
    """A step cannot be measured on this machine; the message says why."""


@dataclass(frozen=True)
class Step:
    """`measure` returns what it has found; it may take `seconds`."""

    name: str
    seconds: float
    measure: Callable[[], Figures]


@dataclass
class Result:
    """`status`: ok, failed, not here, or not reached."""

    step: str
    status: str
    seconds: float = 0.0
    figures: Figures = field(default_factory=dict)
    reason: str = ""


def run(steps: list[Step], seconds: float, after_failure: Callable[[], None]) -> list[Result]:
    """Every step in turn, as long as `seconds` last. `after_failure` cleans up for the next."""
    ends = time.monotonic() + seconds
    results = []
    for step in steps:
        left = ends - time.monotonic()
        if left < 1:
            results.append(Result(step.name, "not reached"))
            continue
        result = _measure(step, min(step.seconds, left))
        results.append(result)
        say(f"{step.name}: {result.status} in {result.seconds:.1f} s {_shown(result)}")
        if result.status == "failed":
            after_failure()
    return results


def _measure(step: Step, seconds: float) -> Result:
    started = time.monotonic()
    try:
        with _limited(seconds):
            figures = step.measure()
    except NotHere as error:
        return Result(step.name, "not here", reason=str(error))
    except OutOfTime:
        return Result(
            step.name, "failed", time.monotonic() - started, reason=f"it took more than {seconds:.0f} s"
        )
    except Exception as error:
        traceback.print_exc()
        reason = f"{type(error).__name__}: {error}"
        return Result(step.name, "failed", time.monotonic() - started, reason=reason[:300])
    return Result(step.name, "ok", time.monotonic() - started, figures)


@contextmanager
def _limited(seconds: float) -> Iterator[None]:
    def ring(number: int, frame: FrameType | None) -> None:
        raise OutOfTime

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def show(results: list[Result]) -> None:
    rows = [[result.step, result.status, f"{result.seconds:.1f}", _shown(result)] for result in results]
    print_table(["step", "status", "seconds", "found"], rows)


def _shown(result: Result) -> str:
    return result.reason or " ".join(f"{name}={value}" for name, value in result.figures.items())
