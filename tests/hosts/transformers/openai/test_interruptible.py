"""Work that does not end by itself."""

import asyncio
import threading
import time

import pytest

from inference_service.hosts.transformers.openai.interruptible import interruptible


def loop_for_ever() -> None:
    while True:
        pass


def threads() -> int:
    return sum(thread.name == "interruptible" for thread in threading.enumerate())


async def none_left() -> None:
    for _ in range(1000):
        if threads() == 0:
            return
        await asyncio.sleep(0.02)
    raise AssertionError("a thread goes on")


async def test_what_ends_brings_its_result_or_its_error() -> None:
    assert await interruptible(lambda: 7, 5) == 7
    with pytest.raises(ZeroDivisionError):
        await interruptible(lambda: 1 // 0, 5)
    await none_left()


async def test_what_does_not_end_is_broken_off_in_time() -> None:
    started = time.monotonic()
    results = await asyncio.gather(
        *(interruptible(loop_for_ever, 0.3) for _ in range(3)), return_exceptions=True
    )
    assert [type(result) for result in results] == [TimeoutError] * 3
    await none_left()
    assert time.monotonic() - started < 30


async def test_who_leaves_ends_it() -> None:
    working = asyncio.ensure_future(interruptible(loop_for_ever, 60))
    await asyncio.sleep(0.2)
    assert threads() == 1
    working.cancel()
    with pytest.raises(asyncio.CancelledError):
        await working
    await none_left()
    assert await interruptible(lambda: 7, 5) == 7
