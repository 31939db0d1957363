"""A verified local directory of one revision of a model, as an engine is given it."""

from dataclasses import dataclass, field
from pathlib import Path

from inference_service.checkpoints.serving_config import Serving


@dataclass(frozen=True)
class Snapshot:
    """A verified local directory of one revision of a model, and how it wants to be served.

    `adapter_rank`: the highest rank of the LoRA adapters that its engine is to take; 0: none.
    """

    model: str
    revision: str
    path: Path
    bytes: int
    serving: Serving = field(default_factory=Serving)
    adapter_rank: int = 0
