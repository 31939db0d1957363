"""The header of a safetensors file: names, types and shapes of its tensors, without their data.

Format: 8 bytes little-endian length, then that many bytes of JSON, then the tensors' bytes
(https://github.com/huggingface/safetensors#format).
"""

import json
import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

LENGTH_BYTES = 8
# The library accepts 100 MB; the header of a model with a thousand experts takes a few MB.
MAX_HEADER_BYTES = 16 << 20
MAX_DIMENSIONS = 16
MAX_NUMBER = 1 << 53
# Bits per element.
_DTYPE_BITS = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 16),
    **dict.fromkeys(("U32", "I32", "F32"), 32),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 64),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    "F4": 4,
}


class BadHeader(ValueError):
    """Not a complete safetensors file; the message says why."""


@dataclass(frozen=True)
class Tensor:
    """One tensor as its header shows it."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        return self.end - self.start


def header_bytes(first: bytes, size: int) -> int:
    """Length of the JSON from the first 8 bytes of a file of `size` bytes; raises BadHeader."""
    length = int.from_bytes(first[:LENGTH_BYTES], "little")
    if len(first) < LENGTH_BYTES or length > size - LENGTH_BYTES:
        raise BadHeader("it is not a safetensors file, or it was cut off within its header")
    if length > MAX_HEADER_BYTES:
        raise BadHeader(f"its header has {length} bytes, more than the maximum of {MAX_HEADER_BYTES}")
    return length


def parse_header(header: bytes, size: int) -> dict[str, Tensor]:
    """Tensors by name; raises BadHeader if they do not exactly cover the bytes after the header."""
    try:
        content = json.loads(header)
        tensors = {name: _tensor(entry) for name, entry in content.items() if name != "__metadata__"}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise BadHeader(f"its header is not valid ({type(error).__name__}: {error})") from error
    end = _check_layout(tensors)
    missing = end - (size - LENGTH_BYTES - len(header))
    if missing > 0:
        raise BadHeader(f"it was cut off: {missing} bytes are missing")
    if missing < 0:
        raise BadHeader(f"it has {-missing} bytes that belong to no tensor")
    return tensors


def _tensor(entry: Any) -> Tensor:
    dtype, (start, end) = entry["dtype"], entry["data_offsets"]
    tensor = Tensor(dtype, tuple(entry["shape"]), start, end)
    numbers = (*tensor.shape, start, end)
    if not all(type(number) is int and 0 <= number < MAX_NUMBER for number in numbers):
        raise ValueError("shapes and offsets must be whole numbers")
    if len(tensor.shape) > MAX_DIMENSIONS:
        raise ValueError(f"a tensor has more than {MAX_DIMENSIONS} dimensions")
    # The engine decides on types that are newer than this table.
    bits = _DTYPE_BITS.get(dtype)
    if bits is not None and tensor.elements * bits != tensor.bytes * 8:
        raise ValueError(f"a tensor of {tensor.elements} {dtype} elements cannot have {tensor.bytes} bytes")
    return tensor


def _check_layout(tensors: dict[str, Tensor]) -> int:
    """Checks that the tensors are contiguous; returns where the last one ends."""
    spans = sorted((tensor.start, tensor.end) for tensor in tensors.values())
    if spans and spans[0][0] != 0:
        raise BadHeader("its first tensor does not begin after the header")
    if any(end != start for (_, end), (start, _) in pairwise(spans)):
        raise BadHeader("its tensors overlap or leave gaps")
    return spans[-1][1] if spans else 0
