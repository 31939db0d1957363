"""Work on the model outside the generating thread, in threads that end with the work.

Each thread that multiplies gets its own OpenMP pool, and keeps it. If the pools have more threads than the
machine has processors, libgomp's threads sleep between products instead of spinning, and every product waits
for them to wake up: half the speed (docs/engines.md).
"""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

Result = TypeVar("Result")


def apart(work: Callable[[], Result]) -> Result:
    """Run `work` in a thread of its own and return its result."""
    with ThreadPoolExecutor(1, thread_name_prefix="apart") as thread:
        return thread.submit(work).result()


async def apart_from_loop(work: Callable[[], Result]) -> Result:
    """The same without blocking the event loop."""
    thread = ThreadPoolExecutor(1, thread_name_prefix="apart")
    try:
        return await asyncio.get_running_loop().run_in_executor(thread, work)
    finally:
        # A cancelled caller does not wait for the thread, and neither does the loop.
        thread.shutdown(wait=False)
