"""Pages of mapped files, held in memory for copies to the device at the rate of its bus."""

import ctypes
import mmap
from collections.abc import Callable
from typing import Protocol

import torch

# cudaHostRegisterReadOnly. Other flags are refused for a mapping that must not be written to.
_READ_ONLY = 8
# madvise(2), Linux 5.14: map the pages at once instead of one fault after the other.
_POPULATE_READ = 22
# The disk may be slow: what waits for the end waits for one of these.
POPULATE_BYTES = 8 << 20


_libc = ctypes.CDLL(None)


class PageLockRefused(OSError):
    """The device's driver does not lock these pages; the message says why."""


class PageLock(Protocol):
    """Locks ranges of memory, which are mapped by then; called from one thread at a time."""

    def lock(self, address: int, count: int) -> None:
        """Raises PageLockRefused."""
        ...

    def unlock(self, address: int) -> None: ...


class CudaPageLock:
    """Registers memory with CUDA.

    The driver holds up all other work of the process meanwhile (12 GB/s on an H200): ranges are to be small.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def lock(self, address: int, count: int) -> None:
        # A thread has a device of its own, and an error of its own: a refusal does not reach the engine's.
        with torch.cuda.device(self._device):
            status = torch.cuda.cudart().cudaHostRegister(address, count, _READ_ONLY)
        if int(status) != 0:
            raise PageLockRefused(f"cudaHostRegister of {count} bytes: error {int(status)}")

    def unlock(self, address: int) -> None:
        with torch.cuda.device(self._device):
            torch.cuda.cudart().cudaHostUnregister(address)


class NoPageLock:
    """Where there is no device to copy to: pages are mapped ahead, which saves the faults, and not locked."""

    def lock(self, address: int, count: int) -> None:
        """Nothing is left to do."""

    def unlock(self, address: int) -> None:
        """Nothing was done."""


def page_lock_for(device: torch.device) -> PageLock:
    return CudaPageLock(device) if device.type == "cuda" else NoPageLock()


def populate(address: int, count: int, stopped: Callable[[], bool]) -> bool:
    """Read mapped pages in, outside of any lock of the driver's; False if `stopped` before the end.

    A kernel that cannot leaves it to their use. Not mmap.madvise, which holds the GIL, and tokens up with it.
    """
    for start in range(0, count, POPULATE_BYTES):
        if stopped():
            return False
        length = min(POPULATE_BYTES, count - start)
        if _madvise(address + start, length, _POPULATE_READ) != 0:
            _madvise(address + start, length, mmap.MADV_WILLNEED)
    return True


def _madvise(address: int, count: int, advice: int) -> int:
    status: int = _libc.madvise(ctypes.c_void_p(address), ctypes.c_size_t(count), ctypes.c_int(advice))
    return status
