"""Work in a thread that can be interrupted: a chat template is the model's own program, and may never end."""

import asyncio
import ctypes
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Generic, TypeVar

Result = TypeVar("Result")

# Per model: its chat template's CPU time is taken from all of its requests.
AT_ONCE = asyncio.Semaphore(6)


class _BrokenOff(BaseException):
    """Raised in the thread, between two Python bytecodes."""


async def interruptible(work: Callable[[], Result], seconds: float) -> Result:
    """The result of `work`; raises TimeoutError after `seconds`. Cancellation interrupts the work, too."""
    async with AT_ONCE:
        breakable = _Breakable(work)
        # A dedicated thread: an interrupt that arrives too late cannot hit other work.
        threading.Thread(target=breakable.run, name="interruptible", daemon=True).start()
        try:
            async with asyncio.timeout(seconds):
                return await asyncio.wrap_future(breakable.outcome)
        finally:
            breakable.break_off()


class _Breakable(Generic[Result]):
    def __init__(self, work: Callable[[], Result]) -> None:
        self.outcome: Future[Result] = Future()
        self._work = work
        self._lock = threading.Lock()
        self._thread: int | None = None
        self._unwanted = False

    def run(self) -> None:
        if not self.outcome.set_running_or_notify_cancel():
            return
        try:
            with self._lock:
                if self._unwanted:
                    return
                self._thread = threading.get_ident()
            try:
                result = self._work()
            finally:
                with self._lock:
                    self._thread = None
            self.outcome.set_result(result)
        except _BrokenOff:
            pass
        except BaseException as error:
            self.outcome.set_exception(error)

    def break_off(self) -> None:
        with self._lock:
            self._unwanted = True
            if self._thread is not None:
                thread = ctypes.c_ulong(self._thread)
                ctypes.pythonapi.PyThreadState_SetAsyncExc(thread, ctypes.py_object(_BrokenOff))
