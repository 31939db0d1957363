"""How a host reports the phase of its start: a line in its log, which the service filters out."""

import os

from inference_service.engines.base import PHASE_MARK


def enter_phase(name: str) -> None:
    """Report that this host's start has reached phase `name`."""
    # Bypasses Python's buffers, so that lines of other threads or of the forked engine core stay intact.
    os.write(1, f"{PHASE_MARK}{name}\n".encode())
