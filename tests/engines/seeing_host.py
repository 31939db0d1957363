"""A host program that says which GPUs it sees: in the file `seen` of its model's directory."""

import socket
import subprocess
import sys
from pathlib import Path

from inference_service.engines.base import HostSpec
from inference_service.hosts import fake

ASK = "import os; print(repr(os.environ.get('CUDA_VISIBLE_DEVICES')))"


def run(spec: HostSpec, listener: socket.socket) -> None:
    # A child's environment is the process's own, whatever Python's copy of it says.
    seen = subprocess.run([sys.executable, "-c", ASK], capture_output=True, text=True, check=True).stdout
    (Path(spec.directory) / "seen").write_text(seen)
    fake.run(spec, listener)
