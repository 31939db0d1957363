"""Free memory, measured."""

from pathlib import Path

import psutil

from inference_service.machine import memory
from inference_service.machine.device import find_device
from inference_service.machine.memory import free_bytes


def test_what_this_machine_has_free() -> None:
    found = free_bytes(find_device())
    assert found is not None
    assert 0 < found <= psutil.virtual_memory().total


def test_taken_memory_is_not_free() -> None:
    # Others on this machine take and free memory too.
    assert any(missing_while_held(512 << 20) > (512 << 20) / 4 for _ in range(3))


def missing_while_held(count: int) -> int:
    """By how much the free memory is less while so many bytes are held."""
    device = find_device()
    before = free_bytes(device)
    held = bytearray(b"x" * count)
    after = free_bytes(device)
    assert len(held) == count
    assert before is not None
    assert after is not None
    return before - after


def test_a_containers_limit_counts_and_its_files_do_not(tmp_path: Path) -> None:
    (tmp_path / "memory.max").write_text("1000\n")
    (tmp_path / "memory.current").write_text("900\n")
    (tmp_path / "memory.stat").write_text("anon 500\ninactive_file 250\nactive_file 50\n")
    assert memory._left_in_cgroup(tmp_path) == 400


def test_a_container_without_a_limit(tmp_path: Path) -> None:
    assert memory._left_in_cgroup(tmp_path) is None
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text("900\n")
    (tmp_path / "memory.stat").write_text("anon 500\n")
    assert memory._left_in_cgroup(tmp_path) is None
