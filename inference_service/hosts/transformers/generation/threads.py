"""Work on the model beside the thread that generates, in threads that end with it.

Each thread that multiplies gets a pool of OpenMP's own, and keeps it. Where the pools have more threads than
the machine has processors, libgomp's sleep between two products instead of waiting awake, and every product
waits for them to rise: half of the speed (docs/engines.md).
"""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

Result = TypeVar("Result")


def apart(work: Callable[[], Result]) -> Result:
    """What `work` returns, from a thread of its own."""
    with ThreadPoolExecutor(1, thread_name_prefix="apart") as thread:
        return thread.submit(work).result()


async def apart_from_loop(work: Callable[[], Result]) -> Result:
    """The same, with the event loop going on meanwhile."""
    thread = ThreadPoolExecutor(1, thread_name_prefix="apart")
    try:
        return await asyncio.get_running_loop().run_in_executor(thread, work)
    finally:
        # Who is cancelled does not wait for it, and neither does the loop.
        thread.shutdown(wait=False)
