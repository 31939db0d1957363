"""Free memory, measured."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from inference_service.machine import memory
from inference_service.machine.device import Device, DeviceKind, find_device
from inference_service.machine.memory import SPARE_BYTES, free_bytes, lacking_beside, used_bytes


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


def test_what_a_group_of_processes_has_taken() -> None:
    """Its leader's memory and its child's, however the program is named."""
    hold = "import sys; held = b'x' * (64 << 20); sys.stdout.write('.'); sys.stdout.flush(); sys.stdin.read()"
    child = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {hold!r}])"
    group = subprocess.Popen(
        [sys.executable, "-c", child], stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True
    )
    try:
        assert group.stdout is not None
        assert group.stdout.read(1) == b"."
        found = used_bytes(Device(DeviceKind.CPU, "any"), group.pid, None)
        assert found is not None
        assert 64 << 20 < found < 200 << 20
    finally:
        os.killpg(group.pid, signal.SIGKILL)
        group.communicate()
    assert used_bytes(Device(DeviceKind.CPU, "any"), group.pid, None) is None
    assert used_bytes(Device(DeviceKind.CPU, "any"), None, None) is None


def test_another_like_this_one_fits_or_lacks_what_it_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_used_by_group", {1: 1000}.get)
    for free, leader, lacking in (
        (None, 1, 0),
        (SPARE_BYTES + 1000, 1, 0),
        (SPARE_BYTES + 999, 1, 1),
        (SPARE_BYTES, None, 0),
        (SPARE_BYTES - 1, 2, 1),
    ):
        monkeypatch.setattr(memory, "free_host_bytes", lambda free=free: free)
        assert lacking_beside(leader) == lacking, (free, leader)
