"""crc32c of files on the disk: of the whole file and of each of its tensors, in one pass of several threads.

A file is read in runs that threads take in turn; the checksums of neighbouring ranges are combined without
reading them again. Owns the threads.
"""

import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from functools import lru_cache

import google_crc32c

from inference_service.checkpoints import tensor_checksums
from inference_service.checkpoints.safetensors import (
    LENGTH_BYTES,
    BadHeader,
    header_bytes,
    parse_header,
)

SUFFIX = ".safetensors"
# google_crc32c releases the GIL for bytes of at least this size only.
READ_BYTES = 1 << 20
# What a thread takes at a time.
RUN_BYTES = 8 << 20
THREADS = min(8, os.cpu_count() or 1)

_threads = ThreadPoolExecutor(THREADS, thread_name_prefix="checksum")

_POLYNOMIAL = 0x82F63B78
_ONE = 1 << 31

Range = tuple[int, int]


@dataclass(frozen=True)
class FileChecksums:
    """crc32c of a whole file, and a checksum for each tensor if it is a safetensors file."""

    crc32c: int
    tensors: dict[str, str] = field(default_factory=dict)


def of_file(descriptor: int, name: str, size: int, check: Callable[[], None] | None = None) -> FileChecksums:
    """The checksums of an open file; raises OSError, and what `check` raises between two reads."""
    tensors = _tensors(descriptor, size) if name.endswith(SUFFIX) else {}
    sums = _of_ranges(descriptor, list(_ranges(tensors.values(), size)), check)
    whole, parts = 0, {}
    for (start, end), crc32c in sums.items():
        whole = combined(whole, crc32c, end - start)
    for tensor, (start, end) in tensors.items():
        parts[tensor] = tensor_checksums.joined(sums[part] for part in tensor_checksums.parts(start, end))
    return FileChecksums(whole, parts)


def of_range(descriptor: int, start: int, end: int, check: Callable[[], None] | None = None) -> int:
    """crc32c of the bytes `start` to `end` (exclusive), fewer if the file is shorter."""
    total = 0
    while start < end and (chunk := os.pread(descriptor, min(READ_BYTES, end - start), start)):
        if check is not None:
            check()
        total = google_crc32c.extend(total, chunk)
        start += len(chunk)
    return total


def combined(first: int, second: int, second_bytes: int) -> int:
    """crc32c of two ranges of bytes, one after the other, from the crc32c of each (zlib's crc32_combine)."""
    return _product(_shift(second_bytes), first) ^ second


def _tensors(descriptor: int, size: int) -> dict[str, Range]:
    """Where the tensors are in the file; none if its header does not say so."""
    try:
        length = header_bytes(os.pread(descriptor, LENGTH_BYTES, 0), size)
        header = parse_header(os.pread(descriptor, length, LENGTH_BYTES), size)
    except BadHeader:
        return {}
    data = LENGTH_BYTES + length
    ranges = [(data + tensor.start, data + tensor.end, name) for name, tensor in header.items()]
    return {name: (start, end) for start, end, name in sorted(ranges)}


def _ranges(tensors: Iterable[Range], size: int) -> Iterator[Range]:
    """Neighbouring ranges that make up the file: what is before the tensors, and each of their parts."""
    position = 0
    for start, end in tensors:
        if position < start:
            yield from tensor_checksums.parts(position, start)
        yield from tensor_checksums.parts(start, end)
        position = end
    if position < size:
        yield from tensor_checksums.parts(position, size)


def _of_ranges(descriptor: int, ranges: list[Range], check: Callable[[], None] | None) -> dict[Range, int]:
    def run(taken: list[Range]) -> list[int]:
        return [of_range(descriptor, start, end, check) for start, end in taken]

    runs = list(_runs(ranges))
    if len(runs) < 2:
        sums = [run(each) for each in runs]
    else:
        reading = [_threads.submit(run, each) for each in runs]
        wait(reading)  # also if one fails: none reads on after the file is closed
        sums = [each.result() for each in reading]
    return dict(zip(ranges, (each for found in sums for each in found), strict=True))


def _runs(ranges: list[Range]) -> Iterator[list[Range]]:
    run: list[Range] = []
    for each in ranges:
        run.append(each)
        if each[1] - run[0][0] >= RUN_BYTES:
            yield run
            run = []
    if run:
        yield run


def _product(first: int, second: int) -> int:
    """The product of two polynomials modulo that of crc32c, the lowest power in the highest bit."""
    product, bit = 0, _ONE
    while True:
        if first & bit:
            product ^= second
            if not first & (bit - 1):
                return product
        bit >>= 1
        second = second >> 1 ^ _POLYNOMIAL if second & 1 else second >> 1
        if not bit:
            return product


@lru_cache(maxsize=4096)
def _shift(count: int) -> int:
    """x^(8 * count): what shifts a checksum past `count` bytes."""
    power, square = _ONE, _ONE >> 8
    while count:
        if count & 1:
            power = _product(square, power)
        square = _product(square, square)
        count >>= 1
    return power
