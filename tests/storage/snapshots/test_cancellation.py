"""A fetch that nobody waits for any more stops and gives everything back; the next goes on from there."""

import asyncio
import hashlib
import json
import logging
import os
import random
import threading
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import google_crc32c
import pytest

from inference_service.checkpoints.snapshot import Snapshot
from inference_service.errors import DiskFull, StoreUnavailable
from inference_service.storage.bucket.model import ListedModel, models_in
from inference_service.storage.snapshots import cache as disk_cache
from inference_service.storage.snapshots import checksums, downloader, locks, staging
from inference_service.storage.snapshots import snapshots as snapshot_store
from inference_service.storage.snapshots.cancellation import Cancelled, CancelToken
from inference_service.storage.snapshots.layout import INCOMPLETE, JOURNAL, PROMISE, allocated_bytes
from inference_service.storage.snapshots.locks import revision_lock
from inference_service.storage.snapshots.snapshots import POLL_INTERVAL, SnapshotStore
from tests.fixtures.caches import QUICK, SlowStore, open_snapshots
from tests.fixtures.sync_process import sums_of

KIB = 1 << 10
MIB = 1 << 20
# Nothing hangs for so long that its part is given to another connection.
PATIENT = replace(QUICK, stall_seconds=30)
RANDOM = random.Random(11)
CONTENTS = {
    "config.json": b"{}",
    "empty.json": b"",
    "tokenizer.json": RANDOM.randbytes(90 * KIB),
    "model.safetensors": RANDOM.randbytes(3 * MIB + 77),
}
SUMS = {name: hashlib.sha256(content).hexdigest() for name, content in CONTENTS.items()}
TOTAL = sum(map(len, CONTENTS.values()))
# Within this a fetch stops whose connections all hang: a look at the order, and the wait for them to leave;
# most of it is what a busy machine may take.
STOP_SECONDS = 15.0
# So slow that nothing of TOTAL comes to its end before it is stopped.
SLOW = 0.02


@pytest.fixture
def store(tmp_path: Path) -> SlowStore:
    """The models `m` and `n`, of the same files."""
    for name in ("m", "n"):
        put(tmp_path / "source", name)
    return SlowStore(tmp_path / "source", pause=0.004)


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def put(source: Path, name: str) -> None:
    directory = source / "models" / name
    directory.mkdir(parents=True)
    for file, content in CONTENTS.items():
        (directory / file).write_bytes(content)


def listed(store: SlowStore, name: str = "m") -> ListedModel:
    return models_in(store.list("models/"), "models/")[name]


def stagings(cache: Path) -> list[Path]:
    return sorted(cache.glob(f"*/{INCOMPLETE}*"))


def fetching_threads() -> int:
    return sum(thread.name == "fetch" for thread in threading.enumerate())


async def wait_until(true: Callable[[], bool], seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.001)


async def cancelled(task: asyncio.Task[Snapshot]) -> None:
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


@asynccontextmanager
async def in_the_middle(
    snapshots: SnapshotStore, store: SlowStore, name: str = "m", there: int = TOTAL // 6
) -> AsyncIterator[asyncio.Task[Snapshot]]:
    """A task that waits for a snapshot of which so many bytes are there."""
    before = store.bytes_read
    task = asyncio.create_task(snapshots.snapshot(listed(store, name)))
    await wait_until(lambda: store.bytes_read - before > there)
    yield task
    assert task.done()


def assert_nothing_is_promised(snapshots: SnapshotStore, cache: Path) -> None:
    assert list(cache.rglob(PROMISE)) == []
    assert snapshots._disk.used() == allocated_bytes(cache)
    assert snapshots._disk._held == {}


def assert_exact(snapshot: Snapshot, cache: Path) -> None:
    """The snapshot is what it should be, and nothing else is left of the model."""
    assert sums_of(snapshot.path) == SUMS
    assert [path.name for path in (cache / snapshot.model).iterdir()] == [snapshot.revision]


async def test_it_stops_and_the_next_goes_on(store: SlowStore, cache: Path) -> None:
    snapshots = open_snapshots(store, cache, config=PATIENT)
    async with in_the_middle(snapshots, store) as task:
        store.pause = SLOW
        await cancelled(task)
    await wait_until(lambda: snapshots.progress() == [], STOP_SECONDS)
    stopped_at = store.bytes_read
    assert stopped_at < TOTAL, "the test was too slow to see anything"
    await asyncio.sleep(0.1)
    assert store.bytes_read == stopped_at
    await wait_until(lambda: fetching_threads() == 0)
    assert len(stagings(cache)) == 1, "what has arrived stays"
    assert_nothing_is_promised(snapshots, cache)
    store.pause = 0
    assert_exact(await snapshots.snapshot(listed(store)), cache)
    lost = store.bytes_read - TOTAL
    assert lost < TOTAL // 10, "it went on where the first had stopped"


async def test_a_fetch_that_others_wait_for_goes_on(store: SlowStore, cache: Path) -> None:
    snapshots = open_snapshots(store, cache, config=PATIENT)
    async with in_the_middle(snapshots, store) as first:
        second = asyncio.create_task(snapshots.snapshot(listed(store)))
        await asyncio.sleep(0)
        store.pause = SLOW
        await cancelled(first)
    await asyncio.sleep(2 * POLL_INTERVAL)
    assert not second.done()
    store.pause = 0
    assert_exact(await second, cache)
    assert store.bytes_read < TOTAL + TOTAL // 20, "one fetch, from its beginning to its end"
    await cancelled_at_once(snapshots, store)
    snapshots.release(await second)
    assert_nothing_is_promised(snapshots, cache)


async def cancelled_at_once(snapshots: SnapshotStore, store: SlowStore) -> None:
    task = asyncio.create_task(snapshots.snapshot(listed(store)))
    await asyncio.sleep(0)
    await cancelled(task)
    await wait_until(lambda: not snapshots._under_way)


async def test_all_leave_but_one_by_one(store: SlowStore, cache: Path) -> None:
    snapshots = open_snapshots(store, cache, config=PATIENT)
    async with in_the_middle(snapshots, store) as first:
        store.pause = SLOW
        others = [asyncio.create_task(snapshots.snapshot(listed(store))) for _ in range(5)]
        await asyncio.sleep(0)
        for task in (others[0], first, *others[1:4]):
            await cancelled(task)
    seen = store.bytes_read
    await wait_until(lambda: store.bytes_read > seen + 50 * KIB)
    await cancelled(others[4])
    await wait_until(lambda: snapshots.progress() == [], STOP_SECONDS)
    assert store.bytes_read < TOTAL


@pytest.mark.parametrize("pause", [None, 0.0, 0.01, 0.1, 0.2, 0.3, 0.6])
async def test_one_that_comes_while_it_stops_gets_its_snapshot(
    store: SlowStore, cache: Path, pause: float | None
) -> None:
    snapshots = open_snapshots(store, cache, config=PATIENT)
    async with in_the_middle(snapshots, store) as first:
        first.cancel()
        if pause is not None:
            await asyncio.sleep(pause)
        followers = [asyncio.create_task(snapshots.snapshot(listed(store))) for _ in range(3)]
        await cancelled(first)
    await asyncio.sleep(2 * POLL_INTERVAL)
    store.pause = 0
    for snapshot in await asyncio.gather(*followers):
        assert_exact(snapshot, cache)
    assert store.bytes_read < TOTAL + TOTAL // 5


async def test_one_that_comes_while_it_stops_may_leave_too(store: SlowStore, cache: Path) -> None:
    snapshots = open_snapshots(store, cache, config=PATIENT)
    async with in_the_middle(snapshots, store) as first:
        await cancelled(first)
    store.pause = 0.02
    for seconds in (0.0, 0.05, 0.25, 0.3):
        task = asyncio.create_task(snapshots.snapshot(listed(store)))
        await asyncio.sleep(seconds)
        await cancelled(task)
    store.pause = 0
    assert_exact(await snapshots.snapshot(listed(store)), cache)


async def test_connections_that_hang_hold_nobody_up(
    store: SlowStore, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are left alone: others take their places, and what they bring late is written nowhere."""
    monkeypatch.setattr(downloader, "LEAVE_SECONDS", 5)
    snapshots = open_snapshots(store, cache, config=PATIENT)
    async with in_the_middle(snapshots, store) as task:
        store.hangs = PATIENT.connections
        await wait_until(lambda: store.hangs == 0)
        task.cancel()
        longest = await longest_breath(lambda: snapshots.progress() == [])
        assert longest < 4, "the event loop went on turning while they were waited for"
        assert_nothing_is_promised(snapshots, cache)
        store.pause = 0
        async with asyncio.timeout(20):
            snapshot = await snapshots.snapshot(listed(store))
    assert fetching_threads() >= PATIENT.connections
    store.hung_up.set()
    await wait_until(lambda: fetching_threads() == 0)
    assert_exact(snapshot, cache)


async def longest_breath(until: Callable[[], bool]) -> float:
    """The longest time for which the event loop stood still meanwhile."""
    longest, ends = 0.0, time.monotonic() + STOP_SECONDS
    while not until():
        now = time.monotonic()
        assert now < ends
        await asyncio.sleep(0.001)
        longest = max(longest, time.monotonic() - now)
    return longest


async def test_connections_that_hang_after_an_error_hold_nobody_up(store: SlowStore, cache: Path) -> None:
    snapshots = open_snapshots(store, cache, config=replace(PATIENT, retries=0))
    task = asyncio.create_task(snapshots.snapshot(listed(store)))
    await wait_until(lambda: store.bytes_read > TOTAL // 3)
    store.hangs = PATIENT.connections - 1
    await wait_until(lambda: store.hangs == 0)
    store.fails = True
    with pytest.raises(StoreUnavailable):
        await task
    store.fails = False
    async with in_the_middle(snapshots, store, "n") as again:
        assert fetching_threads() >= 2 * PATIENT.connections - 1, "others have taken their places"
        assert_exact(await again, cache)
    store.hung_up.set()


async def test_another_fetch_goes_on(store: SlowStore, cache: Path) -> None:
    snapshots = open_snapshots(store, cache, config=PATIENT)
    other = asyncio.create_task(snapshots.snapshot(listed(store, "n")))
    async with in_the_middle(snapshots, store) as task:
        await cancelled(task)
    assert_exact(await other, cache)
    assert [progress.model for progress in snapshots.progress()] == []


async def test_what_has_not_begun_never_begins(
    store: SlowStore, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(snapshot_store, "FETCHES_AT_ONCE", 1)
    snapshots = open_snapshots(store, cache, config=PATIENT)
    begun: list[str] = []
    monkeypatch.setattr(snapshots, "ensure", noting(snapshots.ensure, begun))
    async with in_the_middle(snapshots, store, "n") as first:
        queued = asyncio.create_task(snapshots.snapshot(listed(store)))
        await asyncio.sleep(0.05)
        await cancelled(queued)
        again = asyncio.create_task(snapshots.snapshot(listed(store)))
        await asyncio.sleep(0.05)
        await cancelled(again)
        store.pause = 0
        assert_exact(await first, cache)
        assert begun == ["n"]
        assert_exact(await snapshots.snapshot(listed(store)), cache)


def noting(ensure: Callable[..., None], begun: list[str]) -> Callable[..., None]:
    def noted(model: ListedModel, *rest: Any) -> None:
        begun.append(model.name)
        ensure(model, *rest)

    return noted


async def test_a_wait_for_another_process_ends(store: SlowStore, cache: Path) -> None:
    snapshots, model = open_snapshots(store, cache), listed(store)
    store.pause = 0
    with revision_lock(cache / "m" / model.revision, lambda: False):
        task = asyncio.create_task(snapshots.snapshot(model))
        await asyncio.sleep(0.3)
        await cancelled(task)
        await wait_until(lambda: not snapshots._under_way)
        assert store.bytes_read == 0
        again = asyncio.create_task(snapshots.snapshot(model))
        await asyncio.sleep(0.1)
        assert not again.done()
    assert_exact(await again, cache)


@pytest.mark.parametrize("seed", range(40))
async def test_whenever_it_is_cancelled_the_next_succeeds(store: SlowStore, cache: Path, seed: int) -> None:
    chance = random.Random(seed)
    store.pause = chance.choice([0.0, 0.0005, 0.001])
    snapshots = open_snapshots(store, cache)
    model = listed(store)
    for _ in range(chance.randrange(1, 5)):
        tasks = [asyncio.create_task(snapshots.snapshot(model)) for _ in range(chance.randrange(1, 4))]
        for task in chance.sample(tasks, len(tasks)):
            await asyncio.sleep(chance.choice([0.0, chance.uniform(0, 0.02), chance.uniform(0, 0.3)]))
            task.cancel()
        for outcome in await asyncio.gather(*tasks, return_exceptions=True):
            if isinstance(outcome, Snapshot):
                snapshots.release(outcome)
            else:
                assert isinstance(outcome, asyncio.CancelledError)
        if chance.random() < 0.5:
            await wait_until(lambda: not snapshots._under_way, STOP_SECONDS)
            assert snapshots.progress() == []
            assert len(stagings(cache)) <= 1
            assert_nothing_is_promised(snapshots, cache)
    store.pause = 0
    snapshot = await snapshots.snapshot(model)
    assert_exact(snapshot, cache)
    snapshots.release(snapshot)
    assert_nothing_is_promised(snapshots, cache)


@pytest.mark.parametrize("ticks", range(8))
async def test_cancelled_after_some_turns_of_the_event_loop(
    store: SlowStore, cache: Path, ticks: int
) -> None:
    store.pause = 0
    snapshots = open_snapshots(store, cache)
    task = asyncio.create_task(snapshots.snapshot(listed(store)))
    for _ in range(ticks):
        await asyncio.sleep(0)
    await cancelled(task)
    assert_exact(await snapshots.snapshot(listed(store)), cache)


@pytest.mark.parametrize("ticks", range(4))
async def test_cancelled_about_the_end_of_the_fetch(store: SlowStore, cache: Path, ticks: int) -> None:
    """Who is cancelled holds nothing, who has the snapshot holds it."""
    store.pause = 0
    snapshots = open_snapshots(store, cache)
    task = asyncio.create_task(snapshots.snapshot(listed(store)))
    await asyncio.sleep(0)
    (fetch,) = snapshots._under_way.values()
    await fetch.ended.wait()
    for _ in range(ticks):
        await asyncio.sleep(0)
    task.cancel()
    (outcome,) = await asyncio.gather(task, return_exceptions=True)
    if isinstance(outcome, Snapshot):
        assert list(snapshots._disk._held) == [outcome.path]
        snapshots.release(outcome)
    assert_nothing_is_promised(snapshots, cache)


async def test_cancelled_between_the_end_of_the_fetch_and_its_hold(
    store: SlowStore, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.pause = 0
    snapshots = open_snapshots(store, cache, quota=TOTAL * 3 // 2)
    task = asyncio.create_task(snapshots.snapshot(listed(store)))
    await asyncio.sleep(0)
    (fetch,) = snapshots._under_way.values()
    tell = fetch.ended.set

    def tell_and_cancel() -> None:
        tell()
        task.cancel()

    monkeypatch.setattr(fetch.ended, "set", tell_and_cancel)
    with pytest.raises(asyncio.CancelledError):
        await task
    assert fetch.work.exception() is None, "it was fetched"
    assert_nothing_is_promised(snapshots, cache)
    assert_exact(await snapshots.snapshot(listed(store, "n")), cache)
    assert list((cache / "m").iterdir()) == [], "and may be evicted"


def test_a_loop_that_closes_before_the_fetch_has_stopped(
    store: SlowStore, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    snapshots = open_snapshots(store, cache, config=PATIENT)

    async def shut_down() -> None:
        async with in_the_middle(snapshots, store) as task:
            await cancelled(task)

    asyncio.run(shut_down())
    deadline = time.monotonic() + STOP_SECONDS
    while snapshots.progress() or any(cache.glob("m/.*.lock")):
        assert time.monotonic() < deadline
        time.sleep(0.001)
    snapshots._threads.shutdown()
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []


async def test_its_room_is_the_next_models(store: SlowStore, cache: Path) -> None:
    """The disk has room for one; who comes while the other is being stopped need not come again."""
    snapshots = open_snapshots(store, cache, quota=TOTAL * 5 // 4, config=PATIENT)
    async with in_the_middle(snapshots, store) as task:
        with pytest.raises(DiskFull):
            await snapshots.snapshot(listed(store, "n"))
        task.cancel()
        await asyncio.sleep(0)
        store.pause = 0
        assert_exact(await snapshots.snapshot(listed(store, "n")), cache)


async def test_a_leftover_is_not_multiplied(store: SlowStore, cache: Path) -> None:
    """Fetches that are cancelled while they copy what the first has left leave no copies of it."""
    snapshots, model = open_snapshots(store, cache, config=PATIENT), listed(store)
    async with in_the_middle(snapshots, store, there=TOTAL // 3) as task:
        store.pause = SLOW
        await cancelled(task)
    await wait_until(lambda: not snapshots._under_way, STOP_SECONDS)
    (leftover,) = stagings(cache)
    for copied in (1, 3, 5):
        with pytest.MonkeyPatch.context() as patch:
            token = cancelled_at(patch, staging, "_copy", copied)
            with pytest.raises(Cancelled):
                snapshots.ensure(model, token)
        assert stagings(cache) == [leftover]
    store.pause = 0
    before = store.bytes_read
    assert_exact(await snapshots.snapshot(model), cache)
    assert store.bytes_read - before < TOTAL * 3 // 4


async def test_what_was_taken_over_stays(
    store: SlowStore, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of two leftovers one is copied and gone when the fetch is cancelled."""
    store.pause = 0
    snapshots, model = open_snapshots(store, cache), listed(store)
    for number, name in enumerate(("model.safetensors", "tokenizer.json")):
        leftover = cache / "m" / f"{INCOMPLETE}{model.revision}-{number}"
        leftover.mkdir(parents=True)
        (leftover / name).write_bytes(CONTENTS[name])
        line = json.dumps([name, 0, len(CONTENTS[name]), google_crc32c.value(CONTENTS[name])])
        (leftover / JOURNAL).write_text(f"{line}\n")
    token = cancelled_at(monkeypatch, staging, "_copy", 1)
    with pytest.raises(Cancelled):
        snapshots.ensure(model, token)
    assert len(stagings(cache)) == 2
    assert_exact(await snapshots.snapshot(model), cache)
    assert store.bytes_read == len(CONTENTS["config.json"])


# The steps of a fetch that has another revision to link from and a leftover to copy from.
STEPS: list[tuple[Any, str, int]] = [
    (snapshot_store, "is_whole", 1),
    (locks, "_try_lock", 1),
    (snapshot_store, "is_whole", 2),
    (snapshot_store, "stagings_of", 1),
    (checksums, "of_file", 1),
    (staging, "_read", 2),
    (disk_cache.Disk, "_make_room", 1),
    (snapshot_store, "stagings", 1),
    (staging, "_copy", 1),
    (staging, "_copy", 2),
    (staging, "_copy", 9),
    (SlowStore, "_wait", 1),
    (SlowStore, "_wait", 20),
    (staging.IncomingFile, "write", 30),
    (staging.IncomingFile, "read_back", 1),
    (staging.IncomingFile, "flush", 1),
    (staging.Staging, "seal", 1),
    (snapshot_store, "sync_directory", 1),
    (disk_cache.Disk, "replace", 1),
]


@pytest.mark.parametrize(("place", "name", "call"), STEPS, ids=str)
async def test_cancelled_at_any_step(
    store: SlowStore, cache: Path, monkeypatch: pytest.MonkeyPatch, place: Any, name: str, call: int
) -> None:
    store.pause = 0
    snapshots = open_snapshots(store, cache)
    snapshots.release(await snapshots.snapshot(listed(store)))
    (store.root / "models/m/model.safetensors").write_bytes(CONTENTS["model.safetensors"][::-1])
    model = listed(store)
    store.pause = 0.002
    async with in_the_middle(snapshots, store, there=TOTAL // 3) as task:
        store.pause = SLOW
        await cancelled(task)
    await wait_until(lambda: not snapshots._under_way)
    store.pause = 0.0005
    with monkeypatch.context() as patch:
        token = cancelled_at(patch, place, name, call)
        with suppress(Cancelled):
            await asyncio.to_thread(snapshots.ensure, model, token)
    assert token.cancelled, "it came to this step"
    assert snapshots.progress() == []
    assert_nothing_is_promised(snapshots, cache)
    assert len(stagings(cache)) <= 1
    seen = store.bytes_read
    snapshot = await snapshots.snapshot(model)
    assert sums_of(snapshot.path)["tokenizer.json"] == SUMS["tokenizer.json"]
    assert (snapshot.path / "model.safetensors").read_bytes() == CONTENTS["model.safetensors"][::-1]
    assert stagings(cache) == []
    assert store.bytes_read - seen < TOTAL * 3 // 4, "what had arrived was not fetched again"


def cancelled_at(patch: pytest.MonkeyPatch, place: Any, name: str, call: int) -> CancelToken:
    """A token that is cancelled when `name` is called for the `call`-th time."""
    token, called, counting = CancelToken(), [0], threading.Lock()
    original = getattr(place, name)

    def counted(*arguments: Any, **named: Any) -> Any:
        with counting:
            called[0] += 1
            if called[0] == call:
                token.cancel()
        return original(*arguments, **named)

    patch.setattr(place, name, counted)
    return token


async def test_cancelled_while_it_waits_for_room(
    store: SlowStore, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshots = open_snapshots(store, cache)
    token = cancelled_at(monkeypatch, disk_cache.Disk, "_make_room", 1)
    with pytest.raises(Cancelled):
        snapshots.ensure(listed(store), token)
    assert store.bytes_read == 0
    assert stagings(cache) == []


async def test_what_is_linked_is_not_read_to_its_end(
    store: SlowStore, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The sums of another revision's files are looked at piece by piece."""
    store.pause = 0
    snapshots = open_snapshots(store, cache)
    await snapshots.snapshot(listed(store))
    (store.root / "models/m/config.json").write_bytes(b"[]")
    monkeypatch.setattr(staging, "COPY_BYTES", 64 * KIB)
    read: list[int] = []
    original = os.pread

    def pread(descriptor: int, count: int, offset: int) -> bytes:
        read.append(count)
        return original(descriptor, count, offset)

    monkeypatch.setattr(os, "pread", pread)
    token = cancelled_at(monkeypatch, staging, "_read", 2)
    with pytest.raises(Cancelled):
        snapshots.ensure(listed(store), token)
    assert len(read) < 10
    assert stagings(cache) == [], "nothing has arrived, nothing stays"


def test_a_token_is_cancelled_for_good() -> None:
    token = CancelToken()
    token.check()
    assert not token.cancelled
    token.cancel()
    token.cancel()
    assert token.cancelled
    with pytest.raises(Cancelled):
        token.check()
