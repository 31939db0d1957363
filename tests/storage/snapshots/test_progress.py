"""How far a fetch is."""

from inference_service.storage.snapshots.progress import Progress


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_bytes_rate_and_time_left() -> None:
    clock = Clock()
    progress = Progress("m", "r", 1000, clock)
    for _ in range(4):
        clock.now += 1
        progress.advance(100)
    described = progress.describe()
    assert (described["bytes"], described["percent"]) == (400, 40)
    assert described["bytes_per_second"] == 100
    assert described["eta_seconds"] == 6.0


def test_the_rate_is_that_of_the_last_seconds() -> None:
    clock = Clock()
    progress = Progress("m", "r", 1 << 40, clock)
    for _ in range(60):
        clock.now += 1
        progress.advance(1000)
    for _ in range(20):
        clock.now += 1
        progress.advance(10)
    assert 9 <= progress.bytes_per_second <= 11


def test_nothing_moves_and_nobody_knows_when() -> None:
    clock = Clock()
    progress = Progress("m", "r", 1000, clock)
    clock.now += 60
    assert progress.describe()["eta_seconds"] is None


def test_what_was_there_before_counts_but_not_as_speed() -> None:
    clock = Clock()
    progress = Progress("m", "r", 1000, clock)
    progress.skip(900)
    clock.now += 1
    progress.advance(50)
    assert (progress.percent, round(progress.bytes_per_second)) == (95, 50)


def test_damaged_bytes_are_taken_back() -> None:
    progress = Progress("m", "r", 100)
    progress.advance(100)
    progress.advance(-100)
    assert progress.percent == 0


def test_an_empty_model_is_complete() -> None:
    assert Progress("m", "r", 0).percent == 100
