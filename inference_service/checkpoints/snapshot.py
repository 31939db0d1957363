"""A verified local copy of one revision of a model, as an engine loads it."""

from dataclasses import dataclass, field
from pathlib import Path

from inference_service.checkpoints.serving_config import Serving


@dataclass(frozen=True)
class Snapshot:
    """A verified local directory with one revision of a model, and its serving settings.

    `adapter_rank`: the highest rank of LoRA adapters that its engine must take; 0 for no adapters.
    `compiled`: the directory for what its engine compiles; None: that of all engines.
    """

    model: str
    revision: str
    path: Path
    bytes: int
    serving: Serving = field(default_factory=Serving)
    adapter_rank: int = 0
    compiled: Path | None = None
