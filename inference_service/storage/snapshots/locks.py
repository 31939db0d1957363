"""Advisory file locks (flock) between the processes that share LOCAL_MODEL_CACHE.

They end with the process that holds them. Correctness never depends on them: even on a file system without
locks, every fetch writes to its own directory, and only the rename of a complete one makes a snapshot.
"""

import fcntl
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from inference_service.storage.snapshots.layout import is_at, lock_of, stagings

LOCK_POLL_SECONDS = 0.2
# How long to wait for another process that holds the lock and makes no progress.
LOCK_PATIENCE_SECONDS = 120.0


@contextmanager
def revision_lock(target: Path, done: Callable[[], bool]) -> Iterator[bool]:
    """Wait while another process fetches this revision and makes progress, or until `done`.

    Yields whether this process has the revision to itself: existing staging directories were then left by
    processes that were killed.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    descriptor = _wait_for_lock(target, done)
    try:
        yield descriptor is not None and _excludes(lock_of(target))
    finally:
        if descriptor is not None:
            with suppress(OSError):
                lock_of(target).unlink()
            os.close(descriptor)


@contextmanager
def exclusive(path: Path) -> Iterator[None]:
    """Wait for the lock on `path`, created if necessary; without a lock if the file system has none."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


@contextmanager
def try_exclusive(path: Path | None) -> Iterator[bool]:
    """Hold the lock on an existing file; yields whether it was free.

    A file that is missing, or that cannot be locked, counts as free.
    """
    try:
        descriptor = None if path is None else os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        descriptor = None
    if descriptor is None:
        yield True
        return
    try:
        yield _is_free(descriptor)
    finally:
        os.close(descriptor)


def shared(path: Path) -> int | None:
    """A descriptor that holds a shared lock on an existing file; None if the file is gone or about to go.

    On a file system without locks the descriptor holds none. The caller closes it.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:  # another process is removing it
        os.close(descriptor)
        return None
    except OSError:
        pass
    if not is_at(descriptor, path):  # it was removed just before
        os.close(descriptor)
        return None
    return descriptor


def _is_free(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True


def _wait_for_lock(target: Path, done: Callable[[], bool]) -> int | None:
    """The lock on the revision; None once `done`, or if locks are not available."""
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
    """A descriptor that holds the lock; None while another process has it. Raises OSError."""
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
    """Whether a held lock excludes others: on some file systems it has no effect."""
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
