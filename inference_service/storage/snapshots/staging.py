"""A fetch in progress on disk: its files, and the journal of the stretches that have arrived.

A staging directory is written by one fetch only. The directory of a killed fetch is never taken over, because
a process that seems dead may still write to it: its stretches are copied if their checksums match.
"""

import bisect
import json
import os
import shutil
import tempfile
import threading
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any

import google_crc32c

from inference_service.checkpoints.tensor_checksums import TENSOR_CHECKSUMS, dump
from inference_service.storage.bucket.store import StoredObject
from inference_service.storage.snapshots import checksums
from inference_service.storage.snapshots.cancellation import CancelToken
from inference_service.storage.snapshots.checksums import FileChecksums
from inference_service.storage.snapshots.layout import (
    INCOMPLETE,
    JOURNAL,
    PROMISE,
    FileRecord,
    Manifest,
    write_durably,
)

COPY_BYTES = 1 << 20


@dataclass(frozen=True)
class Stretch:
    """The bytes `start` to `end` (exclusive) of one file, and their crc32c."""

    file: str
    start: int
    end: int
    crc32c: int

    @property
    def bytes(self) -> int:
        return self.end - self.start


class Coverage:
    """The bytes of one file that have arrived: stretches without overlap, in order."""

    def __init__(self) -> None:
        self._stretches: list[tuple[int, int]] = []

    def fits(self, start: int, end: int) -> bool:
        """Whether none of these bytes has arrived."""
        index = bisect.bisect_left(self._stretches, (start, end))
        before = index == 0 or self._stretches[index - 1][1] <= start
        return before and (index == len(self._stretches) or end <= self._stretches[index][0])

    def add(self, start: int, end: int) -> None:
        bisect.insort(self._stretches, (start, end))

    def gaps(self, size: int) -> list[tuple[int, int]]:
        """The missing ranges of a file of `size` bytes; one empty gap if the file is empty."""
        gaps, position = [], 0
        for start, end in [*self._stretches, (size, size)]:
            if start > position:
                gaps.append((position, start))
            position = end
        return gaps or [(size, size)]


class IncomingFile:
    """One file that is being fetched, and the number of its missing bytes.

    It is open only from its first byte until it is verified: a model may have thousands of files.
    `checksums` are those of its bytes on the disk, once it is verified.
    """

    def __init__(self, stored: StoredObject, path: Path) -> None:
        self.stored = stored
        self.missing = stored.size
        self.complete = False
        self.damaged = 0
        self.checksums: FileChecksums | None = None
        self._received: list[Stretch] = []
        self._path = path
        self._opening = threading.Lock()
        self._file: FileIO | None = None

    @property
    def name(self) -> str:
        return self.stored.filename

    def write(self, content: bytes, offset: int) -> None:
        """Raises OSError, ENOSPC among others."""
        descriptor, rest = self._open(), memoryview(content)
        while rest:
            written = os.pwrite(descriptor, rest, offset)
            offset += written
            rest = rest[written:]

    def flush(self) -> None:
        """Make the content durable."""
        os.fsync(self._open())

    def read_back(self) -> FileChecksums:
        """The checksums of the file on disk; raises OSError."""
        return checksums.of_file(self._open(), self.name, self.stored.size)

    def received(self, stretch: Stretch) -> None:
        """Note a stretch that has arrived, in any order."""
        self._received.append(stretch)

    def start_over(self) -> None:
        """All of it is to be fetched again."""
        self.missing, self.complete = self.stored.size, False
        self._received.clear()

    def crc32c_received(self) -> int | None:
        """crc32c of the bytes as they arrived; None if an abandoned connection has not noted all of it."""
        position = crc32c = 0
        for stretch in sorted(self._received, key=lambda stretch: stretch.start):
            if stretch.start != position:
                return None
            crc32c = checksums.combined(crc32c, stretch.crc32c, stretch.bytes)
            position = stretch.end
        return crc32c if position == self.stored.size else None

    def close(self) -> None:
        """Close the file, which no thread writes to any more. Idempotent."""
        with self._opening, suppress(OSError):
            if self._file is not None:
                self._file.close()

    def _open(self) -> int:
        with self._opening:
            if self._file is None:
                self._file = self._path.open("w+b", buffering=0)
                self._file.truncate(self.stored.size)
            return self._file.fileno()


class Staging:
    """The directory of one fetch."""

    def __init__(self, snapshot: Path) -> None:
        """Create one next to `snapshot`; raises OSError."""
        snapshot.parent.mkdir(parents=True, exist_ok=True)
        prefix = f"{INCOMPLETE}{snapshot.name}-"
        self.path = Path(tempfile.mkdtemp(prefix=prefix, dir=snapshot.parent))
        self._journal = (self.path / JOURNAL).open("ab", buffering=0)
        self._writing = threading.Lock()
        # Whether its bytes exist nowhere else: not so while the leftover exists that they were copied from.
        self._only_copy = False
        self._verified: dict[str, tuple[StoredObject, FileChecksums]] = {}

    def note(self, stretch: Stretch) -> None:
        """Journal a stretch, so that the next fetch need not fetch it again if this process is killed."""
        self._only_copy = True
        self._enter(stretch)

    def salvage(
        self, leftover: Path, files: dict[str, IncomingFile], covered: dict[str, Coverage], token: CancelToken
    ) -> Iterator[Stretch]:
        """Copy the stretches of `leftover` that are not in `covered` and match their checksums; yields each.

        The leftover is removed at the end. Before that, raises Cancelled and OSError.
        """
        took = False
        for stretch in journalled(leftover):
            token.check()
            file = files.get(stretch.file)
            if file is None or not 0 <= stretch.start < stretch.end <= file.stored.size:
                continue
            if not covered[stretch.file].fits(stretch.start, stretch.end):
                continue
            if _copy(leftover / stretch.file, stretch, file):
                covered[stretch.file].add(stretch.start, stretch.end)
                file.received(stretch)
                self._enter(stretch)
                took = True
                yield stretch
        self._only_copy |= took
        shutil.rmtree(leftover, ignore_errors=True)

    def reuse(
        self, snapshots: Iterable[Path], objects: Iterable[StoredObject], token: CancelToken
    ) -> list[StoredObject]:
        """Link the files of other snapshots that have the same generation and match their checksums.

        Raises Cancelled.
        """
        wanted = {(stored.name, stored.generation): stored for stored in objects}
        for snapshot in snapshots:
            manifest = Manifest.read(snapshot)
            for name, record in ({} if manifest is None else manifest.files).items():
                stored = wanted.get((record.object, record.generation))
                if stored is None or stored.filename != name:
                    continue
                with suppress(OSError):
                    found = _read(snapshot / name, stored, token)
                    if found is not None and found.crc32c == record.crc32c:
                        os.link(snapshot / name, self.path / name)
                        self.verified(stored, found)
                        del wanted[stored.name, stored.generation]
        return [stored for stored in objects if (stored.name, stored.generation) in wanted]

    def verified(self, stored: StoredObject, found: FileChecksums) -> None:
        """Note a file that is complete, verified and durable."""
        self._verified[stored.filename] = (stored, found)

    def seal(self) -> None:
        """Write the checksums of its tensors, and then the manifest of the verified files. Raises OSError."""
        self.close()
        for name in (JOURNAL, PROMISE):
            (self.path / name).unlink(missing_ok=name == PROMISE)
        files = self._verified.items()
        tensors = {name: found.tensors for name, (_, found) in files if found.tensors}
        write_durably(self.path / TENSOR_CHECKSUMS, dump(tensors))
        Manifest({name: self._record(stored, found) for name, (stored, found) in files}).write(self.path)

    def _record(self, stored: StoredObject, found: FileChecksums) -> FileRecord:
        modified_ns = (self.path / stored.filename).stat().st_mtime_ns
        return FileRecord(stored.name, stored.generation, stored.size, found.crc32c, modified_ns)

    def leave(self) -> None:
        """End a fetch that failed or was cancelled; what has arrived stays for the next one.

        Fetches that break off while they copy a leftover leave no further ones.
        """
        self.close()
        if not self._only_copy:
            self.discard()

    def close(self) -> None:
        # Under the lock: the number of a closed descriptor is soon reused.
        with self._writing:
            self._journal.close()

    def _enter(self, stretch: Stretch) -> None:
        line = f"{json.dumps([stretch.file, stretch.start, stretch.end, stretch.crc32c])}\n"
        with self._writing:
            # A late thread may still call after `close`; a full disk is reported elsewhere.
            if not self._journal.closed:
                with suppress(OSError):
                    self._journal.write(line.encode())

    def discard(self) -> None:
        self.close()
        shutil.rmtree(self.path, ignore_errors=True)


def journalled(leftover: Path) -> list[Stretch]:
    """The stretches in a journal, without an incomplete last line."""
    stretches = []
    with suppress(OSError):
        for line in (leftover / JOURNAL).read_bytes().splitlines():
            with suppress(ValueError, TypeError, RecursionError):
                stretches.append(_stretch(json.loads(line)))
    return stretches


def _stretch(line: Any) -> Stretch:
    file, start, end, crc32c = line
    if type(file) is not str or not all(type(number) is int for number in (start, end, crc32c)):
        raise TypeError(line)
    return Stretch(file, start, end, crc32c)


def _copy(source: Path, stretch: Stretch, file: IncomingFile) -> bool:
    """Copy the stretch; returns False if it cannot be read, or its bytes do not match the journal.

    Raises OSError if it cannot be written.
    """
    total, offset = 0, stretch.start
    try:
        opened = source.open("rb", buffering=0)
    except OSError:
        return False
    with opened:
        while offset < stretch.end:
            try:
                chunk = os.pread(opened.fileno(), min(COPY_BYTES, stretch.end - offset), offset)
            except OSError:
                return False
            if not chunk:
                return False
            total = google_crc32c.extend(total, chunk)
            file.write(chunk, offset)
            offset += len(chunk)
    return total == stretch.crc32c


def _read(path: Path, stored: StoredObject, token: CancelToken) -> FileChecksums | None:
    """The checksums of a file; None if it does not have the object's size. Raises OSError and Cancelled."""
    with path.open("rb", buffering=0) as file:
        if os.fstat(file.fileno()).st_size != stored.size:
            return None
        return checksums.of_file(file.fileno(), stored.filename, stored.size, token.check)
