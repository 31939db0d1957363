"""Circuits: how long a model whose load failed is left alone."""

from inference_service.errors import EngineStartFailed
from inference_service.pool.backoff import LONGEST_PAUSE_SECONDS, LoadBackoff
from inference_service.pool.estimates import MAX_RETRY_SECONDS

ERROR = EngineStartFailed("out of memory.", param="model")


def test_a_failed_load_is_not_tried_again_at_once() -> None:
    backoff = LoadBackoff()
    backoff.failed("m", "r1", ERROR, 100)
    refusal = backoff.refusal("m", "r1", 102)
    assert isinstance(refusal, EngineStartFailed)
    assert refusal.message.startswith("out of memory. It failed once; it is tried again in 3 s")
    assert (refusal.retry_after, refusal.param) == (3, "model")
    assert backoff.refusal("m", "r1", 105) is None
    assert backoff.refusal("other", "r1", 102) is None


def test_the_pause_doubles_and_is_bounded() -> None:
    backoff, pauses = LoadBackoff(), []
    for _ in range(10):
        told = backoff.failed("m", "r1", ERROR, 0)
        refusal = backoff.refusal("m", "r1", 0)
        assert refusal is not None
        assert refusal.retry_after == told
        pauses.append(told)
    assert pauses[:4] == [5, 10, 20, 40]
    assert pauses[-1] == MAX_RETRY_SECONDS, "clients do not wait for longer"
    assert backoff.refusal("m", "r1", LONGEST_PAUSE_SECONDS - 1) is not None
    assert backoff.refusal("m", "r1", LONGEST_PAUSE_SECONDS) is None


def test_another_revision_is_tried_at_once_and_counts_anew() -> None:
    backoff = LoadBackoff()
    for _ in range(3):
        backoff.failed("m", "r1", ERROR, 0)
    assert backoff.refusal("m", "r2", 0) is None
    backoff.failed("m", "r2", ERROR, 0)
    refusal = backoff.refusal("m", "r2", 0)
    assert refusal is not None
    assert refusal.retry_after == 5


def test_success_forgets() -> None:
    backoff = LoadBackoff()
    backoff.failed("m", "r1", ERROR, 0)
    backoff.succeeded("m", "r1")
    assert backoff.refusal("m", "r1", 0) is None
    assert backoff.describe(0) == {}


def test_the_operator_sees_the_backoff() -> None:
    backoff = LoadBackoff()
    backoff.failed("m", "r1", ERROR, 0)
    assert backoff.describe(1) == {
        "m": {"revision": "r1", "failures": 1, "retry_in_seconds": 4, "reason": "out of memory."}
    }
    assert backoff.describe(6) == {}
