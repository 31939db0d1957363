"""A pipe whose other end only the service holds: in whatever way the service ends, its hosts end with it."""

import os
import signal
import threading


def end_group_with_service(lifeline: int) -> None:
    """Kill this host's process group when the service is gone: the kernel closes its end of the pipe."""

    def watch() -> None:
        os.read(lifeline, 1)
        os.killpg(0, signal.SIGKILL)

    threading.Thread(target=watch, name="lifeline", daemon=True).start()
