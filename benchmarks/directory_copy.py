"""Copy a model from a directory (file://): this service, with all its checksums, against cp.

Both copy from memory to memory (/dev/shm), each in a process of its own. `cp` verifies nothing.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.report import say

TENSORS = 32


def run(shards: int, shard_bytes: int, rounds: int) -> tuple[list[float], list[float]]:
    """Bytes per second of this service and of cp, of each round."""
    ours: list[float] = []
    theirs: list[float] = []
    with tempfile.TemporaryDirectory(dir="/dev/shm") as source:
        total = _make(Path(source, "models", "big"), shards, shard_bytes)
        for number in range(rounds):
            for mine in (True, False) if number % 2 else (False, True):
                with tempfile.TemporaryDirectory(dir="/dev/shm") as target:
                    seconds = _ours(source, target) if mine else _cp(source, target)
                (ours if mine else theirs).append(total / seconds)
            say(f"directory, round {number + 1}: {ours[-1] / 1e6:.0f} MB/s, cp {theirs[-1] / 1e6:.0f} MB/s")
    return ours, theirs


def _make(directory: Path, shards: int, shard_bytes: int) -> int:
    """Random weights with a header that is theirs."""
    directory.mkdir(parents=True)
    size = shard_bytes // TENSORS
    for shard in range(shards):
        tensors = {
            f"layers.{shard}.{number}.weight": {
                "dtype": "BF16",
                "shape": [size // 2],
                "data_offsets": [number * size, (number + 1) * size],
            }
            for number in range(TENSORS)
        }
        header = json.dumps(tensors).encode()
        with (directory / f"model-{shard + 1:05}-of-{shards:05}.safetensors").open("wb") as file:
            file.write(len(header).to_bytes(8, "little") + header)
            for _ in range(TENSORS):
                file.write(os.urandom(size))
    (directory / "config.json").write_text("{}")
    return sum(path.stat().st_size for path in directory.iterdir())


def _cp(source: str, target: str) -> float:
    started = time.perf_counter()
    subprocess.run(["cp", "-r", f"{source}/models", target], check=True)
    return time.perf_counter() - started


def _ours(source: str, target: str) -> float:
    command = [sys.executable, "-m", "benchmarks.directory_copy", source, target]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
    return float(done.stdout.splitlines()[-1])


def copy(source: Path, target: Path) -> None:
    from inference_service.storage.bucket.directory import DirectoryStore
    from inference_service.storage.bucket.model import models_in
    from inference_service.storage.snapshots.cache import Disk
    from inference_service.storage.snapshots.layout import Layout
    from inference_service.storage.snapshots.snapshots import SnapshotStore

    store, layout = DirectoryStore(source), Layout(target)
    model = models_in(store.list("models/"), "models/")["big"]
    snapshots = SnapshotStore(store, layout, Disk(layout, 1 << 50))
    started = time.perf_counter()
    snapshots.ensure(model)
    print(time.perf_counter() - started)


if __name__ == "__main__":
    copy(Path(sys.argv[1]), Path(sys.argv[2]))
