"""The host-memory tier (HOST_CACHE_GIB): recently used weights stay in memory, whatever else is read.

The files' pages in the page cache, which all engines that read them share, are locked. If the system does not
allow this process to lock memory (RLIMIT_MEMLOCK), the page cache alone keeps them, and the log says so.
"""

import ctypes
import logging
import mmap
import os
import threading
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

_FAILED = ctypes.c_void_p(-1).value


@dataclass(frozen=True)
class _Locked:
    address: int
    bytes: int


class PageLock:
    """Locks up to `quota` bytes of weights in memory and evicts the least recently used; 0 disables it."""

    def __init__(self, quota: int) -> None:
        self.quota = quota
        self._locked: OrderedDict[Path, list[_Locked]] = OrderedDict()
        self._lock = threading.Lock()
        self._refused = False
        self._libc: Any = _libc() if quota else None

    @property
    def bytes(self) -> int:
        """The number of locked bytes."""
        return sum(file.bytes for files in self._locked.values() for file in files)

    def keep(self, snapshot: Path, names: list[str]) -> None:
        """Mark the snapshot as just used: lock its files, and unlock others beyond the quota. Blocks."""
        if self._libc is None or self._refused:
            return
        with self._lock:
            if snapshot in self._locked:
                self._locked.move_to_end(snapshot)
                return
            for left in [path for path in self._locked if not path.exists()]:
                self._drop(self._locked.pop(left))
            wanted = sum((snapshot / name).stat().st_size for name in names)
            if wanted > self.quota:
                return
            while self._locked and self.bytes + wanted > self.quota:
                self._drop(self._locked.popitem(last=False)[1])
            files = [self._lock_file(snapshot / name) for name in names]
            kept = [file for file in files if file is not None]
            if len(kept) == len(files):
                self._locked[snapshot] = kept
            else:
                self._drop(kept)

    def forget(self, snapshot: Path) -> None:
        """Unlock a snapshot that is being removed from the disk."""
        with self._lock:
            self._drop(self._locked.pop(snapshot, []))

    def _lock_file(self, path: Path) -> _Locked | None:
        size = path.stat().st_size
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            address = self._libc.mmap(None, size, mmap.PROT_READ, mmap.MAP_SHARED, descriptor, 0)
        finally:
            os.close(descriptor)
        if address in (None, _FAILED):
            return None
        if self._libc.mlock(address, size) != 0:
            self._refused = True
            logger.warning(
                "HOST_CACHE_GIB: weights cannot be locked in memory, so other files may displace them from "
                "the page cache: mlock: %s. Raise RLIMIT_MEMLOCK (docker run --ulimit memlock=-1, systemd "
                "LimitMEMLOCK=infinity)",
                os.strerror(ctypes.get_errno()),
            )
            self._libc.munmap(address, size)
            return None
        return _Locked(address, size)

    def _drop(self, files: list[_Locked]) -> None:
        for file in files:
            self._libc.munmap(file.address, file.bytes)


def _libc() -> Any:
    libc = ctypes.CDLL(None, use_errno=True)
    size, address, number = ctypes.c_size_t, ctypes.c_void_p, ctypes.c_int
    libc.mmap.argtypes = (address, size, number, number, number, ctypes.c_long)
    libc.mmap.restype = address
    libc.mlock.argtypes = libc.munmap.argtypes = (address, size)
    return libc
