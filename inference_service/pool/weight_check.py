"""The weight check: whether an engine holds the right weights, judged by what they compute.

After every load and swap the host runs a fixed prompt. The most likely tokens must equal those of the
revision's first fresh load, and differ from those of the weights before.
"""

import asyncio
import json
import math
import os
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

from inference_service.checkpoints.snapshot import Snapshot
from inference_service.engines.base import Fingerprint
from inference_service.storage.snapshots.layout import Manifest

FILE = ".weight_check.json"
# Log probabilities of one model differ by rounding between kernels, batches and adapters' slots.
TOLERANCE = 0.1
# Equally likely tokens may swap places at the end of the list.
SHARED = 0.75


def implausible(
    found: Fingerprint, first: Fingerprint | None, before: Fingerprint | None, *, same_weights: bool
) -> str | None:
    """Why the weights cannot be the right ones; None if they may be.

    `first`: of the revision's first fresh load; `before`: of the weights that were in the engine before;
    None: unknown.
    """
    if not found.top:
        return "the weight check returned no token"
    if before is not None and not same_weights and found == before:
        return "the weight check's logits are still those of the weights before"
    if first is not None and not alike(found, first):
        return "the weight check's logits differ from those of the revision's first load"
    return None


def alike(found: Fingerprint, other: Fingerprint) -> bool:
    """Whether both are of the same weights, but for rounding."""
    known = dict(other.top)
    shared = [(logprob, known[token]) for token, logprob in found.top if token in known]
    enough = len(shared) >= SHARED * max(len(found.top), len(other.top))
    return enough and all(abs(one - two) <= TOLERANCE for one, two in shared)


def same_weights(one: Snapshot, other: Snapshot) -> bool:
    """Whether two snapshots hold the same weights, byte for byte."""
    sums = _weights(one.path)
    return bool(sums) and sums == _weights(other.path)


def _weights(snapshot: Path) -> dict[str, int]:
    manifest = Manifest.read(snapshot)
    files = {} if manifest is None else manifest.files
    return {name: record.crc32c for name, record in files.items() if name.endswith(".safetensors")}


class WeightChecks:
    """Fingerprints stored beside their snapshots, each for one way to compute (`conditions`).

    The files are read and written in threads.
    """

    def __init__(self, conditions: str) -> None:
        self._conditions = conditions

    async def of_swap(self, before: Snapshot | None, after: Snapshot) -> tuple[Fingerprint | None, bool]:
        """The fingerprint of the first fresh load of `after`, and whether both hold the same weights."""
        return await asyncio.to_thread(self._of_swap, before, after)

    async def of_load(self, snapshot: Snapshot, found: Fingerprint) -> Fingerprint | None:
        """Store the fingerprint of a fresh load; returns the one that was stored before, if any."""
        return await asyncio.to_thread(self._of_load, snapshot, found)

    def _of_swap(self, before: Snapshot | None, after: Snapshot) -> tuple[Fingerprint | None, bool]:
        return self._first(after), before is not None and same_weights(before, after)

    def _of_load(self, snapshot: Snapshot, found: Fingerprint) -> Fingerprint | None:
        first = self._first(snapshot)
        self._store(snapshot, found)
        return first

    def _first(self, snapshot: Snapshot) -> Fingerprint | None:
        found: Any = _read(snapshot.path / FILE).get(self._conditions)
        try:
            top = tuple((int(token), float(logprob)) for token, logprob in found)
        except (TypeError, ValueError, OverflowError):
            return None
        return Fingerprint(top) if all(math.isfinite(logprob) for _, logprob in top) else None

    def _store(self, snapshot: Snapshot, fingerprint: Fingerprint) -> None:
        """A full disk must not fail a load."""
        content = _read(snapshot.path / FILE) | {self._conditions: fingerprint.top}
        with suppress(OSError):
            descriptor, name = tempfile.mkstemp(dir=snapshot.path, prefix=FILE)
            try:
                with os.fdopen(descriptor, "w") as file:
                    json.dump(content, file)
                Path(name).replace(snapshot.path / FILE)
            except OSError:
                Path(name).unlink()


def _read(file: Path) -> dict[str, object]:
    try:
        content = json.loads(file.read_text())
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}
