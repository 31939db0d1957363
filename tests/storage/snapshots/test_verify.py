"""Snapshots on the disk that somebody has damaged, and the weights that stay in memory."""

import errno
import os
import resource
from pathlib import Path

import google_crc32c
import pytest

from inference_service.checkpoints.snapshot import Snapshot
from inference_service.checkpoints.tensor_checksums import TENSOR_CHECKSUMS, parse
from inference_service.errors import SnapshotCorrupt
from inference_service.storage.snapshots import verify
from inference_service.storage.snapshots.layout import FileRecord, Manifest
from inference_service.storage.snapshots.page_lock import PageLock
from inference_service.storage.snapshots.verify import Verifier
from tests.storage.snapshots.test_checksums import safetensors

MIB = 1 << 20


def snapshot(room: Path, name: str = "m", size: int = 3 * MIB) -> Snapshot:
    directory = room / name / "r1"
    directory.mkdir(parents=True)
    contents = {"model.safetensors": os.urandom(size), "config.json": b"{}"}
    for file, content in contents.items():
        (directory / file).write_bytes(content)
    records = {
        file: FileRecord(f"models/{name}/{file}", "1", len(content), google_crc32c.value(content), 0)
        for file, content in contents.items()
    }
    Manifest(records).write(directory)
    return Snapshot(name, "r1", directory, size)


async def test_a_flipped_bit_is_found_although_size_and_time_are_as_they_were(tmp_path: Path) -> None:
    kept = snapshot(tmp_path)
    file = kept.path / "model.safetensors"
    before = file.stat()
    content = bytearray(file.read_bytes())
    content[MIB] ^= 1
    file.write_bytes(content)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(SnapshotCorrupt, match=r"model.safetensors is damaged"):
        await Verifier(PageLock(0)).verify(kept)


async def test_what_was_verified_is_not_read_again_until_it_is_touched(tmp_path: Path) -> None:
    kept, verifier = snapshot(tmp_path), Verifier(PageLock(0))
    await verifier.verify(kept)
    file = kept.path / "model.safetensors"
    before = file.stat()
    with file.open("r+b") as opened:
        opened.write(b"damaged")
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    await verifier.verify(kept)  # as far as anyone can tell the file is the same
    os.utime(file)
    with pytest.raises(SnapshotCorrupt):
        await verifier.verify(kept)


async def test_what_has_just_arrived_was_verified_on_its_way(tmp_path: Path) -> None:
    kept = snapshot(tmp_path)
    (kept.path / "model.safetensors").write_bytes(b"x" * 3 * MIB)
    await Verifier(PageLock(0)).verify(kept, arrived_now=True)


@pytest.fixture
def lockable() -> None:
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if 0 <= soft < 16 * MIB and os.geteuid() != 0:
        pytest.skip("this user may lock no memory")


def test_the_weights_used_last_are_locked_within_the_quota(tmp_path: Path, lockable: None) -> None:
    cache = PageLock(7 * MIB)
    kept = [snapshot(tmp_path, name) for name in ("a", "b", "c")]
    for each in (kept[0], kept[1], kept[0], kept[2]):
        cache.keep(each.path, ["model.safetensors"])
    assert cache.bytes == 6 * MIB
    assert locked_mib() >= 6
    cache.forget(kept[0].path)
    cache.forget(kept[2].path)
    assert cache.bytes == 0
    cache.keep(snapshot(tmp_path, "large", 9 * MIB).path, ["model.safetensors"])
    assert cache.bytes == 0, "larger than the whole quota"


def test_a_snapshot_that_has_left_the_disk_is_let_go(tmp_path: Path, lockable: None) -> None:
    cache = PageLock(7 * MIB)
    gone, kept = snapshot(tmp_path, "gone"), snapshot(tmp_path, "kept")
    cache.keep(gone.path, ["model.safetensors"])
    gone.path.rename(tmp_path / "evicted")
    cache.keep(kept.path, ["model.safetensors"])
    assert cache.bytes == 3 * MIB


def locked_mib() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmLck")) // 1024


async def test_the_checksums_of_tensors_are_written_again_where_they_are_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = snapshot(tmp_path)
    weights = safetensors({"a": os.urandom(10), "b": os.urandom(9000)})
    (kept.path / "model.safetensors").write_bytes(weights)
    record = FileRecord("models/m/model.safetensors", "1", len(weights), google_crc32c.value(weights), 0)
    Manifest({"model.safetensors": record}).write(kept.path)
    found = kept.path / TENSOR_CHECKSUMS
    written = []
    for content in (None, b"no json", b'{"model.safetensors": {"a": "0"}}'):
        if content is not None:
            found.write_bytes(content)
        await Verifier(PageLock(0)).verify(kept)
        written.append(parse(found.read_bytes()))
    assert written[0]["model.safetensors"].keys() == {"a", "b"}
    assert written[1] == written[2] == written[0]
    found.unlink()
    found.mkdir()
    await Verifier(PageLock(0)).verify(kept)  # it serves without them
    found.rmdir()

    def full(path: Path, content: bytes) -> None:
        path.write_bytes(content[:1])
        raise OSError(errno.ENOSPC, "no space left on device")

    monkeypatch.setattr(verify, "write_durably", full)
    await Verifier(PageLock(0)).verify(kept)
    assert not list(kept.path.glob(f"{TENSOR_CHECKSUMS}*"))
