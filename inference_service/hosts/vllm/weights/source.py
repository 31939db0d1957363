"""Where a worker takes the weights of a swap from: what was prepared, else a ring, else the files."""

import logging
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from enum import StrEnum
from functools import cache
from pathlib import Path

import torch

from inference_service.hosts.vllm.weights.mapped import MappedWeights
from inference_service.hosts.vllm.weights.page_lock import PageLock, page_lock_for
from inference_service.hosts.vllm.weights.prepared import PIECE_BYTES, PreparedSnapshot, Status
from inference_service.hosts.vllm.weights.read_ahead import RING_BYTES, ReadAhead, Ring

logger = logging.getLogger(__name__)


class Way(StrEnum):
    """What a tensor is copied from, the fastest first."""

    PREPARED = "prepared"
    READ_AHEAD = "read_ahead"
    MAPPED = "mapped"


class WeightSource:
    """The prepared snapshots of one worker, and its ring. Used by the worker's main thread only."""

    def __init__(
        self,
        device: torch.device,
        *,
        page_lock: PageLock | None = None,
        ring: Ring | None = None,
        piece_bytes: int = PIECE_BYTES,
    ) -> None:
        self._device = device
        self._page_lock = page_lock or page_lock_for(device)
        self._ring = ring
        self._ring_refused = device.type != "cuda"
        self._piece_bytes = piece_bytes
        self._prepared: dict[Path, PreparedSnapshot] = {}

    def prepare(self, directory: Path, weights: MappedWeights) -> None:
        """Begin to make a snapshot ready; returns at once. What is ready stays so until `forget`."""
        prepared = self._prepared.get(directory)
        status = None if prepared is None else prepared.status
        if status is not None and (not status.done or status.ready_bytes == status.total_bytes):
            return
        self.forget(directory)
        self._prepared[directory] = PreparedSnapshot(weights, self._page_lock, self._piece_bytes)
        self._prepared[directory].start()

    def status(self, directory: Path) -> Status | None:
        """How far a snapshot is ready; None if it is not to be."""
        prepared = self._prepared.get(directory)
        return None if prepared is None else prepared.status

    def forget(self, directory: Path) -> None:
        """Begin to give it up; returns at once, so that no token waits for the driver."""
        prepared = self._prepared.pop(directory, None)
        if prepared is not None:
            threading.Thread(target=prepared.close, name="forget-weights", daemon=True).start()

    def tensors(
        self, directory: Path, weights: MappedWeights, names: Sequence[str], copied_from: Counter[Way]
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """The tensors in this order; adds their bytes to `copied_from`."""
        prepared = self._prepared.get(directory)
        if prepared is not None:
            prepared.stop()
        others = [name for name in names if prepared is None or not prepared.is_ready(name)]
        reading = self._read(weights, others, copied_from)
        missing = set(others)
        for name in names:
            if prepared is None or name in missing:
                yield next(reading)
                continue
            tensor = prepared.view(name, self._device)
            copied_from[Way.MAPPED if tensor is None else Way.PREPARED] += weights.bytes([name])
            yield name, weights.view(name) if tensor is None else tensor

    def _read(
        self, weights: MappedWeights, names: Sequence[str], copied_from: Counter[Way]
    ) -> Iterator[tuple[str, torch.Tensor]]:
        ring = self._ring_there() if names else None
        ahead = None if ring is None else ReadAhead(weights, ring)
        mapped = ((name, weights.view(name)) for name in names)
        read_before = 0
        for name, tensor in mapped if ahead is None else ahead.tensors(names):
            read = 0 if ahead is None else ahead.read_bytes - read_before
            read_before += read
            copied_from[Way.READ_AHEAD if read else Way.MAPPED] += weights.bytes([name])
            yield name, tensor

    def _ring_there(self) -> Ring | None:
        if self._ring is None and not self._ring_refused:
            try:
                self._ring = Ring(torch.empty(RING_BYTES, dtype=torch.uint8, pin_memory=True))
            except RuntimeError as error:
                self._ring_refused = True
                logger.warning("no page-locked memory for swaps, which read pageable memory: %s", error)
        return self._ring


@cache
def weight_source(device: torch.device) -> WeightSource:
    """That of the worker on this device, the only one of its process: fresh loads and swaps share a ring."""
    return WeightSource(device)
