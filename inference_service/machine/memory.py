"""The memory that is free on the device, measured now.

On CUDA through NVML (without a CUDA context); on the CPU what the system or the container has left, where
reclaimable page cache counts as free.
"""

from pathlib import Path

from inference_service.machine.device import Device, DeviceKind, visible_gpus

# Left to everything else on the machine.
SPARE_BYTES = 1 << 30
_CGROUP = Path("/sys/fs/cgroup")
# Of smaps_rollup: neither the launcher's pages, which a fork shares, nor those of files.
_TAKEN = "Private_Dirty:"


def free_bytes(device: Device) -> int | None:
    """Free bytes on the fullest device; None if unknown. Blocks for milliseconds."""
    return _free_on_gpus() if device.kind is DeviceKind.CUDA else free_host_bytes()


def free_host_bytes() -> int | None:
    """Free bytes of the machine's memory, up to the container's limit; None if unknown."""
    found = [free for free in (_available(), _left_in_cgroup(_CGROUP)) if free is not None]
    return min(found, default=None)


def used_bytes(device: Device, leader: int | None, free_before: int | None) -> int | None:
    """What the engine whose process group `leader` leads has taken since `free_before` was measured.

    On CUDA the difference, because NVML numbers processes as the host does, not as a container; it is right
    while nothing else starts or ends. On the CPU the memory that ends with the processes.
    """
    if device.kind is DeviceKind.CUDA:
        free = _free_on_gpus()
        return None if free is None or free_before is None else max(0, free_before - free)
    return None if leader is None else _used_by_group(leader)


def lacking_beside(leader: int | None) -> int:
    """Bytes that the machine lacks for another process group like that of `leader`; 0: none, or unknown."""
    free = free_host_bytes()
    taken = None if leader is None else _used_by_group(leader)
    return 0 if free is None else max(0, (taken or 0) + SPARE_BYTES - free)


def _used_by_group(leader: int) -> int | None:
    """Linux only."""
    total = 0
    for process in Path("/proc").glob("[0-9]*"):
        try:
            # The name may have spaces and parentheses: the numbers come after the last one.
            if int((process / "stat").read_text().rpartition(")")[2].split()[2]) != leader:
                continue
            lines = (process / "smaps_rollup").read_text().splitlines()
        except (OSError, ValueError, IndexError):
            continue  # it has ended
        total += sum(int(line.split()[1]) * 1024 for line in lines if line.startswith(_TAKEN))
    return total or None


def _free_on_gpus() -> int | None:
    import pynvml

    try:
        pynvml.nvmlInit()
        try:
            free = (int(pynvml.nvmlDeviceGetMemoryInfo(gpu).free) for gpu in visible_gpus(pynvml))
            return min(free, default=None)
        finally:
            pynvml.nvmlShutdown()
    except pynvml.NVMLError:
        return None


def _available() -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    found = [line.split()[1] for line in lines if line.startswith("MemAvailable:")]
    return int(found[0]) * 1024 if found else None


def _left_in_cgroup(cgroup: Path) -> int | None:
    """Up to the container's limit; page cache is reclaimed before any process is killed."""
    try:
        limit = (cgroup / "memory.max").read_text().strip()
        used = int((cgroup / "memory.current").read_text())
        stat = dict(line.split() for line in (cgroup / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return None
    if not limit.isdigit():
        return None
    files = int(stat.get("inactive_file", 0)) + int(stat.get("active_file", 0))
    return max(0, int(limit) - used + files)
