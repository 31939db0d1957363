"""The directory tree in LOCAL_MODEL_CACHE.

    LOCAL_MODEL_CACHE/
      my-model/
        3f2a9c0d1e5b/                        a snapshot: one revision, complete and verified
          config.json  model.safetensors  ...
          .weight_check.json                 its output for a fixed prompt (pool/weight_check.py)
          .tensors.json                      a checksum of each tensor (checkpoints/tensor_checksums.py)
          .manifest.json                     written last; its mtime is the snapshot's last use
        .incomplete-3f2a9c0d1e5b-k3x0a1/     a fetch in progress, or left by a killed one
          .journal                           the stretches that have arrived, with their crc32c
          .promised                          the bytes reserved on the disk
        .3f2a9c0d1e5b.lock                   held by the process that fetches the revision
      .evicted-9fj2k1/                       an evicted snapshot that is being removed
      .room.lock                             held while space is freed or reserved
      .compiled/                             what engines compile, by its key in COMPILE_CACHE
      .vllm/                                 vLLM's compiled kernels and start-up plans
      .triton/                               Triton's compiled kernels

A file that exists proves nothing; only the manifest does.
"""

import json
import os
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Self

from inference_service.storage.bucket.store import StoredObject

MANIFEST = ".manifest.json"
JOURNAL = ".journal"
PROMISE = ".promised"
INCOMPLETE = ".incomplete-"
EVICTED = ".evicted-"
ROOM_LOCK = ".room.lock"


@dataclass(frozen=True)
class FileRecord:
    """One verified file: the object that it is a copy of, and the `crc32c` of all its bytes.

    `modified_ns`: the file's mtime; a different one means that the file was written to since.
    """

    object: str
    generation: str
    size: int
    crc32c: int
    modified_ns: int


@dataclass(frozen=True)
class Manifest:
    """The files of a snapshot by name."""

    files: dict[str, FileRecord]

    @classmethod
    def read(cls, snapshot: Path) -> Self | None:
        """The manifest in `snapshot`; None if it is missing or unreadable."""
        try:
            content = json.loads((snapshot / MANIFEST).read_bytes())
            return cls({name: FileRecord(**record) for name, record in content["files"].items()})
        except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
            return None

    def write(self, directory: Path) -> None:
        """Write it durably; raises OSError."""
        content = {"files": {name: asdict(record) for name, record in self.files.items()}}
        write_durably(directory / MANIFEST, json.dumps(content, indent=1).encode())

    def covers(self, objects: Iterable[StoredObject]) -> bool:
        """Whether it lists exactly these objects at these generations."""
        return {name: (record.object, record.generation) for name, record in self.files.items()} == {
            stored.filename: (stored.name, stored.generation) for stored in objects
        }


@dataclass(frozen=True)
class Layout:
    """The cache directory `root`."""

    root: Path

    def snapshot(self, model: str, revision: str) -> Path:
        return self.root / model / revision

    def snapshots(self) -> list[Path]:
        """Every directory with a manifest, complete or not."""
        below = [path for model in _visible(self.root) for path in _visible(model)]
        return [path for path in below if (path / MANIFEST).exists()]

    def revisions(self, model: str) -> list[str]:
        """Revisions of a model that have a manifest, the most recently used first."""
        found = [path for path in _visible(self.root / model) if (path / MANIFEST).exists()]
        return [path.name for path in sorted(found, key=last_used, reverse=True)]

    def leftovers(self) -> list[Path]:
        """Staging directories of all models, and snapshots whose eviction was interrupted."""
        stagings = [staging for model in _visible(self.root) for staging in stagings_of(model)]
        return [*stagings, *_named(self.root, EVICTED)]


def _visible(directory: Path) -> list[Path]:
    return [path for path in _named(directory, "") if not path.name.startswith(".")]


def _named(directory: Path, prefix: str) -> list[Path]:
    """Entries of the directory by name; none if it is gone. (`glob` fails if others remove entries.)"""
    try:
        return sorted(path for path in directory.iterdir() if path.name.startswith(prefix))
    except OSError:
        return []


def stagings_of(model: Path) -> list[Path]:
    """Staging directories of any revision of a model, in use or left over."""
    return _named(model, INCOMPLETE)


def stagings(snapshot: Path) -> list[Path]:
    """Staging directories of this revision, in use or left over."""
    return [staging for staging in stagings_of(snapshot.parent) if revision_of(staging) == snapshot.name]


def revision_of(staging: Path) -> str:
    """The revision that a staging directory belongs to."""
    return staging.name.removeprefix(INCOMPLETE).rpartition("-")[0]


def last_used(snapshot: Path) -> float:
    """When an engine was last loaded from it; 0 if it is gone."""
    try:
        return (snapshot / MANIFEST).stat().st_mtime
    except OSError:
        return 0.0


def disown(snapshot: Path) -> None:
    """Invalidate the snapshot: the next request for it fetches it again."""
    with suppress(OSError):
        (snapshot / MANIFEST).unlink()


def lock_of(snapshot: Path) -> Path:
    return snapshot.parent / f".{snapshot.name}.lock"


def is_whole(snapshot: Path, objects: Iterable[StoredObject]) -> bool:
    """Whether it is a snapshot of these objects: its manifest exists, and no file has changed since."""
    manifest = Manifest.read(snapshot)
    if manifest is None or not manifest.covers(objects):
        return False
    with suppress(OSError):
        return all(_untouched(snapshot / name, record) for name, record in manifest.files.items())
    return False


def _untouched(path: Path, record: FileRecord) -> bool:
    status = path.stat()
    return (status.st_size, status.st_mtime_ns) == (record.size, record.modified_ns)


def is_at(descriptor: int, path: Path) -> bool:
    """Whether the open file is the one that is at `path` now."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except OSError:
        return False


def write_durably(path: Path, content: bytes) -> None:
    """Raises OSError."""
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def sync_directory(path: Path) -> None:
    """Make the directory's entries durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def allocated_bytes(directory: Path) -> int:
    """Disk usage of the files below, each counted once even if it has several links.

    A file that vanishes meanwhile counts as nothing.
    """
    total, seen = 0, set()
    for parent, _, names in os.walk(directory):
        for name in names:
            with suppress(OSError):
                status = Path(parent, name).lstat()
                if status.st_nlink > 1 and status.st_ino in seen:
                    continue
                seen.add(status.st_ino)
                total += status.st_blocks * 512
    return total
