"""The one table of errors that the soak explains: which may come to whom, and when.

All others are the service's. A healthy model may fail for its own engine's trouble, for what the operator did
to it, or because too many want too few slots, and for nothing that befalls another model.
"""

from collections.abc import Callable
from dataclasses import dataclass

from benchmarks.soak.asking import Outcome
from benchmarks.soak.models import (
    CIRCUIT_SECONDS,
    LOAD_SECONDS,
    PINNED,
    QUEUE_SECONDS,
    REQUEST_SECONDS,
    STALL_SECONDS,
    WAITING,
)
from benchmarks.soak.timeline import Chronicle, Deed

# Between a deed and the moment in which the service knows of it.
NOTICED_SECONDS = 1.0
# A host that hangs while nobody uses it does so until it is wanted again.
HUNG_SECONDS = 60.0
# Clients that have left may be waiters for a moment longer.
LATE_LEAVERS = 6

When = Callable[[Outcome, Chronicle], bool]


@dataclass(frozen=True)
class Explanation:
    """An error with `status` (where the stream had not begun) and `code`, which may come `when` so."""

    status: int
    code: str
    why: str
    when: When


def _crowded(outcome: Outcome, chronicle: Chronicle) -> bool:
    return outcome.crowd + LATE_LEAVERS >= WAITING and outcome.retry_after


def _waited(outcome: Outcome, chronicle: Chronicle) -> bool:
    return outcome.seconds >= QUEUE_SECONDS - 0.1


def _all_pinned(outcome: Outcome, chronicle: Chronicle) -> bool:
    pins = (_done(Deed.PINNED, outcome, chronicle, NOTICED_SECONDS, model=name) for name in PINNED)
    return outcome.ask.model not in PINNED and all(pins)


def _unloaded_by_force(outcome: Outcome, chronicle: Chronicle) -> bool:
    return _done(Deed.FORCED, outcome, chronicle)


def _unloaded_while_loading(outcome: Outcome, chronicle: Chronicle) -> bool:
    return _done(Deed.UNLOADED, outcome, chronicle) and "while it was being loaded" in outcome.message


def _host_ended(outcome: Outcome, chronicle: Chronicle) -> bool:
    return _done(Deed.KILLED, outcome, chronicle, NOTICED_SECONDS)


def _host_stopped(outcome: Outcome, chronicle: Chronicle) -> bool:
    return _done(Deed.STOPPED, outcome, chronicle, STALL_SECONDS)


def _its_fault(outcome: Outcome, chronicle: Chronicle) -> bool:
    part = outcome.ask.part
    if part is None or part.fault is None:
        return False
    after = HUNG_SECONDS if part.fault == "hangs" else NOTICED_SECONDS
    return _done(Deed.LETHAL, outcome, chronicle, after)


def _never_starts(outcome: Outcome, chronicle: Chronicle) -> bool:
    return outcome.ask.part is not None and outcome.ask.part.broken


def _host_ended_in_its_start(outcome: Outcome, chronicle: Chronicle) -> bool:
    """And for as long as it is not tried again: after three times in a row 20 s."""
    after = LOAD_SECONDS + 4 * CIRCUIT_SECONDS
    deeds = [
        entry
        for deed in (Deed.KILLED, Deed.STOPPED)
        for entry in chronicle.during(deed, outcome.ask.model, outcome.sent, outcome.ended, after)
    ]
    return any(entry.state == "starting" for entry in deeds)


def _stalled_beside_others(outcome: Outcome, chronicle: Chronicle) -> bool:
    """The engine goes on, for it brings the others' words; only this stream stands still."""
    stalls = outcome.ask.part is not None and outcome.ask.part.fault == "stalls"
    return stalls and outcome.ask.lethal and outcome.seconds >= REQUEST_SECONDS - 0.5


EXPLANATIONS = (
    Explanation(429, "rate_limit_exceeded", "more wait than may; it says when to come back", _crowded),
    Explanation(503, "model_loading", "it has waited for QUEUE_TIMEOUT", _waited),
    Explanation(503, "overloaded", "it has waited for a lease of a ready engine for QUEUE_TIMEOUT", _waited),
    Explanation(503, "no_room", "all slots are pinned", _all_pinned),
    Explanation(503, "engine_unloaded", "unloaded by force", _unloaded_by_force),
    Explanation(503, "engine_unloaded", "unloaded while it was being loaded", _unloaded_while_loading),
    Explanation(503, "engine_died", "its host was killed", _host_ended),
    Explanation(503, "engine_died", "its host was stopped", _host_stopped),
    Explanation(503, "engine_died", "its own fault", _its_fault),
    Explanation(503, "engine_start_failed", "it never starts", _never_starts),
    Explanation(503, "engine_start_failed", "its host was ended in its start", _host_ended_in_its_start),
    Explanation(504, "timeout", "its stream stands still while others go on", _stalled_beside_others),
)


def explain(outcome: Outcome, chronicle: Chronicle) -> str | None:
    """Why this error is no fault of the service's; None where nothing explains it."""
    for explanation in EXPLANATIONS:
        if (
            outcome.code == explanation.code
            and outcome.status in (explanation.status, 200)
            and explanation.when(outcome, chronicle)
        ):
            return explanation.why
    return None


def _done(
    deed: Deed, outcome: Outcome, chronicle: Chronicle, after: float = 0.0, *, model: str | None = None
) -> bool:
    name = model or outcome.ask.model
    return bool(chronicle.during(deed, name, outcome.sent, outcome.ended, after))
