"""A TCP proxy that caps the rate of each connection, like a single stream of a real object store.

    python -m benchmarks.capped_proxy UPSTREAM_PORT BYTES_PER_SECOND

Prints its port. The kernel paces (SO_MAX_PACING_RATE) and moves the bytes (splice), so that the proxy takes
no CPU time from what is measured. On SIGUSR1 it prints the number of connections that carried at least
BUSY_BYTES since the last signal.
"""

import os
import signal
import socket
import sys
import threading
from contextlib import suppress

SO_MAX_PACING_RATE = 47  # linux/socket.h; Python has no name for it
PIPE_BYTES = 1 << 20
BUSY_BYTES = 1 << 20

_carried: dict[int, int] = {}


def serve(upstream: int, rate: int) -> None:
    listener = socket.create_server(("127.0.0.1", 0), backlog=256)
    signal.signal(signal.SIGUSR1, lambda *_: _report())
    print(listener.getsockname()[1], flush=True)
    while True:
        client, _ = listener.accept()
        client.setsockopt(socket.SOL_SOCKET, SO_MAX_PACING_RATE, rate)
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        server = socket.create_connection(("127.0.0.1", upstream))
        for source, target in ((client, server), (server, client)):
            threading.Thread(target=_forward, args=(source, target), daemon=True).start()


def _forward(source: socket.socket, target: socket.socket) -> None:
    inlet, outlet = os.pipe()
    key = source.fileno()
    with suppress(OSError):
        while moved := os.splice(source.fileno(), outlet, PIPE_BYTES):
            _carried[key] = _carried.get(key, 0) + moved
            while moved:
                moved -= os.splice(inlet, target.fileno(), moved)
    with suppress(OSError):
        target.shutdown(socket.SHUT_WR)
    os.close(inlet)
    os.close(outlet)


def _report() -> None:
    print(sum(count >= BUSY_BYTES for count in _carried.values()), flush=True)
    _carried.clear()


if __name__ == "__main__":
    serve(int(sys.argv[1]), int(sys.argv[2]))
