"""What the service's own process holds at this moment: its operator sees here what does not come back."""

import asyncio
import resource
from pathlib import Path

_SELF = Path("/proc/self")


def process_stats() -> dict[str, int | None]:
    """Memory, descriptors, the kernel's threads, the event loop's tasks; None where it cannot be told."""
    open_files = _entries("fd")
    return {
        "resident_bytes": _resident_bytes(),
        # The look itself takes a descriptor.
        "open_files": None if open_files is None else open_files - 1,
        "threads": _entries("task"),
        "tasks": len(asyncio.all_tasks()),
    }


def _entries(name: str) -> int | None:
    try:
        return sum(1 for _ in (_SELF / name).iterdir())
    except OSError:
        return None


def _resident_bytes() -> int | None:
    try:
        pages = int((_SELF / "statm").read_text().split()[1])
    except (OSError, IndexError, ValueError):
        return None
    return pages * resource.getpagesize()
