"""The weight check's judgement, and the fingerprints that are kept beside snapshots."""

from pathlib import Path

import pytest

from inference_service.checkpoints.snapshot import Snapshot
from inference_service.engines.base import Fingerprint
from inference_service.pool.weight_check import FILE, WeightChecks, alike, implausible
from inference_service.storage.snapshots.layout import FileRecord, Manifest

ONE = Fingerprint(((3, -0.1), (5, -2.0), (7, -3.0), (9, -4.0)))
OTHER = Fingerprint(((4, -0.1), (6, -2.0), (8, -3.0), (9, -4.0)))
ROUNDED = Fingerprint(((3, -0.1001), (5, -2.0002), (7, -3.0), (11, -4.0)))
SHIFTED = Fingerprint(((3, -0.4), (5, -2.0), (7, -3.0), (9, -4.0)))


@pytest.mark.parametrize(
    ("found", "first", "before", "same", "plausible"),
    [
        (ONE, None, OTHER, False, True),
        (ONE, ONE, OTHER, False, True),
        (ROUNDED, ONE, OTHER, False, True),
        (ONE, None, ONE, False, False),
        (ONE, None, ONE, True, True),
        (ONE, OTHER, None, False, False),
        (SHIFTED, ONE, OTHER, False, False),
        (Fingerprint(()), None, None, False, False),
    ],
)
def test_plausible(
    found: Fingerprint, first: Fingerprint | None, before: Fingerprint | None, same: bool, plausible: bool
) -> None:
    assert (implausible(found, first, before, same_weights=same) is None) == plausible


def test_alike_is_the_same_both_ways() -> None:
    for one in (ONE, OTHER, ROUNDED, SHIFTED):
        for other in (ONE, OTHER, ROUNDED, SHIFTED):
            assert alike(one, other) == alike(other, one)


def snapshot(room: Path, name: str, crc32c: int) -> Snapshot:
    directory = room / name
    directory.mkdir()
    Manifest({"model.safetensors": FileRecord("x", "1", 1, crc32c, 0)}).write(directory)
    return Snapshot(name, "r1", directory, 1)


async def test_fingerprints_are_kept_for_each_way_to_compute(tmp_path: Path) -> None:
    a, b = snapshot(tmp_path, "a", 1), snapshot(tmp_path, "b", 1)
    weight_checks, elsewhere = WeightChecks("cpu"), WeightChecks("gpu")
    assert await weight_checks.of_load(a, ONE) is None
    assert await elsewhere.of_load(a, OTHER) is None
    assert await weight_checks.of_swap(b, a) == (ONE, True)
    assert await elsewhere.of_swap(None, a) == (OTHER, False)
    assert await weight_checks.of_swap(snapshot(tmp_path, "c", 2), a) == (ONE, False)


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b'{"cpu": 3}', b'{"cpu": [[1]]}', b"\xff\xfe"])
async def test_a_damaged_file_is_no_fingerprint(tmp_path: Path, content: bytes) -> None:
    kept = snapshot(tmp_path, "a", 1)
    (kept.path / FILE).write_bytes(content)
    assert await WeightChecks("cpu").of_swap(None, kept) == (None, False)
    assert await WeightChecks("cpu").of_load(kept, ONE) is None
    assert await WeightChecks("cpu").of_swap(None, kept) == (ONE, False)


async def test_a_directory_that_cannot_be_written_fails_nothing(tmp_path: Path) -> None:
    assert await WeightChecks("cpu").of_load(Snapshot("a", "r1", tmp_path / "gone", 1), ONE) is None
