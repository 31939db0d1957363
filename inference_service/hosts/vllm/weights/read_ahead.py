"""Weights that nothing was prepared for: several threads read them into a ring of page-locked memory.

A copy from page-locked memory runs at the rate of the device's bus, while the threads fill what follows. vLLM
keeps a module's tensors until it has all of them, so a place in the ring is free again only when the tensor
that it holds is gone.
"""

import os
import weakref
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from inference_service.hosts.vllm.weights.mapped import Located, MappedWeights, tensor_at

RING_BYTES = 512 << 20
# Locking new memory holds up the process (0.9 GB/s on an H200), so it is done in pieces, once.
CHUNK_BYTES = 16 << 20
THREADS = min(8, os.cpu_count() or 1)
_ALIGNMENT = 64


@dataclass
class _Place:
    """Bytes of the ring; `free` once the tensor there is gone."""

    start: int
    end: int
    free: bool = False

    def release(self) -> None:
        """Takes no lock: it may be called in the middle of anything, by the garbage collector."""
        self.free = True


class Ring:
    """Places in one buffer, taken in order by one thread and freed in any order by any."""

    def __init__(self, buffer: torch.Tensor) -> None:
        """`buffer`: one dimension of bytes on the CPU."""
        self._memory: Any = buffer.numpy()
        self._taken: deque[_Place] = deque()

    @property
    def bytes(self) -> int:
        return int(self._memory.nbytes)

    def take(self, count: int) -> Any | None:
        """A writable array of `count` bytes, whose place is free again once it is gone; None: no place."""
        while self._taken and self._taken[0].free:
            self._taken.popleft()
        start = self._start(count)
        if start is None:
            return None
        array = self._memory[start : start + count]
        if count:
            place = _Place(start, start + count)
            self._taken.append(place)
            weakref.finalize(array, place.release).atexit = False
        return array

    def _start(self, count: int) -> int | None:
        if not self._taken:
            return 0 if count <= self.bytes else None
        oldest, newest = self._taken[0].start, self._taken[-1].end
        newest += -newest % _ALIGNMENT
        if newest <= oldest:
            return newest if newest + count < oldest else None
        if newest + count <= self.bytes:
            return newest
        return 0 if count < oldest else None


class ReadAhead:
    """Reads tensors into a ring ahead of their use; one that finds no place is a view of its file."""

    def __init__(self, weights: MappedWeights, ring: Ring, threads: int = THREADS) -> None:
        self._weights = weights
        self._ring = ring
        self._threads = threads
        self.read_bytes = 0

    def tensors(self, names: Sequence[str]) -> Iterator[tuple[str, torch.Tensor]]:
        """The tensors in this order; raises OSError, and EOFError for a file that has become shorter."""
        with (
            ThreadPoolExecutor(self._threads, thread_name_prefix="read-weights") as pool,
            ExitStack() as files,
        ):
            opened: dict[Path, int] = {}
            reading: deque[tuple[str, Any, list[Future[None]]]] = deque()
            ahead = 0
            for position, name in enumerate(names):
                ahead = max(ahead, position)
                while ahead < len(names):
                    located = self._weights.located(names[ahead])
                    array = self._ring.take(located.tensor.bytes)
                    if array is None:
                        break
                    descriptor = _descriptor(located.path, opened, files)
                    reading.append((names[ahead], array, _read(pool, descriptor, located, array)))
                    ahead += 1
                if reading and reading[0][0] == name:
                    yield name, self._arrived(name, *reading.popleft()[1:])
                else:
                    yield name, self._weights.view(name)

    def _arrived(self, name: str, array: Any, reads: list[Future[None]]) -> torch.Tensor:
        wait(reads)
        for each in reads:
            each.result()
        located = self._weights.located(name)
        self.read_bytes += located.tensor.bytes
        return tensor_at(located, array, 0)


def _descriptor(path: Path, opened: dict[Path, int], files: ExitStack) -> int:
    if path not in opened:
        opened[path] = files.enter_context(path.open("rb", buffering=0)).fileno()
    return opened[path]


def _read(pool: ThreadPoolExecutor, descriptor: int, located: Located, array: Any) -> list[Future[None]]:
    chunks = range(0, len(array), CHUNK_BYTES)
    return [
        pool.submit(
            _fill, descriptor, located.path, array[start : start + CHUNK_BYTES], located.start + start
        )
        for start in chunks
    ]


def _fill(descriptor: int, path: Path, array: Any, offset: int) -> None:
    rest = memoryview(array)
    while rest:
        count = os.preadv(descriptor, [rest], offset)
        if count == 0:
            raise EOFError(f"{path} ends at {offset}")
        rest, offset = rest[count:], offset + count
