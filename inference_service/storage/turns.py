"""Turns: one process at a time fetches a revision, by a lock beside its snapshot.

The lock saves downloading twice, no more: without it (a file system that has none) every fetch writes to
a directory of its own all the same.
"""

import fcntl
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from inference_service.storage.layout import is_at, lock_of, stagings

LOCK_POLL_SECONDS = 0.2
# Another process that has written nothing for so long is not waited for.
LOCK_PATIENCE_SECONDS = 120.0


@contextmanager
def turn(target: Path, done: Callable[[], bool]) -> Iterator[bool]:
    """Wait while another process fetches this revision, as long as it gets on, or until `done` raises.

    Yields whether nobody else fetches it now: what lies there of it, a killed process has left.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    descriptor = _lock(target, done)
    try:
        yield descriptor is not None and _excludes(lock_of(target))
    finally:
        if descriptor is not None:
            with suppress(OSError):
                lock_of(target).unlink()
            os.close(descriptor)


def _lock(target: Path, done: Callable[[], bool]) -> int | None:
    """The lock on the revision; None once it is there, or where there is no lock to be had."""
    path = lock_of(target)
    written_at, alive_at = 0.0, time.monotonic()
    while True:
        try:
            descriptor = _try_lock(path)
        except OSError:  # a file system without locks
            return None
        if descriptor is not None:
            return descriptor
        newest = max(map(_written_at, stagings(target)), default=0.0)
        if newest != written_at:
            written_at, alive_at = newest, time.monotonic()
        if done() or time.monotonic() - alive_at > LOCK_PATIENCE_SECONDS:
            return None
        time.sleep(LOCK_POLL_SECONDS)


def _try_lock(path: Path) -> int | None:
    """A descriptor that holds the lock; None while another has it. Raises OSError."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if is_at(descriptor, path):
                return descriptor
            os.close(descriptor)  # its holder has just removed it
        except BlockingIOError:
            os.close(descriptor)
            return None
        except OSError:
            os.close(descriptor)
            raise


def _excludes(path: Path) -> bool:
    """Whether a lock that is held keeps others out: on some file systems it does nothing."""
    second = _try_lock(path)
    if second is None:
        return True
    os.close(second)
    return False


def _written_at(staging: Path) -> float:
    times = [0.0]
    with suppress(OSError):
        times += [path.stat().st_mtime for path in staging.iterdir()]
    return max(times)
