"""Checksums of files and tensors, taken in one pass by several threads."""

import json
import random
import threading
from pathlib import Path

import google_crc32c
import pytest

from inference_service.checkpoints.tensor_checksums import joined, parts
from inference_service.storage.snapshots import checksums

MIB = 1 << 20


def safetensors(tensors: dict[str, bytes]) -> bytes:
    """A file of these tensors, one after the other."""
    header, position = {}, 0
    for name, content in tensors.items():
        header[name] = {
            "dtype": "U8",
            "shape": [len(content)],
            "data_offsets": [position, position + len(content)],
        }
        position += len(content)
    encoded = json.dumps(header).encode()
    return len(encoded).to_bytes(8, "little") + encoded + b"".join(tensors.values())


def of(path: Path, content: bytes) -> checksums.FileChecksums:
    path.write_bytes(content)
    with path.open("rb") as file:
        return checksums.of_file(file.fileno(), path.name, len(content))


def expected(content: bytes) -> str:
    return joined(google_crc32c.value(content[start:end]) for start, end in parts(0, len(content)))


def test_two_checksums_are_combined_as_if_read_in_one() -> None:
    chance = random.Random(11)
    for _ in range(200):
        first, second = (chance.randbytes(chance.choice([0, 1, 3, 64, 70_000])) for _ in range(2))
        whole = checksums.combined(google_crc32c.value(first), google_crc32c.value(second), len(second))
        assert whole == google_crc32c.value(first + second)


@pytest.mark.parametrize(
    "sizes", [[0], [1, 0, 7], [4095, 4096, 4097, 1], [20 * MIB + 3, 5, 9 * MIB, 40 * MIB]]
)
def test_a_file_and_its_tensors(tmp_path: Path, sizes: list[int]) -> None:
    chance = random.Random(5)
    tensors = {f"layer.{number}.weight": chance.randbytes(size) for number, size in enumerate(sizes)}
    content = safetensors(tensors)
    found = of(tmp_path / "model.safetensors", content)
    assert found.crc32c == google_crc32c.value(content)
    assert found.tensors == {name: expected(each) for name, each in tensors.items()}
    assert of(tmp_path / "model.bin", content) == checksums.FileChecksums(found.crc32c)


def test_a_changed_byte_changes_its_own_tensor_only(tmp_path: Path) -> None:
    chance = random.Random(6)
    tensors = {name: chance.randbytes(size) for name, size in (("a", 10), ("b", 3 * MIB), ("c", 5000))}
    before = of(tmp_path / "model.safetensors", safetensors(tensors)).tensors
    for name, content in tensors.items():
        for position in (0, len(content) // 2, len(content) - 1):
            changed = bytearray(content)
            changed[position] ^= 1
            after = of(tmp_path / "model.safetensors", safetensors(tensors | {name: bytes(changed)})).tensors
            assert {each for each in tensors if before[each] != after[each]} == {name}


@pytest.mark.parametrize(
    "content", [b"", b"short", b"\xff" * 5000, (10).to_bytes(8, "little") + b"{no json}!" * 9]
)
def test_a_file_that_is_no_safetensors_has_no_tensors(tmp_path: Path, content: bytes) -> None:
    found = of(tmp_path / "model.safetensors", content)
    assert found == checksums.FileChecksums(google_crc32c.value(content))


def test_no_thread_reads_on_after_a_read_was_given_up(tmp_path: Path) -> None:
    path, reads, counting = tmp_path / "a", [0], threading.Lock()
    path.write_bytes(bytes(64 * MIB))

    def check() -> None:
        with counting:
            reads[0] += 1
            if reads[0] > 5:
                raise InterruptedError

    with path.open("rb") as file:
        with pytest.raises(InterruptedError):
            checksums.of_file(file.fileno(), path.name, 64 * MIB, check)
        seen = reads[0]
    assert seen < 30
    threading.Event().wait(0.1)
    assert reads[0] == seen
