"""A snapshot's weights, mapped: each tensor is a view of its file, and is read when it is used."""

import mmap
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from inference_service.checkpoints.safetensors import LENGTH_BYTES, Tensor, header_bytes, parse_header
from inference_service.checkpoints.tensor_checksums import TENSOR_CHECKSUMS, parse

# Those of models whose weights can be swapped (checkpoints/swap_key.py).
_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class Content(NamedTuple):
    """What makes a tensor equal to another's; `checksum` is None if none was taken."""

    dtype: str
    shape: tuple[int, ...]
    checksum: str | None


@dataclass(frozen=True)
class _Mapped:
    """A tensor in a mapped file."""

    file: mmap.mmap
    start: int
    tensor: Tensor


class MappedWeights:
    """The tensors in `files` of the snapshot `directory`, by name, in the order of the files.

    Raises OSError, BadHeader, and ValueError for a tensor that is in two files.
    """

    def __init__(self, directory: Path, files: Iterable[Path]) -> None:
        checksums = _checksums(directory)
        self.contents: dict[str, Content] = {}
        self._tensors: dict[str, _Mapped] = {}
        for path in files:
            mapped, data, tensors = _map(path)
            known = checksums.get(path.name, {})
            for name, tensor in sorted(tensors.items(), key=lambda item: item[1].start):
                if name in self._tensors:
                    raise ValueError(f"the tensor {name} is in two files, one of them {path.name}")
                self.contents[name] = Content(tensor.dtype, tensor.shape, known.get(name))
                self._tensors[name] = _Mapped(mapped, data + tensor.start, tensor)

    def bytes(self, names: Iterable[str]) -> int:
        return sum(self._tensors[name].tensor.bytes for name in names)

    def view(self, name: str) -> torch.Tensor:
        """The tensor, on the CPU: a view of the file, which stays mapped as long as the view exists."""
        mapped = self._tensors[name]
        tensor, dtype = mapped.tensor, _DTYPES[mapped.tensor.dtype]
        if tensor.bytes == 0:
            return torch.empty(tensor.shape, dtype=dtype)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # that it must not be written to
            if mapped.start % dtype.itemsize:
                # The file's header has an odd length: such a view cannot be read as this type.
                content = mapped.file[mapped.start : mapped.start + tensor.bytes]
                return torch.frombuffer(bytearray(content), dtype=dtype).view(tensor.shape)
            flat = torch.frombuffer(mapped.file, dtype=dtype, count=tensor.elements, offset=mapped.start)
        return flat.view(tensor.shape)


def _map(path: Path) -> tuple[mmap.mmap, int, dict[str, Tensor]]:
    """The mapped file, where its tensors begin, and the tensors by name."""
    with path.open("rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ)
    length = header_bytes(mapped[:LENGTH_BYTES], len(mapped))
    data = LENGTH_BYTES + length
    return mapped, data, parse_header(mapped[LENGTH_BYTES:data], len(mapped))


def _checksums(directory: Path) -> dict[str, dict[str, str]]:
    try:
        found = parse((directory / TENSOR_CHECKSUMS).read_bytes())
    except OSError:
        return {}
    return {file: dict(tensors) for file, tensors in found.items()}
