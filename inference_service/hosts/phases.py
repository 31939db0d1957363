"""How a host tells the service what its start is at: a line in its log, which the service takes out."""

import os

from inference_service.engines.base import PHASE_MARK


def enter_phase(name: str) -> None:
    """The start of this host is at `name` from now on."""
    # Past Python's buffers: a line that other threads or the forked engine core write stays whole.
    os.write(1, f"{PHASE_MARK}{name}\n".encode())
