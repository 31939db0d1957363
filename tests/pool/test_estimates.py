"""What Retry-After is made of."""

from inference_service.pool.estimates import MAX_RETRY_SECONDS, UNKNOWN_LOAD_SECONDS, Estimates


def test_the_queue_moves_at_the_rate_of_the_last_requests() -> None:
    estimates = Estimates()
    for second in range(10):
        estimates.ended(100 + 2 * second)
    assert estimates.retry_after_queue(10) == 20


def test_nothing_is_known_yet() -> None:
    assert Estimates().retry_after_queue(7) == 7
    assert Estimates().retry_after_load("m", 0, 3) == 12


def test_a_load_takes_what_it_took_before() -> None:
    estimates = Estimates()
    estimates.loaded("m", 40, 10)
    assert estimates.retry_after_load("m", 100, 110) == 30
    assert estimates.retry_after_load("m", 100, 139.5) == 10, "overdue: a quarter of what it took so far"


def test_never_longer_than_a_client_waits() -> None:
    estimates = Estimates()
    estimates.loaded("m", 4000, 10)
    assert estimates.retry_after_load("m", 0, 0) == MAX_RETRY_SECONDS
    for second in range(10):
        estimates.ended(second)
    assert estimates.retry_after_queue(10_000) == MAX_RETRY_SECONDS


def test_an_unknown_model_starts_like_the_others() -> None:
    estimates = Estimates()
    assert estimates.start_seconds("m") == UNKNOWN_LOAD_SECONDS
    estimates.loaded("a", 40, 10)
    estimates.loaded("b", 40, 20)
    assert (estimates.start_seconds("a"), estimates.start_seconds("m")) == (10, 15)
