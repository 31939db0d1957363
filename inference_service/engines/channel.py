"""The socket between the service and its launcher: whole messages in both directions, some with descriptors.

A stream of one JSON object per line, because macOS has no SOCK_SEQPACKET.
"""

import collections
import json
import os
import select
import socket
from collections.abc import Sequence
from typing import Any, Self

READ_BYTES = 1 << 16
# The default on macOS is 8 KiB, which is less than one message may need.
BUFFER_BYTES = 1 << 18
MAX_DESCRIPTORS = 32
# For the rest of a message that was sent in part.
FINISH_SECONDS = 1.0


class Channel:
    """One end. It blocks or not as its socket does."""

    def __init__(self, end: socket.socket) -> None:
        self._end = end
        self._partial = b""
        self._descriptors: collections.deque[int] = collections.deque()
        for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
            end.setsockopt(socket.SOL_SOCKET, option, BUFFER_BYTES)

    @classmethod
    def pair(cls) -> tuple[Self, socket.socket]:
        """This process's end, and the socket for the other process's."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        return cls(ours), theirs

    def fileno(self) -> int:
        """-1 once closed."""
        return self._end.fileno()

    def setblocking(self, blocking: bool) -> None:
        self._end.setblocking(blocking)

    def close(self) -> None:
        self._end.close()

    def close_in_fork(self) -> None:
        """Close this process's copy, and descriptors that were not taken; the connection stays open."""
        for descriptor in (*self._descriptors, self._end.detach()):
            os.close(descriptor)

    def send(self, message: dict[str, Any], descriptors: Sequence[int] = ()) -> None:
        """Raises BlockingIOError if the other end does not read, ConnectionError if it is gone."""
        line = json.dumps(message).encode() + b"\n"
        sent = socket.send_fds(self._end, [line], list(descriptors)) if descriptors else self._end.send(line)
        while sent < len(line):
            _, writable, _ = select.select([], [self._end], [], FINISH_SECONDS)
            if not writable:
                # Half a message was sent: the other end could not parse what follows.
                self._end.shutdown(socket.SHUT_RDWR)
                raise ConnectionResetError("the other end has stopped reading")
            sent += self._end.send(line[sent:])

    def receive(self) -> list[dict[str, Any]] | None:
        """The messages that have arrived, possibly none yet; None at the end of the stream.

        Raises BlockingIOError if nothing has arrived.
        """
        received, descriptors, _, _ = socket.recv_fds(self._end, READ_BYTES, MAX_DESCRIPTORS)
        self._descriptors.extend(descriptors)
        if not received:
            return None
        *lines, self._partial = (self._partial + received).split(b"\n")
        return [json.loads(line) for line in lines]

    def descriptors(self, count: int) -> list[int]:
        """The descriptors of the current message, in order; the caller closes them."""
        return [self._descriptors.popleft() for _ in range(count)]
