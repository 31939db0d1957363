"""A checksum for each tensor of a snapshot, by which two snapshots are compared without reading them.

Pure. Taken when a file's bytes are verified, and kept beside the snapshot's manifest.
"""

import json
from collections.abc import Iterable, Mapping
from itertools import pairwise

# In the snapshot's directory.
TENSOR_CHECKSUMS = ".tensors.json"
# A tensor of at least SPLIT_BYTES is cut into parts, each with a crc32c of its own. Fine-tunes differ all
# over a tensor, so two tensors of different bytes have equal checksums once in 2^128 times, not in 2^32.
PARTS = 4
SPLIT_BYTES = 4 << 10
# Parts are no larger, so that several threads share a large tensor.
MAX_PART_BYTES = 16 << 20

# Checksums by tensor by file.
TensorChecksums = Mapping[str, Mapping[str, str]]


def parts(start: int, end: int) -> list[tuple[int, int]]:
    """The ranges of bytes of a tensor from `start` to `end` that have a crc32c each."""
    size = end - start
    count = 1 if size < SPLIT_BYTES else max(PARTS, -(-size // MAX_PART_BYTES))
    bounds = [start + size * number // count for number in range(count + 1)]
    return list(pairwise(bounds))


def joined(sums: Iterable[int]) -> str:
    """The checksum of a tensor from the crc32c of its parts: eight hex digits for each."""
    return "".join(f"{each:08x}" for each in sums)


def dump(checksums: TensorChecksums) -> bytes:
    return json.dumps(checksums, indent=1).encode()


def parse(content: bytes) -> TensorChecksums:
    """Empty if it is not readable: nothing is known of the tensors then."""
    try:
        found = json.loads(content)
        return {
            str(file): {str(name): str(checksum) for name, checksum in tensors.items()}
            for file, tensors in found.items()
        }
    except (ValueError, AttributeError, RecursionError):
        return {}
