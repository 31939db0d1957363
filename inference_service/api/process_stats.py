"""Resources of the service's own process, to show leaks."""

import asyncio
import resource
from pathlib import Path

_SELF = Path("/proc/self")
POLL_INTERVAL = 0.05


class LoopLag:
    """How late the event loop runs; whatever blocks it delays every stream."""

    def __init__(self) -> None:
        self._worst = 0.0

    async def watch(self) -> None:
        """Until cancelled."""
        loop = asyncio.get_running_loop()
        while True:
            due = loop.time() + POLL_INTERVAL
            await asyncio.sleep(POLL_INTERVAL)
            self._worst = max(self._worst, loop.time() - due)

    def take(self) -> float:
        """The longest wait since the last call, in seconds."""
        worst, self._worst = self._worst, 0.0
        return round(worst, 4)


def process_stats() -> dict[str, int | float | None]:
    """Memory, descriptors, the kernel's threads, the event loop's tasks; None if unknown."""
    open_files = _entries("fd")
    return {
        "resident_bytes": _resident_bytes(),
        # Listing them takes a descriptor itself.
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
