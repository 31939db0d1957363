"""A host program with a child of its own that does not end with it."""

import os
import signal
import socket

from inference_service.engines.base import HostSpec
from inference_service.hosts import fake


def run(spec: HostSpec, listener: socket.socket) -> None:
    if os.fork() == 0:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        listener.close()
        while True:
            signal.pause()
    fake.run(spec, listener)
