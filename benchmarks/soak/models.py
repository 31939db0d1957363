"""The models, the fault of each, and the settings that make faults frequent."""

import itertools
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

RATE = 100.0
SLOTS = 2
RUNNING = 16
WAITING = 24
QUEUE_SECONDS = 5.0
LOAD_SECONDS = 6.0
REQUEST_SECONDS = 12.0
STALL_SECONDS = 3.0
# The service's load backoff after the first failed load of a model.
BACKOFF_SECONDS = 5.0
SETTINGS = {
    "ENGINE": "fake",
    "FAKE_TOKENS_PER_SECOND": f"{RATE:g}",
    "MAX_CACHED_MODELS": str(SLOTS),
    "MAX_CONCURRENT_REQUESTS": str(RUNNING),
    "MAX_QUEUED_REQUESTS": str(WAITING),
    "QUEUE_TIMEOUT": f"{QUEUE_SECONDS:g}",
    "LOAD_TIMEOUT": f"{LOAD_SECONDS:g}",
    "REQUEST_TIMEOUT": f"{REQUEST_SECONDS:g}",
    "ENGINE_STALL_TIMEOUT": f"{STALL_SECONDS:g}",
    "FAIRNESS_WAIT": "0.5",
    "MIN_RESIDENCY": "0.5",
    "COLD_START_GRACE": "0.7",
    "CATALOG_TTL": "1",
    "DRAIN_TIMEOUT": "2",
    "LOG_LEVEL": "INFO",
}
WEIGHTS_BYTES = 200_000


@dataclass(frozen=True)
class Part:
    """One model. `share`: relative frequency of requests; `lethal_from`: tokens that trigger its fault.

    `fault`: `dies`, `hangs`, `stalls`, or None if healthy; `broken`: it never starts.
    """

    name: str
    share: int
    script: dict[str, Any] = field(default_factory=dict)
    fault: str | None = None
    lethal_from: int | None = None
    broken: bool = False

    @property
    def canonical(self) -> str:
        return self.name.replace("/", "-")

    @property
    def stubborn(self) -> bool:
        return bool(self.script.get("ignore_sigterm"))

    @property
    def healthy(self) -> bool:
        return self.fault is None and not self.broken


MODELS = (
    Part("quick", 40),
    Part("acme/keeper", 20, {"start_seconds": 0.3}),
    Part("slow", 12, {"start_seconds": 1.2, "memory_mib": 8}),
    Part("stubborn", 3, {"ignore_sigterm": True}),
    Part("broken", 4, {"fail_start": "no such weights", "start_seconds": 0.2}, broken=True),
    Part("dies", 8, {"die_after": 12}, "dies", 12),
    Part("hangs", 3, {"hang_after": 12}, "hangs", 12),
    Part("stalls", 5, {"stall_after": 12}, "stalls", 12),
)
BY_NAME = {part.canonical: part for part in MODELS}
# Pinned and unpinned; while both are pinned, no other model can be loaded.
PINNED = ("acme-keeper", "quick")
UPLOADED = ("quick", "acme-keeper", "broken", "slow")


class Bucket:
    """A `file://` bucket. Files are replaced atomically, like the objects of a bucket."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._revisions = itertools.count(1)
        for part in MODELS:
            directory = self._directory(part)
            directory.mkdir(parents=True)
            (directory / "config.json").write_text(json.dumps({"fake": part.script}))
            (directory / "tokenizer.json").write_text("{}")
            self.upload(part)

    def upload(self, part: Part) -> None:
        """Upload a new revision, with other weights."""
        directory = self._directory(part)
        content = f"revision {next(self._revisions)} of {part.name} ".encode()
        unfinished = self.root / "unfinished"
        unfinished.write_bytes((content * (WEIGHTS_BYTES // len(content) + 1))[:WEIGHTS_BYTES])
        unfinished.replace(directory / "model.safetensors")

    def _directory(self, part: Part) -> Path:
        return self.root / "models" / part.name
