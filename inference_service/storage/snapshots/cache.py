"""Disk space in LOCAL_MODEL_CACHE: the quota, reservations of fetches, and eviction.

A held snapshot (an engine uses it) is never evicted, neither by this process nor by others that share the
directory: the holder keeps a shared lock on the manifest, which is released when the process ends.
"""

import logging
import os
import shutil
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from inference_service.errors import CacheError, DiskFull, readable_bytes
from inference_service.machine.device import memory_bytes
from inference_service.storage.snapshots import locks
from inference_service.storage.snapshots.layout import (
    EVICTED,
    INCOMPLETE,
    MANIFEST,
    PROMISE,
    ROOM_LOCK,
    Layout,
    allocated_bytes,
    last_used,
    lock_of,
    revision_of,
    stagings,
    sync_directory,
)

logger = logging.getLogger(__name__)

_GIB = 1 << 30
# After which a request is to try again if a fetch in progress has taken the space.
RETRY_SECONDS = 5
SHARE_OF_DISK = 0.9
SHARE_OF_MEMORY = 0.5
_MEMORY_FILE_SYSTEMS = frozenset({"tmpfs", "ramfs"})


class Disk:
    """The cache directory and its quota in bytes, which all processes that share it use together.

    `chosen`: the quota is set by DISK_CACHE_GIB and not the default. `in_memory`: its files are memory.
    """

    def __init__(self, layout: Layout, quota: int, *, chosen: bool = False) -> None:
        self.quota = quota
        self.in_memory = _is_memory(layout.root)
        self._chosen = chosen
        self._layout = layout
        # Held while snapshots are removed, which can be slow.
        self._room = threading.RLock()
        # Held only briefly: the event loop takes it.
        self._use = threading.Lock()
        self._held: dict[Path, int] = {}
        self._holders: Counter[Path] = Counter()
        self._leaving: set[Path] = set()
        # Called for every snapshot that is removed from the disk.
        self.evicted: Callable[[Path], None] = lambda snapshot: None

    @contextmanager
    def reserved(self, model: str, target: Path, staging: Path, count: int) -> Iterator[None]:
        """Reserve `count` bytes for `staging`, evicting if necessary; raises DiskFull and OSError.

        The caller holds the lock to fetch `target`. The reservation ends when its file is removed.
        """
        with self._room, locks.exclusive(self._layout.root / ROOM_LOCK):
            self._make_room(model, target, staging, count)
            # Files already there (links to another revision's files) do not count toward it.
            (staging / PROMISE).write_text(f"{count} {allocated_bytes(staging)}")
        try:
            yield
        finally:
            with suppress(OSError):
                (staging / PROMISE).unlink()

    def hold(self, snapshot: Path) -> bool:
        """Protect the snapshot from eviction and mark it as just used; False if it is gone."""
        with self._use:
            if snapshot in self._leaving:
                return False
            descriptor = locks.shared(snapshot / MANIFEST)
            if descriptor is None:
                return False
            # The snapshot may have been replaced since it was first held: keep the newer lock.
            before = self._held.pop(snapshot, None)
            if before is not None:
                os.close(before)
            self._held[snapshot] = descriptor
            self._holders[snapshot] += 1
        with suppress(OSError):
            os.utime(snapshot / MANIFEST)
        return True

    def release(self, snapshot: Path) -> None:
        """Undo one `hold`."""
        with self._use:
            self._holders[snapshot] -= 1
            if self._holders[snapshot] == 0:
                del self._holders[snapshot]
                os.close(self._held.pop(snapshot))

    def clear(self, leftovers: Iterable[Path]) -> None:
        """Remove those of these staging directories that no process is fetching into."""
        with self._room:
            for leftover in leftovers:
                gone = _evict(leftover, self._layout.root)
                if gone is not None:
                    shutil.rmtree(gone, ignore_errors=True)

    def replace(self, target: Path, staging: Path) -> None:
        """Move a sealed staging directory into the place of its snapshot, replacing any old one."""
        with self._room:
            old = None
            if target.exists():
                # Renamed, not emptied: an engine that uses it still finds the same files at the same paths.
                old = _rename_away(target, self._layout.root)
            staging.rename(target)
            if old is not None:
                self.evicted(target)
                shutil.rmtree(old, ignore_errors=True)
        sync_directory(target.parent)

    def used(self) -> int:
        """Bytes on disk plus reserved bytes."""
        return self._used(None)

    def check_fits(self, model: str, count: int) -> None:
        """Raises DiskFull if a snapshot would not fit even in an empty cache, and CacheError."""
        most = min(self.quota, self._reachable())
        if count > most:
            raise DiskFull(
                f"The model '{model}' needs {readable_bytes(count)} in LOCAL_MODEL_CACHE "
                f"({self._layout.root}), which can hold {readable_bytes(most)} at most. "
                f"{self._advice(count)}",
                param="model",
            )

    def _reachable(self) -> int:
        """Free bytes of the file system plus the bytes in the cache."""
        root = self._layout.root
        try:
            root.mkdir(parents=True, exist_ok=True)
            status = os.statvfs(root)
        except OSError as error:
            raise CacheError(f"LOCAL_MODEL_CACHE={root} cannot be used: {error.strerror}.") from error
        return status.f_bavail * status.f_frsize + allocated_bytes(root)

    def _advice(self, count: int) -> str:
        """The settings to change so that a snapshot of `count` bytes fits."""
        if not _is_memory(self._layout.root):
            default, larger = "90 % of the file system", "point LOCAL_MODEL_CACHE at a larger disk"
        else:
            default = "half of the memory"
            larger = (
                "point LOCAL_MODEL_CACHE at a disk (its files are kept in memory now; on Cloud Run, mount an "
                "ephemeral disk) or give the container more memory"
            )
        over_disk = count > self._reachable()
        if self._chosen:
            more = f"raise or unset DISK_CACHE_GIB (now {self.quota / _GIB:.4g})"
            return f"To serve it, {more}{f' and {larger}' if over_disk else ''}."
        less_spare = f", or set DISK_CACHE_GIB (unset: {default})" if not over_disk else ""
        return f"To serve it, {larger}{less_spare}."

    def _used(self, mine: Path | None) -> int:
        return allocated_bytes(self._layout.root) + self._outstanding(mine)

    def _outstanding(self, mine: Path | None) -> int:
        """Reserved bytes not yet written; reservations left by a dead fetch of `mine` do not count."""
        void = [] if mine is None else stagings(mine)
        return sum(_outstanding(leftover) for leftover in self._layout.leftovers() if leftover not in void)

    def _free(self, mine: Path) -> int:
        """Free bytes within the quota and the file system that are not reserved."""
        status = os.statvfs(self._layout.root)
        on_disk = status.f_bavail * status.f_frsize - self._outstanding(mine)
        return min(self.quota - self._used(mine), on_disk)

    def _make_room(self, model: str, mine: Path, staging: Path, count: int) -> None:
        victims = [victim for victim in self._victims(mine) if victim != staging]
        void = stagings(mine)
        freed = sum(
            allocated_bytes(victim) + (0 if victim in void else _outstanding(victim)) for victim in victims
        )
        # Checked before anything is evicted: a model that cannot fit must not cost others their snapshots.
        if count > self._free(mine) + freed:
            raise self._full(model, mine, count, freed)
        for victim in victims:
            if count <= self._free(mine):
                return
            if self._let_go(victim, mine):
                logger.info("evicted from disk", extra={"snapshot": str(victim)})
        if count > self._free(mine):
            raise self._full(model, mine, count, 0)

    def _victims(self, mine: Path) -> list[Path]:
        """Eviction candidates in order: leftovers, then unused snapshots, least recently used first.

        Leftovers of the revision itself come last: they save fetching it again.
        """
        with self._use:
            held = set(self._held)
        snapshots = sorted(self._layout.snapshots(), key=last_used)
        own = stagings(mine)
        others = [path for path in self._layout.leftovers() if path not in own]
        candidates = [*others, *(path for path in snapshots if path not in held), *own]
        return [path for path in candidates if _is_free(path, mine)]

    def _let_go(self, victim: Path, mine: Path) -> bool:
        """Evict, unless it is held by now."""
        with self._use:
            if victim in self._held:
                return False
            self._leaving.add(victim)
        try:
            gone = _evict(victim, self._layout.root, mine)
        finally:
            with self._use:
                self._leaving.discard(victim)
        if gone is not None:
            self.evicted(victim)
            shutil.rmtree(gone, ignore_errors=True)
        return gone is not None

    def _full(self, model: str, mine: Path, count: int, freed: int) -> DiskFull:
        status = os.statvfs(self._layout.root)
        with self._use:
            held = ", ".join(sorted({path.parent.name for path in self._held}))
        free, used, left = (
            readable_bytes(max(0, number))
            for number in (
                self._free(mine) + freed,
                self._used(mine) - freed,
                status.f_bavail * status.f_frsize,
            )
        )
        using = f"models that are loaded ({held}) and " if held else ""
        fetching = self._outstanding(mine) > 0
        advice = " Unload a model (POST /admin/unload)." if held else ""
        if fetching:
            advice += f" Try again in {RETRY_SECONDS} s, when a fetch may have ended."
        error = DiskFull(
            f"The model '{model}' needs {readable_bytes(count)} in LOCAL_MODEL_CACHE ({self._layout.root}), "
            f"but only {free} can be made available: {used} of the quota of {readable_bytes(self.quota)} "
            f"(DISK_CACHE_GIB) is in use by {using}fetches in progress, and the file system has {left} left."
            f"{advice} {self._advice(count)}",
            param="model",
            retry_after=RETRY_SECONDS if fetching else None,
        )
        error.missing = count - self._free(mine) - freed
        return error


def open_cache(directory: Path, quota_gib: float | None) -> tuple[Layout, Disk]:
    """LOCAL_MODEL_CACHE with its quota, created if necessary; raises CacheError."""
    root = directory.absolute()
    try:
        root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CacheError(f"LOCAL_MODEL_CACHE={root} cannot be created: {error.strerror}.") from error
    layout = Layout(root)
    if quota_gib is None:
        return layout, Disk(layout, default_quota(root))
    return layout, Disk(layout, int(quota_gib * _GIB), chosen=True)


def default_quota(directory: Path) -> int:
    """90 % of the file system, or half of the memory if files are kept in memory. Bytes."""
    status = os.statvfs(directory)
    if _is_memory(directory):
        return int(SHARE_OF_MEMORY * min(memory_bytes(), status.f_blocks * status.f_frsize))
    return int(SHARE_OF_DISK * status.f_blocks * status.f_frsize)


def _is_memory(directory: Path) -> bool:
    kind, mount = _mount(directory)
    # Cloud Run's root file system is memory whatever type it reports; a mounted volume is not.
    return kind in _MEMORY_FILE_SYSTEMS or ("K_SERVICE" in os.environ and mount == Path("/"))


def _mount(directory: Path) -> tuple[str, Path]:
    """Type and mount point of the file system of `directory`."""
    kind, mount = "", Path("/")
    with suppress(OSError):
        for line in Path("/proc/self/mountinfo").read_text().splitlines():
            before, _, after = line.partition(" - ")
            point = Path(before.split(" ")[4].replace("\\040", " "))
            if directory.resolve().is_relative_to(point) and len(point.parts) >= len(mount.parts):
                kind, mount = after.split(" ")[0], point
    return kind, mount


def _is_free(victim: Path, mine: Path) -> bool:
    """Whether no process is using or fetching it."""
    with locks.try_exclusive(_lock_for(victim, mine)) as ours:
        return ours


def _evict(victim: Path, root: Path, mine: Path | None = None) -> Path | None:
    """Rename a snapshot or leftover away; returns the new path, or None if a process needs it."""
    with locks.try_exclusive(_lock_for(victim, mine)) as ours:
        return _rename_away(victim, root) if ours else None


def _lock_for(victim: Path, mine: Path | None) -> Path | None:
    """The file that is locked while a process needs `victim`; None if only the caller can need it."""
    if victim.name.startswith(EVICTED):
        return None
    if not victim.name.startswith(INCOMPLETE):
        return victim / MANIFEST
    target = victim.parent / revision_of(victim)
    return None if target == mine else lock_of(target)


def _rename_away(victim: Path, root: Path) -> Path | None:
    """Renames first, so that no half-removed directory ever has a manifest."""
    gone = victim if victim.name.startswith(EVICTED) else root / f"{EVICTED}{os.urandom(6).hex()}"
    try:
        victim.rename(gone)
    except OSError:
        return None
    return gone


def _outstanding(staging: Path) -> int:
    """Bytes reserved by a fetch and not yet written."""
    try:
        count, before = map(int, (staging / PROMISE).read_text().split())
    except (OSError, ValueError):
        return 0
    return max(0, count - max(0, allocated_bytes(staging) - before))
