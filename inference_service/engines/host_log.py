"""Relays the output of a host or the launcher line by line to the service's log.

Keeps the last lines, so that the error of a host that dies during its load is known.
"""

import asyncio
import contextlib
import itertools
import logging
import os
import re
from collections import deque
from collections.abc import Callable

from inference_service.engines.base import PHASE_MARK

logger = logging.getLogger("inference_service.host")

MAX_LINE_BYTES = 16_384
KEPT_LINES = 400
MAX_ERROR_CHARACTERS = 600
# vLLM: `(EngineCore pid=7) ERROR 11-22 14:58:21 [core.py:1454] message`; uvicorn: `INFO:     message`.
_PREFIX = re.compile(
    r"^(?:\((?P<program>[\w ]+?) pid=\d+\) )?"
    r"(?:(?P<level>DEBUG|INFO|WARNING|ERROR|CRITICAL)(?::\s+| \d\d-\d\d [\d:]+ (?:\[[^\]]*\] )?))?"
)
_ERROR = re.compile(r"^(?:[\w.]+\.)?(?P<kind>\w*(?:Error|Exception|Interrupt|Exit))(?:: (?P<text>.*))?$")
# The last line of pydantic's messages.
_INPUT = re.compile(r" \[type=.*$")
# Reports only that another process of the host failed, whose own error is further up.
_SECONDARY = ("Engine core initialization failed", "EngineDeadError", "WorkerProc initialization")


class HostLog:
    """A pipe whose lines become log records with `model=name`.

    `writer` is the descriptor for the process; close it here once the process has its own copy. `entered` is
    called with each phase that the output names.
    """

    def __init__(self, model: str, entered: Callable[[str], None] = lambda phase: None) -> None:
        self.model = model
        self._entered = entered
        self._reader, self.writer = os.pipe()
        self._partial = b""
        self._lines: deque[str] = deque(maxlen=KEPT_LINES)

    def attach(self) -> None:
        os.set_blocking(self._reader, False)
        asyncio.get_running_loop().add_reader(self._reader, self._receive)

    def close_writer(self) -> None:
        if self.writer >= 0:
            os.close(self.writer)
            self.writer = -1

    def close(self) -> None:
        """Read what is left in the pipe, then close it; idempotent."""
        self.close_writer()
        if self._reader >= 0:
            self._receive()
        self._detach()

    def last_error(self) -> str | None:
        """The last error that the process printed, as `Kind: text`; the cause rather than its consequence."""
        lines = list(self._lines)
        errors = [found for at in range(len(lines)) if (found := _error_at(lines, at))]
        causes = [error for error in errors if not any(echo in error for echo in _SECONDARY)]
        return next(reversed(causes or errors), None)

    def _receive(self) -> None:
        while self._reader >= 0:
            try:
                received = os.read(self._reader, 65_536)
            except BlockingIOError:
                return
            if not received:
                self._detach()
                return
            *lines, self._partial = (self._partial + received).split(b"\n")
            for line in lines:
                self._take(line)
            if len(self._partial) > MAX_LINE_BYTES:
                self._take(self._partial)
                self._partial = b""

    def _detach(self) -> None:
        if self._reader < 0:
            return
        if self._partial:
            self._take(self._partial)
            self._partial = b""
        with contextlib.suppress(RuntimeError):  # no loop: the service ends before it has started
            asyncio.get_running_loop().remove_reader(self._reader)
        os.close(self._reader)
        self._reader = -1

    def _take(self, raw: bytes) -> None:
        # A progress bar rewrites its line with carriage returns; keep only its last state.
        line = raw[:MAX_LINE_BYTES].decode(errors="replace").rstrip("\r").rpartition("\r")[2].rstrip()
        if not line:
            return
        if line.startswith(PHASE_MARK):
            self._entered(line.removeprefix(PHASE_MARK))
            return
        prefix = _PREFIX.match(line)
        level, program, text = None, None, line
        if prefix is not None:
            level, program, text = prefix["level"], prefix["program"], line[prefix.end() :]
        self._lines.append(text)
        fields = {"model": self.model} | ({"program": program} if program else {})
        logger.log(logging.getLevelNamesMapping()[level or "INFO"], text, extra=fields)


def _error_at(lines: list[str], at: int) -> str | None:
    """The error whose first line is at index `at`, with the indented lines that continue it."""
    found = _ERROR.match(lines[at])
    if found is None:
        return None
    more = itertools.takewhile(lambda line: line.startswith("  "), lines[at + 1 :])
    text = " ".join([found["text"] or "", *(_INPUT.sub("", line).strip() for line in more)])
    return f"{found['kind']}: {text.strip()}"[:MAX_ERROR_CHARACTERS].removesuffix(": ")
