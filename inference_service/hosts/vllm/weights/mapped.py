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
class Located:
    """A tensor in a file, from the byte `start` on."""

    path: Path
    start: int
    tensor: Tensor

    @property
    def dtype(self) -> torch.dtype:
        return _DTYPES[self.tensor.dtype]


class MappedWeights:
    """The tensors in `files` of the snapshot `directory`, by name, in the order of the files.

    Raises OSError, BadHeader, and ValueError for a tensor that is in two files or of a type that no swap has.
    """

    def __init__(self, directory: Path, files: Iterable[Path]) -> None:
        checksums = _checksums(directory)
        self.contents: dict[str, Content] = {}
        self._located: dict[str, Located] = {}
        self._files: dict[Path, mmap.mmap] = {}
        for path in files:
            self._files[path], data, tensors = _map(path)
            known = checksums.get(path.name, {})
            for name, tensor in sorted(tensors.items(), key=lambda item: item[1].start):
                if name in self._located:
                    raise ValueError(f"the tensor {name} is in two files, one of them {path.name}")
                if tensor.dtype not in _DTYPES:
                    raise ValueError(f"the tensor {name} has the type {tensor.dtype}, which is not swapped")
                self.contents[name] = Content(tensor.dtype, tensor.shape, known.get(name))
                self._located[name] = Located(path, data + tensor.start, tensor)

    def bytes(self, names: Iterable[str]) -> int:
        return sum(self._located[name].tensor.bytes for name in names)

    def located(self, name: str) -> Located:
        return self._located[name]

    def view(self, name: str) -> torch.Tensor:
        """The tensor, on the CPU: a view of the file, which stays mapped as long as the view exists."""
        located = self._located[name]
        return tensor_at(located, self._files[located.path], located.start)


def tensor_at(located: Located, memory: mmap.mmap | memoryview, offset: int) -> torch.Tensor:
    """The tensor as a view of `memory`, where it begins at `offset`."""
    count, dtype = located.tensor.bytes, located.dtype
    if offset % dtype.itemsize:
        # The file's header has an odd length: a view cannot be read as this type.
        flat = bytes_of(memory, offset, count).clone().view(dtype)
    else:
        flat = bytes_of(memory, offset, count).view(dtype)
    return flat.view(located.tensor.shape)


def bytes_of(memory: mmap.mmap | memoryview, offset: int = 0, count: int = -1) -> torch.Tensor:
    """A view of bytes, which keeps the memory."""
    if count == 0:
        return torch.empty(0, dtype=torch.uint8)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that it must not be written to
        return torch.frombuffer(memory, dtype=torch.uint8, offset=offset, count=count)


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
