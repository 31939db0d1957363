"""Snapshots: exact, or a clear error and nothing left behind."""

import asyncio
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import google_crc32c
import pytest

from inference_service.errors import CacheError, SnapshotCorrupt, StoreError, StoreUnavailable
from inference_service.storage.bucket.directory import DirectoryStore
from inference_service.storage.bucket.model import ListedModel, models_in
from inference_service.storage.bucket.store import StoredObject
from inference_service.storage.snapshots.layout import MANIFEST, ROOM_LOCK
from inference_service.storage.snapshots.staging import Coverage, Staging, Stretch
from tests.fixtures.caches import CountingStore, open_snapshots

CONTENTS = {"config.json": b"{}", "model.safetensors": os.urandom(300_000), "empty.json": b""}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    directory = tmp_path / "source" / "models" / "m"
    directory.mkdir(parents=True)
    for name, content in CONTENTS.items():
        (directory / name).write_bytes(content)
    return tmp_path / "source"


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def listed(store: DirectoryStore) -> ListedModel:
    return models_in(store.list("models/"), "models/")["m"]


def left_behind(cache: Path) -> list[str]:
    return [path.name for path in cache.rglob("*") if path.is_file() and path.name != ROOM_LOCK]


async def test_a_snapshot_is_the_source(source: Path, cache: Path) -> None:
    store = DirectoryStore(source)
    snapshot = await open_snapshots(store, cache).snapshot(listed(store))
    assert {name: (snapshot.path / name).read_bytes() for name in CONTENTS} == CONTENTS
    assert (snapshot.path / MANIFEST).is_file()
    assert snapshot.path.parent.name == "m"
    assert sorted(path.name for path in snapshot.path.parent.iterdir()) == [snapshot.revision]


async def test_it_is_fetched_once_and_kept_across_processes(source: Path, cache: Path) -> None:
    store = CountingStore(source)
    model = listed(store)
    snapshots = open_snapshots(store, cache)
    await asyncio.gather(*(snapshots.snapshot(model) for _ in range(20)))
    read = store.bytes_read
    assert model.bytes <= read < 2 * model.bytes, "a span that is handed over may come twice"
    await open_snapshots(store, cache).snapshot(model)
    assert store.bytes_read == read


async def test_a_new_revision_lies_beside_the_old_and_shares_what_did_not_change(
    source: Path, cache: Path
) -> None:
    store = CountingStore(source)
    snapshots = open_snapshots(store, cache)
    old = await snapshots.snapshot(listed(store))
    (source / "models/m/config.json").write_bytes(b'{"new": true}')
    store.bytes_read = 0
    new = await snapshots.snapshot(listed(store))
    assert new.path != old.path
    assert (old.path / "config.json").read_bytes() == b"{}"
    assert (new.path / "config.json").read_bytes() == b'{"new": true}'
    assert (new.path / "model.safetensors").samefile(old.path / "model.safetensors")
    assert store.bytes_read == len(b'{"new": true}')


async def test_a_damaged_file_of_another_revision_is_not_shared(source: Path, cache: Path) -> None:
    store = DirectoryStore(source)
    old = await open_snapshots(store, cache).snapshot(listed(store))
    content = bytearray(CONTENTS["model.safetensors"])
    content[1000] ^= 1
    (old.path / "model.safetensors").write_bytes(content)
    (source / "models/m/config.json").write_bytes(b"[]")
    new = await open_snapshots(store, cache).snapshot(listed(store))
    assert (new.path / "model.safetensors").read_bytes() == CONTENTS["model.safetensors"]


async def test_damaged_bytes_are_refused_and_nothing_is_kept(source: Path, cache: Path) -> None:
    store = OtherSums(source)
    with pytest.raises(SnapshotCorrupt, match=r"crc32c [0-9a-f]{8} over .* 00000001"):
        await open_snapshots(store, cache).snapshot(listed(store))
    assert left_behind(cache) == []


async def test_a_short_read_is_refused(source: Path, cache: Path) -> None:
    store = DirectoryStore(source)
    model = listed(store)
    longer = tuple(replace(stored, size=stored.size + 1) for stored in model.objects)
    with pytest.raises(StoreUnavailable, match="broke off at byte"):
        await open_snapshots(store, cache).snapshot(replace(model, objects=longer))
    assert MANIFEST not in left_behind(cache)


async def test_a_file_replaced_after_the_listing_is_refused(source: Path, cache: Path) -> None:
    store = DirectoryStore(source)
    model = listed(store)
    (source / "models/m/config.json").write_bytes(b"[]")
    with pytest.raises(StoreError, match="replaced"):
        await open_snapshots(store, cache).snapshot(model)
    assert left_behind(cache) == []


async def test_a_directory_without_a_manifest_is_no_snapshot(source: Path, cache: Path) -> None:
    store = DirectoryStore(source)
    model = listed(store)
    half = cache / "m" / model.revision
    half.mkdir(parents=True)
    for name, content in CONTENTS.items():
        (half / name).write_bytes(bytes(len(content)))
    snapshot = await open_snapshots(store, cache).snapshot(model)
    assert (snapshot.path / "model.safetensors").read_bytes() == CONTENTS["model.safetensors"]


@pytest.mark.parametrize("damage", [Path.unlink, lambda file: file.write_bytes(b"cut")])
async def test_a_snapshot_that_lost_a_file_is_fetched_again(
    source: Path, cache: Path, damage: Callable[[Path], object]
) -> None:
    store = DirectoryStore(source)
    snapshot = await open_snapshots(store, cache).snapshot(listed(store))
    damage(snapshot.path / "model.safetensors")
    again = await open_snapshots(store, cache).snapshot(listed(store))
    assert (again.path / "model.safetensors").read_bytes() == CONTENTS["model.safetensors"]


async def test_a_cache_that_cannot_be_written_is_named(source: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    store = DirectoryStore(source)
    with pytest.raises(CacheError, match="LOCAL_MODEL_CACHE"):
        await open_snapshots(store, tmp_path / "file").snapshot(listed(store))


KILLED = """
import asyncio, sys, time
from pathlib import Path
from inference_service.storage.bucket.store import DirectoryStore
from tests.fixtures.caches import CountingStore, open_sync
from tests.storage.snapshots.test_snapshots import listed

class Slow(DirectoryStore):
    def read(self, stored, start=0, end=None):
        for chunk in super().read(stored, start, end):
            print("reading", flush=True)
            time.sleep(60)
            yield chunk

store = Slow(Path(sys.argv[1]))
asyncio.run(open_sync(store, Path(sys.argv[2])).snapshot(listed(store)))
"""


async def test_kill_9_in_the_middle_leaves_nothing_that_counts(source: Path, cache: Path) -> None:
    fetching = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(source), str(cache)], stdout=subprocess.PIPE
    )
    assert fetching.stdout is not None
    with fetching, fetching.stdout:
        fetching.stdout.readline()
        fetching.send_signal(signal.SIGKILL)
        fetching.wait()
    store = DirectoryStore(source)
    snapshot = await open_snapshots(store, cache).snapshot(listed(store))
    assert {name: (snapshot.path / name).read_bytes() for name in CONTENTS} == CONTENTS


async def test_what_a_killed_fetch_left_goes_and_what_another_writes_stays(source: Path, cache: Path) -> None:
    dead, alive = cache / "m" / ".incomplete-dead-1", cache / "m" / ".incomplete-alive-1"
    for staging in (dead, alive):
        staging.mkdir(parents=True)
        (staging / "model.safetensors").write_bytes(b"half")
    with (cache / "m" / ".alive.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        store = DirectoryStore(source)
        await open_snapshots(store, cache).snapshot(listed(store))
        assert (dead.exists(), alive.exists()) == (False, True)


class OtherSums(DirectoryStore):
    has_checksums = True

    def checksum(self, stored: StoredObject) -> int:
        return 1


async def test_two_leftovers_with_the_same_stretches_count_once(source: Path, cache: Path) -> None:
    """What a fetch leaves that was killed while it took over what another had left."""
    store = DirectoryStore(source)
    model = listed(store)
    weights = CONTENTS["model.safetensors"]
    line = json.dumps(["model.safetensors", 0, 200_000, google_crc32c.value(weights[:200_000])])
    for number in (1, 2):
        leftover = cache / "m" / f".incomplete-{model.revision}-{number}"
        leftover.mkdir(parents=True)
        (leftover / "model.safetensors").write_bytes(weights)
        (leftover / ".journal").write_text(f"{line}\n")
    async with asyncio.timeout(20):
        snapshot = await open_snapshots(store, cache).snapshot(model)
    assert {name: (snapshot.path / name).read_bytes() for name in CONTENTS} == CONTENTS


def test_coverage_knows_what_is_there_and_what_is_not() -> None:
    coverage = Coverage()
    for start, end in ((10, 20), (40, 50), (20, 30)):
        assert coverage.fits(start, end)
        coverage.add(start, end)
    for start, end in ((0, 11), (15, 16), (29, 41), (49, 60), (10, 20), (0, 100)):
        assert not coverage.fits(start, end)
    assert coverage.fits(30, 40)
    assert coverage.gaps(60) == [(0, 10), (30, 40), (50, 60)]
    assert Coverage().gaps(0) == [(0, 0)]


def test_a_late_stretch_is_written_nowhere(cache: Path, tmp_path: Path) -> None:
    """Its descriptor's number is soon another file's."""
    staging = Staging(cache / "m" / "r")
    staging.close()
    with (tmp_path / "another").open("w+b") as another:
        for _ in range(10):
            staging.note(Stretch("late", 0, 1, 1))
        assert another.read() == b""


@pytest.mark.parametrize("name", [".journal", MANIFEST])
async def test_garbage_of_great_depth_is_no_obstacle(source: Path, cache: Path, name: str) -> None:
    store = DirectoryStore(source)
    model = listed(store)
    for directory in (cache / "m" / f".incomplete-{model.revision}-x", cache / "m" / "another"):
        directory.mkdir(parents=True)
        (directory / name).write_text("[" * 100_000)
    snapshot = await open_snapshots(store, cache).snapshot(model)
    assert {each: (snapshot.path / each).read_bytes() for each in CONTENTS} == CONTENTS


async def test_a_snapshot_that_somebody_wrote_to_is_fetched_again(source: Path, cache: Path) -> None:
    store = DirectoryStore(source)
    snapshot = await open_snapshots(store, cache).snapshot(listed(store))
    weights = snapshot.path / "model.safetensors"
    weights.write_bytes(bytes(len(CONTENTS["model.safetensors"])))
    again = await open_snapshots(store, cache).snapshot(listed(store))
    assert (again.path / "model.safetensors").read_bytes() == CONTENTS["model.safetensors"]


async def test_a_cache_that_is_removed_meanwhile_is_made_anew(source: Path, cache: Path) -> None:
    store = DirectoryStore(source)
    snapshots = open_snapshots(store, cache)
    snapshots.release(await snapshots.snapshot(listed(store)))
    shutil.rmtree(cache)
    snapshot = await snapshots.snapshot(listed(store))
    assert {name: (snapshot.path / name).read_bytes() for name in CONTENTS} == CONTENTS
