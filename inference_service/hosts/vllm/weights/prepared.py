"""A snapshot's weights made ready for a swap, piece by piece, while the engine serves another model.

Each piece has a mapping of its own, so that no tensor lies in two locked ranges, which a copy cannot read
from at once. Larger tensors than a piece have several, and are put together on the device.
"""

import logging
import mmap
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch

from inference_service.hosts.vllm.weights.mapped import Located, MappedWeights, bytes_of, tensor_at
from inference_service.hosts.vllm.weights.page_lock import PageLock, PageLockRefused, populate

logger = logging.getLogger(__name__)

# No token waits longer than one piece takes to be locked: 21 ms on an H200.
PIECE_BYTES = 256 << 20
# Left on the device beside a tensor that is put together there.
SPARE_BYTES = 256 << 20


class Status(NamedTuple):
    """Bytes that are ready of those of the snapshot; `refused`: why the others will not be."""

    ready_bytes: int
    total_bytes: int
    done: bool
    refused: str | None


@dataclass
class _Piece:
    """Bytes `start` to `end` of a file with these tensors, or with a part of one."""

    path: Path
    start: int
    end: int
    names: list[str] = field(default_factory=list)
    mapped: mmap.mmap | None = None
    offset: int = 0
    address: int = 0

    @property
    def bytes(self) -> int:
        return self.end - self.start


class PreparedSnapshot:
    """The weights of one snapshot, made ready in a thread of its own from `start` on."""

    def __init__(self, weights: MappedWeights, lock: PageLock, piece_bytes: int = PIECE_BYTES) -> None:
        self._lock = lock
        self._weights = weights
        self._pieces = list(_pieces(weights, piece_bytes))
        self._ready: dict[str, list[_Piece]] = {}
        self._stopped = threading.Event()
        self._refused: str | None = None
        self._thread = threading.Thread(target=self._prepare, name="prepare-weights", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Lock no further piece; returns once the current one is done."""
        self._stopped.set()
        self._thread.join()

    def close(self) -> None:
        """Unlock all pieces. Views of them stay valid, as those of any mapped file."""
        self.stop()
        for piece in self._pieces:
            if piece.mapped is not None:
                self._lock.unlock(piece.address)
                piece.mapped = None
        self._ready.clear()

    @property
    def status(self) -> Status:
        ready = sum(piece.bytes for piece in list(self._pieces) if piece.mapped is not None)
        total = sum(piece.bytes for piece in self._pieces)
        return Status(ready, total, not self._thread.is_alive(), self._refused)

    def is_ready(self, name: str) -> bool:
        pieces = self._ready.get(name, [])
        return bool(pieces) and sum(piece.bytes for piece in pieces) >= self._weights.bytes([name])

    def view(self, name: str, device: torch.device) -> torch.Tensor | None:
        """The tensor, which is ready, in locked memory or put together on the device; None: no room there."""
        located, pieces = self._weights.located(name), self._ready[name]
        if len(pieces) == 1:
            return tensor_at(located, _mapping(pieces[0]), located.start - pieces[0].offset)
        return _put_together(located, pieces, device)

    def _prepare(self) -> None:
        try:
            for piece in self._pieces:
                if self._stopped.is_set():
                    return
                if not self._lock_piece(piece):
                    return
                for name in piece.names:
                    self._ready.setdefault(name, []).append(piece)
        except (OSError, ValueError) as error:
            self._refused = str(error)
            kind = "refused" if isinstance(error, PageLockRefused) else "failed"
            logger.warning("preparing weights %s; a swap reads the rest as usual: %s", kind, error)

    def _lock_piece(self, piece: _Piece) -> bool:
        offset = piece.start - piece.start % mmap.ALLOCATIONGRANULARITY
        with piece.path.open("rb") as file:
            mapped = mmap.mmap(
                file.fileno(),
                piece.end - offset,
                flags=mmap.MAP_SHARED,
                prot=mmap.PROT_READ,
                offset=offset,
            )
        address = bytes_of(mapped).data_ptr()
        if not populate(address, len(mapped), self._stopped.is_set):
            return False
        self._lock.lock(address, len(mapped))
        piece.offset, piece.address, piece.mapped = offset, address, mapped
        return True


def _pieces(weights: MappedWeights, piece_bytes: int) -> Iterator[_Piece]:
    piece: _Piece | None = None
    for name in weights.contents:
        located = weights.located(name)
        start, end = located.start, located.start + located.tensor.bytes
        if start == end:
            continue
        if end - start > piece_bytes:
            if piece is not None:
                yield piece
                piece = None
            for part in range(start, end, piece_bytes):
                yield _Piece(located.path, part, min(part + piece_bytes, end), [name])
            continue
        if piece is not None and (piece.path != located.path or end - piece.start > piece_bytes):
            yield piece
            piece = None
        piece = piece or _Piece(located.path, start, end)
        piece.end = end
        piece.names.append(name)
    if piece is not None:
        yield piece


def _mapping(piece: _Piece) -> mmap.mmap:
    if piece.mapped is None:
        raise ValueError("the piece is not mapped")
    return piece.mapped


def _put_together(located: Located, pieces: list[_Piece], device: torch.device) -> torch.Tensor | None:
    """Copy each piece for itself: a copy across the border of two locked ranges fails."""
    if device.type != "cuda" or torch.cuda.mem_get_info(device)[0] < located.tensor.bytes + SPARE_BYTES:
        return None
    whole = torch.empty(located.tensor.bytes, dtype=torch.uint8, device=device)
    for piece in pieces:
        source = bytes_of(_mapping(piece), piece.start - piece.offset, piece.bytes)
        begin = piece.start - located.start
        whole[begin : begin + piece.bytes].copy_(source, non_blocking=True)
    return whole.view(located.dtype).view(located.tensor.shape)
