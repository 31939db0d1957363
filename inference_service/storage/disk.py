"""The room in LOCAL_MODEL_CACHE: the quota, what is promised to fetches, and what must stay or may go.

A snapshot that is held (an engine uses it) is never evicted, neither by this process nor by another that
shares the directory: a holder keeps a shared lock on the manifest, which ends with the process.
"""

import fcntl
import logging
import os
import shutil
import threading
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from inference_service.config import Settings
from inference_service.engines.device import memory_bytes
from inference_service.errors import DiskFull
from inference_service.storage.layout import (
    EVICTED,
    INCOMPLETE,
    MANIFEST,
    Layout,
    allocated_bytes,
    lock_of,
    revision_of,
)

logger = logging.getLogger(__name__)

_GIB = 1 << 30
SHARE_OF_DISK = 0.9
SHARE_OF_MEMORY = 0.5
_MEMORY_FILE_SYSTEMS = frozenset({"tmpfs", "ramfs"})


class Disk:
    """The cache directory with its quota in bytes."""

    def __init__(self, layout: Layout, quota: int) -> None:
        self.quota = quota
        self._layout = layout
        # Held while snapshots are removed, which takes its time.
        self._room = threading.RLock()
        self._promised: dict[Path, int] = {}
        # Held for a moment only: the event loop takes it.
        self._use = threading.Lock()
        self._held: dict[Path, int] = {}
        self._holders: Counter[Path] = Counter()
        self._leaving: set[Path] = set()

    @contextmanager
    def reserved(self, model: str, staging: Path, count: int) -> Iterator[None]:
        """Room for `count` bytes in `staging`, made by eviction if need be; raises DiskFull."""
        with self._room:
            self._make_room(model, count)
            self._promised[staging] = count
        try:
            yield
        finally:
            with self._room:
                del self._promised[staging]

    def hold(self, snapshot: Path) -> bool:
        """Keep the snapshot from being evicted, and count it as used now; False if it is gone."""
        with self._use:
            if snapshot in self._leaving:
                return False
            if snapshot not in self._held:
                descriptor = _shared_lock(snapshot / MANIFEST)
                if descriptor is None:
                    return False
                self._held[snapshot] = descriptor
            self._holders[snapshot] += 1
        with suppress(OSError):
            os.utime(snapshot / MANIFEST)
        return True

    def release(self, snapshot: Path) -> None:
        """Give one `hold` back."""
        with self._use:
            self._holders[snapshot] -= 1
            if self._holders[snapshot] == 0:
                del self._holders[snapshot]
                os.close(self._held.pop(snapshot))

    def clear(self, leftovers: Iterable[Path]) -> None:
        """Remove what nobody fetches any more of these staging directories."""
        with self._room:
            for leftover in leftovers:
                if leftover not in self._promised:
                    _evict(leftover, self._layout.root)

    def used(self) -> int:
        """Bytes on the disk or promised."""
        with self._room:
            arrived = sum(allocated_bytes(staging, linked=False) for staging in self._promised)
            return allocated_bytes(self._layout.root) - arrived + sum(self._promised.values())

    def free(self) -> int:
        """Bytes that neither the quota nor the file system withholds and nobody was promised."""
        status = os.statvfs(self._layout.root)
        outstanding = sum(
            max(0, count - allocated_bytes(staging, linked=False))
            for staging, count in self._promised.items()
        )
        return min(self.quota - self.used(), status.f_bavail * status.f_frsize - outstanding)

    def most(self) -> int:
        """Bytes that a single snapshot can have, were everything else gone."""
        status = os.statvfs(self._layout.root)
        available = status.f_bavail * status.f_frsize + allocated_bytes(self._layout.root)
        return min(self.quota, available)

    def _make_room(self, model: str, count: int) -> None:
        victims = self._victims()
        while count > self.free():
            victim = next(victims, None)
            if victim is None:
                raise self._full(model, count)
            if self._let_go(victim):
                logger.info("evicted from the disk", extra={"snapshot": str(victim)})

    def _let_go(self, victim: Path) -> bool:
        """Evict, unless it has come to be held meanwhile."""
        with self._use:
            if victim in self._held:
                return False
            self._leaving.add(victim)
        try:
            return _evict(victim, self._layout.root)
        finally:
            with self._use:
                self._leaving.discard(victim)

    def _victims(self) -> Iterator[Path]:
        """What nobody needs, least needed first: leftovers, then snapshots by their last use."""
        for leftover in self._layout.leftovers():
            if leftover not in self._promised:
                yield leftover
        yield from sorted(self._layout.snapshots(), key=_last_used)

    def _full(self, model: str, count: int) -> DiskFull:
        status = os.statvfs(self._layout.root)
        held = ", ".join(sorted({path.parent.name for path in self._held})) or "none"
        return DiskFull(
            f"The model '{model}' needs {_gib(count)} in LOCAL_MODEL_CACHE ({self._layout.root}), and "
            f"{_gib(max(0, self.free()))} can be had: the quota is {_gib(self.quota)} (DISK_CACHE_GIB), "
            f"{_gib(self.used())} of it is taken by models in use ({held}) and by fetches under way, and "
            f"the file system has {_gib(status.f_bavail * status.f_frsize)} left."
        )


def open_cache(settings: Settings) -> tuple[Layout, Disk]:
    """LOCAL_MODEL_CACHE, made if need be, with its quota; raises OSError."""
    root = settings.local_model_cache.absolute()
    root.mkdir(parents=True, exist_ok=True)
    layout = Layout(root)
    quota = default_quota(root) if settings.disk_cache_gib is None else int(settings.disk_cache_gib * _GIB)
    return layout, Disk(layout, quota)


def default_quota(directory: Path) -> int:
    """90 % of the file system; half of the memory where files are memory. Bytes."""
    status = os.statvfs(directory)
    if _is_memory(directory):
        return int(SHARE_OF_MEMORY * min(memory_bytes(), status.f_blocks * status.f_frsize))
    return int(SHARE_OF_DISK * status.f_blocks * status.f_frsize)


def _is_memory(directory: Path) -> bool:
    kind, mount = _mount(directory)
    # Cloud Run's own file system is memory whatever it calls itself; a mounted volume is not.
    return kind in _MEMORY_FILE_SYSTEMS or ("K_SERVICE" in os.environ and mount == Path("/"))


def _mount(directory: Path) -> tuple[str, Path]:
    """Type and mount point of the file system that holds `directory`."""
    kind, mount = "", Path("/")
    with suppress(OSError):
        for line in Path("/proc/self/mountinfo").read_text().splitlines():
            before, _, after = line.partition(" - ")
            point = Path(before.split(" ")[4].replace("\\040", " "))
            if directory.resolve().is_relative_to(point) and len(point.parts) >= len(mount.parts):
                kind, mount = after.split(" ")[0], point
    return kind, mount


def _shared_lock(manifest: Path) -> int | None:
    try:
        descriptor = os.open(manifest, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:  # it is being evicted
        os.close(descriptor)
        return None
    except OSError:
        pass  # no locks on this file system: this process still knows its own holds
    if not manifest.exists():
        os.close(descriptor)
        return None
    return descriptor


def _evict(victim: Path, root: Path) -> bool:
    """Remove a snapshot or a leftover; False where another process needs it."""
    lock = victim / MANIFEST
    if victim.name.startswith(INCOMPLETE):
        lock = lock_of(victim.parent / revision_of(victim))
    with _exclusive_lock(lock) as ours:
        if not ours:
            return False
        # Renamed first: no moment in which a half-removed directory still has its manifest.
        gone = victim if victim.name.startswith(EVICTED) else root / f"{EVICTED}{os.urandom(6).hex()}"
        try:
            victim.rename(gone)
        except OSError:
            return False
        shutil.rmtree(gone, ignore_errors=True)
    return True


@contextmanager
def _exclusive_lock(path: Path) -> Iterator[bool]:
    """Whether nobody else holds the lock; a file that is not there, or cannot be locked, nobody holds."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        yield True
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        yield False
    except OSError:
        yield True
    else:
        yield True
    finally:
        os.close(descriptor)


def _last_used(snapshot: Path) -> float:
    try:
        return (snapshot / MANIFEST).stat().st_mtime
    except OSError:
        return 0.0


def _gib(count: int) -> str:
    return f"{count / _GIB:.2f} GiB"
