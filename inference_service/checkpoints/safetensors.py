"""The header of a safetensors file: which tensors it holds, of which type and shape, without its bytes.

Format: 8 bytes little-endian length, then that many bytes of JSON, then the tensors' bytes
(https://github.com/huggingface/safetensors#format).
"""

import json
import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

LENGTH_BYTES = 8
# The library itself takes 100 MB; the header of a thousand experts is a few.
MAX_HEADER_BYTES = 16 << 20
MAX_DIMENSIONS = 16
MAX_NUMBER = 1 << 53
# Bits of one element.
_DTYPE_BITS = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 16),
    **dict.fromkeys(("U32", "I32", "F32"), 32),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 64),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    "F4": 4,
}


class BadHeader(ValueError):
    """The file is no whole safetensors file; says why."""


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
    """Length of the JSON from the file's first 8 bytes; `size` of the whole file. Raises BadHeader."""
    length = int.from_bytes(first[:LENGTH_BYTES], "little")
    if len(first) < LENGTH_BYTES or length > size - LENGTH_BYTES:
        raise BadHeader("it is no safetensors file, or it was cut off within its header")
    if length > MAX_HEADER_BYTES:
        raise BadHeader(f"its header of {length} bytes is longer than {MAX_HEADER_BYTES}")
    return length


def parse_header(header: bytes, size: int) -> dict[str, Tensor]:
    """Tensors by name; raises BadHeader where the bytes after the header are not exactly theirs."""
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
        raise ValueError("shapes and offsets are whole numbers")
    if len(tensor.shape) > MAX_DIMENSIONS:
        raise ValueError(f"a tensor has more than {MAX_DIMENSIONS} dimensions")
    # A type that is newer than this table is the engine's to judge.
    bits = _DTYPE_BITS.get(dtype)
    if bits is not None and tensor.elements * bits != tensor.bytes * 8:
        raise ValueError(f"a tensor of {tensor.elements} elements as {dtype} has not {tensor.bytes} bytes")
    return tensor


def _check_layout(tensors: dict[str, Tensor]) -> int:
    """The tensors follow on one another without gaps; where the last ends."""
    spans = sorted((tensor.start, tensor.end) for tensor in tensors.values())
    if spans and spans[0][0] != 0:
        raise BadHeader("its first tensor does not begin after the header")
    if any(end != start for (_, end), (start, _) in pairwise(spans)):
        raise BadHeader("its tensors overlap or leave gaps")
    return spans[-1][1] if spans else 0
