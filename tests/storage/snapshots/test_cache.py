"""The disk: its quota, what gives way, and what a full one does."""

import os
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from inference_service.config import Settings
from inference_service.errors import DiskFull
from inference_service.machine.device import memory_bytes
from inference_service.storage.bucket.directory import DirectoryStore
from inference_service.storage.bucket.model import ListedModel, models_in
from inference_service.storage.bucket.store import Bytes, StoredObject
from inference_service.storage.snapshots import cache as disk_cache
from inference_service.storage.snapshots.cache import Disk, default_quota, open_cache
from inference_service.storage.snapshots.layout import MANIFEST, PROMISE, ROOM_LOCK, Layout
from inference_service.storage.snapshots.locks import revision_lock
from inference_service.storage.snapshots.snapshots import SnapshotStore
from tests.fixtures.caches import CountingStore, open_snapshots

MIB = 1 << 20
DISK_MIB = 64


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return tmp_path / "source"


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 MiB."""
    mount = tmp_path / "disk"
    mount.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={DISK_MIB}m", "tmpfs", str(mount)]
    mounted = subprocess.run(command, capture_output=True, check=False)
    if mounted.returncode:
        pytest.skip(f"no right to mount a file system: {mounted.stderr.decode().strip()}")
    try:
        yield mount
    finally:
        subprocess.run(["umount", "-l", str(mount)], check=True)


def put(source: Path, name: str, size: int) -> None:
    directory = source / "models" / name
    directory.mkdir(parents=True)
    (directory / "config.json").write_bytes(b"{}")
    (directory / "model.safetensors").write_bytes(os.urandom(size))


def listed(source: Path, name: str) -> ListedModel:
    return models_in(DirectoryStore(source).list("models/"), "models/")[name]


def kept(cache: Path) -> list[str]:
    """Models of which a snapshot lies in the cache."""
    return sorted(path.parent.parent.name for path in cache.rglob(MANIFEST))


async def test_the_least_recently_used_snapshot_gives_way(source: Path, cache: Path) -> None:
    for name in "abc":
        put(source, name, MIB)
    snapshots = open_snapshots(DirectoryStore(source), cache, quota=5 * MIB // 2)
    for number, name in enumerate("ab"):
        snapshot = await snapshots.snapshot(listed(source, name))
        snapshots.release(snapshot)
        os.utime(snapshot.path / MANIFEST, (number, number))
    snapshots.release(await snapshots.snapshot(listed(source, "a")))
    await snapshots.snapshot(listed(source, "c"))
    assert kept(cache) == ["a", "c"], "b was used before a"


async def test_a_snapshot_that_an_engine_uses_never_gives_way(source: Path, cache: Path) -> None:
    for name in "ab":
        put(source, name, MIB)
    snapshots = open_snapshots(DirectoryStore(source), cache, quota=3 * MIB // 2)
    held = await snapshots.snapshot(listed(source, "a"))
    with pytest.raises(DiskFull, match=r"'b' needs 1\.0 MiB .* models that are loaded \(a\)") as caught:
        await snapshots.snapshot(listed(source, "b"))
    assert caught.value.status == 507
    assert caught.value.headers() == {"x-should-retry": "false"}, "nothing is to end that would make space"
    assert (
        "To serve it, point LOCAL_MODEL_CACHE at a larger disk, or set DISK_CACHE_GIB" in caught.value.message
    )
    chosen = SnapshotStore(
        DirectoryStore(source), Layout(cache), Disk(Layout(cache), 3 * MIB // 2, chosen=True)
    )
    with pytest.raises(DiskFull, match=r"To serve it, raise or unset DISK_CACHE_GIB \(now 0\.001465\)\."):
        await chosen.snapshot(listed(source, "b"))
    snapshots.release(held)
    await snapshots.snapshot(listed(source, "b"))
    assert kept(cache) == ["b"]


async def test_another_process_engine_keeps_its_snapshot_too(source: Path, cache: Path) -> None:
    for name in "ab":
        put(source, name, MIB)
    other = open_snapshots(DirectoryStore(source), cache, quota=3 * MIB // 2)
    await other.snapshot(listed(source, "a"))
    snapshots = open_snapshots(DirectoryStore(source), cache, quota=3 * MIB // 2)
    with pytest.raises(DiskFull):
        await snapshots.snapshot(listed(source, "b"))
    assert kept(cache) == ["a"]


async def test_two_fetches_do_not_promise_the_same_room(source: Path, cache: Path) -> None:
    put(source, "a", MIB)
    snapshots = open_snapshots(DirectoryStore(source), cache, quota=3 * MIB // 2)
    target, staging = cache / "other" / "x", cache / "other" / ".incomplete-x-1"
    staging.mkdir(parents=True)
    promised = snapshots._disk.reserved("other", target, staging, MIB)
    with revision_lock(target, lambda: False), promised, pytest.raises(DiskFull) as caught:
        await snapshots.snapshot(listed(source, "a"))
    assert "Try again in 5 s" in caught.value.message
    assert caught.value.headers() == {"retry-after": "5"}
    await snapshots.snapshot(listed(source, "a"))


async def test_the_promises_of_another_process_count(source: Path, cache: Path) -> None:
    put(source, "a", MIB)
    snapshots = open_snapshots(DirectoryStore(source), cache, quota=3 * MIB // 2)
    target, staging = cache / "other" / "x", cache / "other" / ".incomplete-x-1"
    staging.mkdir(parents=True)
    (staging / PROMISE).write_text(f"{MIB} 0")
    with revision_lock(target, lambda: False), pytest.raises(DiskFull):
        await snapshots.snapshot(listed(source, "a"))
    await snapshots.snapshot(listed(source, "a"))
    assert not staging.exists(), "once nobody fetches it, its promise is void"


async def test_a_model_that_cannot_have_its_room_costs_nobody_theirs(source: Path, cache: Path) -> None:
    put(source, "a", MIB)
    put(source, "huge", 100 * MIB)
    snapshots = open_snapshots(DirectoryStore(source), cache, quota=10 * MIB)
    snapshots.release(await snapshots.snapshot(listed(source, "a")))
    with pytest.raises(DiskFull, match=r"needs 100\.0 MiB"):
        await snapshots.snapshot(listed(source, "huge"))
    assert kept(cache) == ["a"]


async def test_what_a_broken_fetch_left_of_the_revision_is_no_obstacle(source: Path, cache: Path) -> None:
    put(source, "a", 6 * MIB)
    model = listed(source, "a")
    leftover = cache / "a" / f".incomplete-{model.revision}-xyz"
    leftover.mkdir(parents=True)
    (leftover / "model.safetensors").write_bytes(bytes(5 * MIB))
    (leftover / PROMISE).write_text(f"{6 * MIB} 0")
    await open_snapshots(DirectoryStore(source), cache, quota=10 * MIB).snapshot(model)
    assert kept(cache) == ["a"]


async def test_a_new_revision_under_pressure_still_takes_only_what_changed(source: Path, cache: Path) -> None:
    """Its own staging directory is no victim, nor is what is linked in it counted twice."""
    put(source, "a", 4 * MIB)
    put(source, "old", MIB)
    store = CountingStore(source)
    snapshots = open_snapshots(store, cache, quota=11 * MIB // 2)
    for name in ("old", "a"):
        snapshots.release(await snapshots.snapshot(listed(source, name)))
    (source / "models" / "a" / "tokenizer.json").write_bytes(bytes(MIB))
    store.bytes_read = 0
    await snapshots.snapshot(listed(source, "a"))
    # A connection that is slow for a moment hands its stretch over, and some of it comes twice.
    assert MIB <= store.bytes_read < 2 * MIB
    assert kept(cache) == ["a", "a"], "the other one gave way"


async def test_what_is_held_and_replaced_is_held_on(source: Path, cache: Path) -> None:
    """A file of a snapshot in use was cut: the new snapshot in its place is protected as the old was."""
    put(source, "a", MIB)
    snapshots = open_snapshots(DirectoryStore(source), cache)
    held = await snapshots.snapshot(listed(source, "a"))
    (held.path / "config.json").write_bytes(b"")
    again = await snapshots.snapshot(listed(source, "a"))
    assert (again.path / "config.json").read_bytes() == b"{}"
    snapshots.release(held)
    other = open_snapshots(DirectoryStore(source), cache, quota=MIB)
    put(source, "b", MIB // 2)
    with pytest.raises(DiskFull):
        await other.snapshot(listed(source, "b"))
    assert kept(cache) == ["a"]


async def test_what_a_killed_fetch_left_gives_way_first(source: Path, cache: Path) -> None:
    for name in "ab":
        put(source, name, MIB)
    snapshots = open_snapshots(DirectoryStore(source), cache, quota=7 * MIB // 2)
    snapshots.release(await snapshots.snapshot(listed(source, "a")))
    leftover = cache / "gone" / ".incomplete-123456-xyz"
    leftover.mkdir(parents=True)
    (leftover / "model.safetensors").write_bytes(bytes(2 * MIB))
    snapshots.release(await snapshots.snapshot(listed(source, "b")))
    assert not leftover.exists()
    assert kept(cache) == ["a", "b"]


@pytest.mark.parametrize(
    ("settings", "is_memory", "said", "unsaid"),
    [
        ({"disk_cache_gib": 0.001}, False, ["raise or unset DISK_CACHE_GIB (now 0.001)"], ["LOCAL_MODEL"]),
        ({"disk_cache_gib": 0.001}, True, ["raise or unset DISK_CACHE_GIB (now 0.001)"], ["LOCAL_MODEL"]),
        (
            {},
            True,
            ["LOCAL_MODEL_CACHE at a disk", "ephemeral disk", "more memory"],
            ["larger", "DISK_CACHE"],
        ),
        ({}, False, ["LOCAL_MODEL_CACHE at a larger disk"], ["memory", "DISK_CACHE_GIB"]),
        (
            {"disk_cache_gib": 1_000_000},
            False,
            ["raise or unset DISK_CACHE_GIB (now 1e+06) and point LOCAL_MODEL_CACHE at a larger disk"],
            ["memory"],
        ),
    ],
)
def test_a_refusal_names_the_settings_that_would_help(
    cache: Path,
    monkeypatch: pytest.MonkeyPatch,
    settings: dict[str, Any],
    is_memory: bool,
    said: list[str],
    unsaid: list[str],
) -> None:
    monkeypatch.setattr(disk_cache, "_is_memory", lambda directory: is_memory)
    chosen = Settings(local_model_cache=cache, **settings)
    _, disk = open_cache(chosen.local_model_cache, chosen.disk_cache_gib)
    disk.check_fits("small", 1000)
    # More than any file system here, or than the small quota.
    too_much = 2 * MIB if settings.get("disk_cache_gib") == 0.001 else 900_000 << 30
    with pytest.raises(DiskFull, match=r"'large' needs .* which can hold .* at most\. To serve") as caught:
        disk.check_fits("large", too_much)
    for words in said:
        assert words in caught.value.message
    _, _, advice = caught.value.message.partition("To serve it")
    for words in unsaid:
        assert words not in advice


async def test_a_model_larger_than_the_disk_is_refused_before_a_byte(source: Path, small_disk: Path) -> None:
    put(source, "big", 80 * MIB)
    with pytest.raises(DiskFull, match=r"needs 80\.0 MiB .* the file system has 64\.0 MiB left"):
        await open_snapshots(DirectoryStore(source), small_disk).snapshot(listed(source, "big"))
    assert [path.name for path in small_disk.rglob("*") if path.is_file()] == [ROOM_LOCK]


async def test_models_take_turns_on_a_small_disk(source: Path, small_disk: Path) -> None:
    for name in "ab":
        put(source, name, 40 * MIB)
    snapshots = open_snapshots(DirectoryStore(source), small_disk)
    for name in "abab":
        snapshot = await snapshots.snapshot(listed(source, name))
        assert (snapshot.path / "model.safetensors").read_bytes() == (
            source / "models" / name / "model.safetensors"
        ).read_bytes()
        snapshots.release(snapshot)
        assert kept(small_disk) == [name]


async def test_a_disk_that_fills_up_meanwhile(source: Path, small_disk: Path) -> None:
    """Somebody else writes: what was promised is not there any more."""
    put(source, "a", 40 * MIB)
    store = Filling(source, small_disk / "somebody-elses")
    with pytest.raises(DiskFull, match="No space left on device") as caught:
        await open_snapshots(store, small_disk).snapshot(listed(source, "a"))
    assert caught.value.headers()["x-should-retry"] == "false"
    assert kept(small_disk) == []
    assert list(small_disk.rglob(".incomplete-*")) == [], "what was half-written is gone"
    (small_disk / "somebody-elses").unlink()
    await open_snapshots(DirectoryStore(source), small_disk).snapshot(listed(source, "a"))
    assert kept(small_disk) == ["a"]


def test_the_default_quota(tmp_path: Path, small_disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    status = os.statvfs(tmp_path)
    assert default_quota(tmp_path) == int(0.9 * status.f_blocks * status.f_frsize)
    assert default_quota(small_disk) == DISK_MIB * MIB // 2
    monkeypatch.setenv("K_SERVICE", "service")
    monkeypatch.setattr(
        "inference_service.storage.snapshots.cache._mount", lambda directory: ("overlay", Path("/"))
    )
    assert default_quota(tmp_path) == memory_bytes() // 2, "on Cloud Run files are memory"


def test_the_quota_is_a_setting(tmp_path: Path) -> None:
    _, disk = open_cache(tmp_path / "a" / "b", 1.5)
    assert disk.quota == 3 << 29


class Filling(DirectoryStore):
    """While it is read, another program writes the disk full."""

    def __init__(self, root: Path, other: Path) -> None:
        super().__init__(root)
        self._other = other
        self._writing = threading.Lock()
        self._written = False

    def read(self, stored: StoredObject, start: int = 0, end: int | None = None) -> Bytes:
        with self._writing:
            if not self._written:
                self._written = True
                self._other.write_bytes(bytes(40 * MIB))
        yield from super().read(stored, start, end)
