"""What this project adds to vLLM's workers (`--worker-extension-cls`).

vLLM's engine core outlives a parent that was killed (SIGKILL of the host), with all its memory. This
module is imported in every process that holds a worker and ends it with its parent.
"""

import multiprocessing
import multiprocessing.connection
import os
import threading


class WorkerExtension:
    """Mixed into vLLM's worker class."""


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is None:
        return

    def watch() -> None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, name="parent-watchdog", daemon=True).start()


_end_with_parent()
