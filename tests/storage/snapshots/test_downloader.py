"""The downloader: which fetch gets a connection, and which waits for another."""

import itertools
import random
import resource
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import google_crc32c
import pytest

from inference_service.errors import SnapshotCorrupt, StoreUnavailable
from inference_service.storage.bucket.store import Bytes, StoredObject
from inference_service.storage.snapshots.checksums import FileChecksums
from inference_service.storage.snapshots.downloader import Downloader
from inference_service.storage.snapshots.progress import Progress
from inference_service.storage.snapshots.staging import IncomingFile
from inference_service.storage.snapshots.transfer import Job, Span, TransferConfig

KIB = 1 << 10
PACE = TransferConfig(connections=4, min_span=4 * KIB, max_span=64 * KIB, stretch=16 * KIB, first_delay=0.01)
CHUNK = KIB


class StepStore:
    """Zeros; a read of an object goes on only when its gate lets it."""

    has_checksums = True
    connections = 4

    def __init__(self) -> None:
        self.ranges: list[tuple[str, int, int]] = []
        self.given: dict[tuple[str, int], int] = {}
        self.gates: dict[str, Callable[[int], None]] = {}

    def list(self, prefix: str) -> list[StoredObject]:
        raise NotImplementedError

    def read(self, stored: StoredObject, start: int = 0, end: int | None = None) -> Bytes:
        end = stored.size if end is None else end
        self.ranges.append((stored.name, start, end))
        for position in range(start, end, CHUNK):
            self.gates.get(stored.name, _pass)(start)
            piece = min(CHUNK, end - position)
            self.given[stored.name, start] = self.given.get((stored.name, start), 0) + piece
            yield bytes(piece)

    def checksum(self, stored: StoredObject) -> int:
        return int(google_crc32c.value(bytes(stored.size)))


def _pass(start: int) -> None:
    """A gate that is open."""


@contextmanager
def fetching(downloader: Downloader, directory: Path, name: str, size: int) -> Iterator[Job]:
    stored = StoredObject(name, size, "1", None, datetime.now(UTC))
    file = IncomingFile(stored, directory / name)
    yield downloader.move([Span(file, 0, size)], Progress(name, "r", size), lambda stretch: None)


def wait_until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_two_fetches_share_the_connections_evenly(tmp_path: Path) -> None:
    store, step = StepStore(), threading.Semaphore(0)
    store.gates = {"a": lambda _: step_through(step), "b": lambda _: step_through(step)}
    downloader = Downloader(store, PACE)
    with fetching(downloader, tmp_path, "a", 4_000 * KIB) as first:
        wait_until(lambda: len(first.parts) == 4)
        with fetching(downloader, tmp_path, "b", 4_000 * KIB) as second:
            # Every connection of the first comes to the end of its part, and then looks who needs it.
            while (len(first.parts), len(second.parts)) != (2, 2):
                step.release()
                time.sleep(0.0002)
            without = 0
            for _ in range(1000):
                step.release()
                time.sleep(0.0002)
                without += min(len(first.parts), len(second.parts)) == 0
            # Both connections of one may be on their way from one part to the next.
            assert without < 100
            step.release(20_000)
            assert first.ended.wait(20)
            assert second.ended.wait(20)
    assert (first.error, second.error) == (None, None)


def step_through(step: threading.Semaphore) -> None:
    assert step.acquire(timeout=20)


def test_nobody_waits_for_a_slow_connection(tmp_path: Path) -> None:
    """The first part's connection is slow: the others take over what it has not got to."""
    store = StepStore()
    store.gates = {"a": lambda start: time.sleep(0.05 if start == 0 else 0)}
    with fetching(Downloader(store, PACE), tmp_path, "a", 400 * KIB) as job:
        assert job.ended.wait(20)
    assert job.error is None
    (asked,) = (end - start for name, start, end in store.ranges if start == 0)
    assert store.given["a", 0] < asked / 2, "most of its part came over other connections"
    assert (tmp_path / "a").read_bytes() == bytes(400 * KIB)


def test_parts_cover_a_file_exactly(tmp_path: Path) -> None:
    store = StepStore()
    with fetching(Downloader(store, PACE), tmp_path, "a", 333 * KIB + 7) as job:
        assert job.ended.wait(20)
    assert job.error is None
    assert job.progress.done == 333 * KIB + 7


def test_threads_end_with_the_last_job(tmp_path: Path) -> None:
    def fetchers() -> list[threading.Thread]:
        return [thread for thread in threading.enumerate() if thread.name == "fetch"]

    wait_until(lambda: not fetchers())
    with fetching(Downloader(StepStore(), PACE), tmp_path, "a", 100 * KIB) as job:
        assert job.ended.wait(20)
    wait_until(lambda: not fetchers())


def test_files_are_closed_once_nobody_writes_to_them_any_more(tmp_path: Path) -> None:
    """A connection that hangs while its fetch has failed must not write into another file later."""
    store, gate = StepStore(), threading.Event()
    chunks = itertools.count()
    store.gates = {"hangs": lambda _: wait_for(gate) if next(chunks) else None}
    downloader = Downloader(store, PACE)
    stored = [StoredObject(name, 8 * KIB, "1", None, datetime.now(UTC)) for name in ("hangs", "fails")]
    files = [IncomingFile(each, tmp_path / each.name) for each in stored]
    store.gates["fails"] = lambda _: fail_once(files[0])
    job = downloader.move(
        [Span(file, 0, 8 * KIB) for file in files], Progress("m", "r", 1), lambda stretch: None
    )
    assert job.ended.wait(20)
    assert isinstance(job.error, ZeroDivisionError)
    assert not is_closed(files[0])
    gate.set()
    wait_until(lambda: is_closed(files[0]))


def is_closed(file: IncomingFile) -> bool:
    return file._file is None or file._file.closed


def wait_for(gate: threading.Event) -> None:
    assert gate.wait(20)


def fail_once(other: IncomingFile) -> None:
    wait_until(lambda: not is_closed(other))
    raise ZeroDivisionError


def test_nothing_to_move(tmp_path: Path) -> None:
    job = Downloader(StepStore(), PACE).move([], Progress("m", "r", 0), lambda stretch: None)
    assert job.ended.is_set()
    assert job.error is None


@pytest.mark.parametrize("size", [0, 1, CHUNK, 4 * KIB, 4 * KIB + 1])
def test_small_files(tmp_path: Path, size: int) -> None:
    with fetching(Downloader(StepStore(), PACE), tmp_path, "a", size) as job:
        assert job.ended.wait(20)
    assert job.error is None
    assert (tmp_path / "a").read_bytes() == bytes(size)


def test_a_connection_that_hangs_is_left_alone(tmp_path: Path) -> None:
    """Whatever it hangs in: its part is fetched by others, and nobody waits for it."""
    store, gate, calls = StepStore(), threading.Event(), itertools.count()
    store.gates = {"a": lambda _: wait_for(gate) if next(calls) == 0 else None}
    downloader = Downloader(store, replace(PACE, stall_seconds=0.1))
    with fetching(downloader, tmp_path, "a", 200 * KIB) as job:
        while not job.ended.wait(0.02):
            downloader.watch(job)
    assert job.error is None
    assert job.progress.retries >= 1
    assert (tmp_path / "a").read_bytes() == bytes(200 * KIB)
    gate.set()


def test_connections_that_all_hang_end_the_fetch(tmp_path: Path) -> None:
    store, gate = StepStore(), threading.Event()
    store.gates = {"a": lambda _: wait_for(gate)}
    downloader = Downloader(store, replace(PACE, stall_seconds=0.02, attempts=3))
    with fetching(downloader, tmp_path, "a", 200 * KIB) as job:
        while not job.ended.wait(0.01):
            downloader.watch(job)
    assert isinstance(job.error, StoreUnavailable)
    assert "fewer than" in job.error.message
    gate.set()


def test_a_small_fetch_does_not_wait_for_a_large_one(tmp_path: Path) -> None:
    """Every connection is in the middle of a long part: some make way at once."""
    store, step = StepStore(), threading.Semaphore(0)
    store.gates = {"large": lambda _: step_through(step)}
    downloader = Downloader(store, PACE)
    with fetching(downloader, tmp_path, "large", 4_000 * KIB) as large:
        wait_until(lambda: len(large.parts) == 4)
        with fetching(downloader, tmp_path, "small", KIB) as small:
            # A few chunks on each, whichever takes them first: far from the end of a part.
            for _ in range(100):
                step.release()
                if small.ended.wait(0.1):
                    break
            assert small.ended.is_set()
        step.release(20_000)
        assert large.ended.wait(20)
    assert (small.error, large.error) == (None, None)


def test_a_job_that_is_stopped_leaves_its_connections_to_others(tmp_path: Path) -> None:
    """Whatever they hang in; and nothing is written any more when that comes to its end."""
    store, gate = StepStore(), threading.Event()
    store.gates = {"a": lambda _: wait_for(gate)}
    downloader = Downloader(store, PACE)
    with fetching(downloader, tmp_path, "a", 200 * KIB) as job:
        wait_until(lambda: len(job.parts) == 4)
        downloader.stop(job, StoreUnavailable("enough"))
    assert job.ended.is_set()
    assert isinstance(job.error, StoreUnavailable)
    with fetching(downloader, tmp_path, "b", 200 * KIB) as other:
        assert other.ended.wait(10)
    gate.set()
    wait_until(lambda: not any(thread.name == "fetch" for thread in threading.enumerate()))
    assert job.progress.done == 0
    assert not (tmp_path / "a").exists()


def test_a_file_that_is_being_verified_is_not_closed_by_who_stops_the_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("inference_service.storage.snapshots.downloader.LEAVE_SECONDS", 0.05)
    verifying, gate = threading.Event(), threading.Event()
    sums: list[int] = []

    def read_back(file: IncomingFile) -> FileChecksums:
        verifying.set()
        wait_for(gate)
        found = original(file)
        sums.append(found.crc32c)
        return found

    original = IncomingFile.read_back
    monkeypatch.setattr(IncomingFile, "read_back", read_back)
    downloader = Downloader(StepStore(), PACE)
    with fetching(downloader, tmp_path, "a", 4 * KIB) as job:
        wait_for(verifying)
        downloader.stop(job, StoreUnavailable("enough"))
    (file,) = job.files
    assert not is_closed(file)
    gate.set()
    wait_until(lambda: is_closed(file))
    assert sums == [google_crc32c.value(bytes(4 * KIB))]


def test_a_job_that_has_ended_well_is_not_stopped(tmp_path: Path) -> None:
    downloader = Downloader(StepStore(), PACE)
    with fetching(downloader, tmp_path, "a", 4 * KIB) as job:
        assert job.ended.wait(10)
        downloader.stop(job, StoreUnavailable("enough"))
    assert job.error is None


def test_no_thread_can_be_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    with fetching(Downloader(StepStore(), PACE), tmp_path, "a", KIB) as job:
        assert isinstance(job.error, StoreUnavailable)
    monkeypatch.undo()
    with fetching(Downloader(StepStore(), PACE), tmp_path, "b", KIB) as job:
        assert job.ended.wait(10)
    assert job.error is None


def test_a_model_of_thousands_of_files_needs_few_descriptors(tmp_path: Path) -> None:
    stored = [StoredObject(f"f{number}", 10, "1", None, datetime.now(UTC)) for number in range(2000)]
    files = [IncomingFile(each, tmp_path / each.name) for each in stored]
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(list(Path("/proc/self/fd").iterdir())) + 50, hard))
    try:
        spans = [Span(file, 0, 10) for file in files]
        job = Downloader(StepStore(), PACE).move(spans, Progress("m", "r", 1), lambda stretch: None)
        assert job.ended.wait(60)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert job.error is None


class TroubledStore:
    """Random bytes that come in random pieces, break off, hang, come damaged.

    Not damaged if it has no checksums: nothing would tell.
    """

    connections = 4

    def __init__(self, seed: int, *, has_checksums: bool = True) -> None:
        self.has_checksums = has_checksums
        self.chance = random.Random(seed)
        sizes = [self.chance.choice([0, 1, 5, 100, 3000, 20_000]) for _ in range(self.chance.randrange(1, 5))]
        self.contents = {f"f{number}": self.chance.randbytes(size) for number, size in enumerate(sizes)}
        self.trouble = self.chance.choice([0, 0.05, 0.2])

    def list(self, prefix: str) -> list[StoredObject]:
        return [
            StoredObject(name, len(content), "1", google_crc32c.value(content), datetime.now(UTC))
            for name, content in self.contents.items()
        ]

    def read(self, stored: StoredObject, start: int = 0, end: int | None = None) -> Bytes:
        content = self.contents[stored.name][start:end]
        if self.chance.random() < self.trouble:
            raise StoreUnavailable("no")
        damages = self.has_checksums
        if content and damages and self.chance.random() < self.trouble / 4:
            content = bytes([content[0] ^ 1]) + content[1:]
        if self.chance.random() < self.trouble:
            content = content[: len(content) // 2] + (
                b"more" if damages and self.chance.random() < 0.2 else b""
            )
        position = 0
        while position < len(content):
            step = self.chance.randrange(1, 400)
            if self.chance.random() < self.trouble / 20:
                time.sleep(0.15)
            yield content[position : position + step]
            position += step

    def checksum(self, stored: StoredObject) -> int:
        return int(google_crc32c.value(self.contents[stored.name]))


@pytest.mark.parametrize("seed", range(150))
def test_whatever_happens_a_file_is_exact_or_the_fetch_ends_in_an_error(tmp_path: Path, seed: int) -> None:
    store = TroubledStore(seed, has_checksums=seed % 3 > 0)
    config = TransferConfig(
        connections=store.chance.choice([1, 2, 4, 8]),
        min_span=store.chance.choice([1, 7, 64, 512]),
        max_span=store.chance.choice([64, 1000, 5000]),
        stretch=store.chance.choice([16, 500]),
        stall_seconds=0.05,
        stall_bytes=store.chance.choice([1, 64]),
        first_delay=0.0005,
        longest_delay=0.002,
        retries=store.chance.choice([5, 96]),
    )
    downloader, begun = Downloader(store, config), []
    for number in range(store.chance.randrange(1, 4)):
        directory = tmp_path / str(number)
        directory.mkdir()
        files = [IncomingFile(stored, directory / stored.name) for stored in store.list("")]
        progress = Progress("m", "r", sum(map(len, store.contents.values())))
        spans = [Span(file, 0, file.stored.size) for file in files]
        begun.append((directory, downloader.move(spans, progress, lambda stretch: None)))
    deadline = time.monotonic() + 30
    while not all(job.ended.wait(0.005) for _, job in begun):
        assert time.monotonic() < deadline, [(job.spans, job.parts) for _, job in begun]
        for _, job in begun:
            downloader.watch(job)
    for directory, job in begun:
        assert isinstance(job.error, StoreUnavailable | SnapshotCorrupt | None)
        if job.error is None:
            assert {path.name: path.read_bytes() for path in directory.iterdir()} == store.contents
            assert job.progress.done == job.progress.total
    wait_until(lambda: all(is_closed(file) for _, job in begun for file in job.files))
