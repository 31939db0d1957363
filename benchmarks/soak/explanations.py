"""The table of errors that the soak explains: which error a request may get, and when.

Any other error is the service's fault. A request for a healthy model may fail because of its own engine's
fault, an operator's action or a lack of slots, but never because of what happens to another model.
"""

from collections.abc import Callable
from dataclasses import dataclass

from benchmarks.soak.asking import Outcome
from benchmarks.soak.models import (
    BACKOFF_SECONDS,
    LOAD_SECONDS,
    PINNED,
    QUEUE_SECONDS,
    REQUEST_SECONDS,
    STALL_SECONDS,
    WAITING,
)
from benchmarks.soak.timeline import Deed, Timeline

# Until the service notices a deed.
NOTICED_SECONDS = 1.0
# A host that hangs while idle hangs until its next request.
HUNG_SECONDS = 60.0
# Clients that have disconnected may count as waiters for a moment longer.
LATE_LEAVERS = 6

When = Callable[[Outcome, Timeline], bool]


@dataclass(frozen=True)
class Explanation:
    """An error with `status` (if the stream had not begun) and `code`, expected if `when` is true."""

    status: int
    code: str
    why: str
    when: When


def _overloaded(outcome: Outcome, timeline: Timeline) -> bool:
    return outcome.load + LATE_LEAVERS >= WAITING and outcome.retry_after


def _waited(outcome: Outcome, timeline: Timeline) -> bool:
    return outcome.seconds >= QUEUE_SECONDS - 0.1


def _all_pinned(outcome: Outcome, timeline: Timeline) -> bool:
    pins = (_done(Deed.PINNED, outcome, timeline, NOTICED_SECONDS, model=name) for name in PINNED)
    return outcome.ask.model not in PINNED and all(pins)


def _unloaded_by_force(outcome: Outcome, timeline: Timeline) -> bool:
    return _done(Deed.FORCED, outcome, timeline)


def _unloaded_while_loading(outcome: Outcome, timeline: Timeline) -> bool:
    return _done(Deed.UNLOADED, outcome, timeline) and "while it was being loaded" in outcome.message


def _host_ended(outcome: Outcome, timeline: Timeline) -> bool:
    return _done(Deed.KILLED, outcome, timeline, NOTICED_SECONDS)


def _host_stopped(outcome: Outcome, timeline: Timeline) -> bool:
    return _done(Deed.STOPPED, outcome, timeline, STALL_SECONDS)


def _its_fault(outcome: Outcome, timeline: Timeline) -> bool:
    part = outcome.ask.part
    if part is None or part.fault is None:
        return False
    after = HUNG_SECONDS if part.fault == "hangs" else NOTICED_SECONDS
    return _done(Deed.LETHAL, outcome, timeline, after)


def _never_starts(outcome: Outcome, timeline: Timeline) -> bool:
    return outcome.ask.part is not None and outcome.ask.part.broken


def _host_ended_in_its_start(outcome: Outcome, timeline: Timeline) -> bool:
    """And during the load backoff: 20 s after three failures in a row."""
    after = LOAD_SECONDS + 4 * BACKOFF_SECONDS
    deeds = [
        entry
        for deed in (Deed.KILLED, Deed.STOPPED)
        for entry in timeline.during(deed, outcome.ask.model, outcome.sent, outcome.ended, after)
    ]
    return any(entry.state == "starting" for entry in deeds)


def _stalled_beside_others(outcome: Outcome, timeline: Timeline) -> bool:
    """The engine is alive, because other streams progress; only this one stalls."""
    stalls = outcome.ask.part is not None and outcome.ask.part.fault == "stalls"
    return stalls and outcome.ask.lethal and outcome.seconds >= REQUEST_SECONDS - 0.5


EXPLANATIONS = (
    Explanation(429, "rate_limit_exceeded", "the queue is full; Retry-After is set", _overloaded),
    Explanation(503, "model_loading", "it waited for QUEUE_TIMEOUT", _waited),
    Explanation(503, "overloaded", "it waited for a ready engine for QUEUE_TIMEOUT", _waited),
    Explanation(503, "no_room", "all slots are pinned", _all_pinned),
    Explanation(503, "engine_unloaded", "unloaded by force", _unloaded_by_force),
    Explanation(503, "engine_unloaded", "unloaded while it was being loaded", _unloaded_while_loading),
    Explanation(503, "engine_died", "its host was killed", _host_ended),
    Explanation(503, "engine_died", "its host was stopped", _host_stopped),
    Explanation(503, "engine_died", "its own fault", _its_fault),
    Explanation(503, "engine_start_failed", "it never starts", _never_starts),
    Explanation(503, "engine_start_failed", "its host was ended while starting", _host_ended_in_its_start),
    Explanation(504, "timeout", "its stream stalls while others progress", _stalled_beside_others),
)


def explain(outcome: Outcome, timeline: Timeline) -> str | None:
    """Why this error is not the service's fault; None if nothing explains it."""
    for explanation in EXPLANATIONS:
        if (
            outcome.code == explanation.code
            and outcome.status in (explanation.status, 200)
            and explanation.when(outcome, timeline)
        ):
            return explanation.why
    return None


def _done(
    deed: Deed, outcome: Outcome, timeline: Timeline, after: float = 0.0, *, model: str | None = None
) -> bool:
    name = model or outcome.ask.model
    return bool(timeline.during(deed, name, outcome.sent, outcome.ended, after))
