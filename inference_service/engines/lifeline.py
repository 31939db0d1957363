"""The pipe whose only other end the service holds: however the service ends, its hosts end with it."""

import os
import signal
import threading


def end_group_with_service(lifeline: int) -> None:
    """Kill this host's group when the service is gone; the kernel closes its end of the pipe then."""

    def watch() -> None:
        os.read(lifeline, 1)
        os.killpg(0, signal.SIGKILL)

    threading.Thread(target=watch, name="lifeline", daemon=True).start()
