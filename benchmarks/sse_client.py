"""A client with minimal overhead: raw HTTP/1.1 on asyncio.

It shares the machine with what it measures, so it only records the received bytes with their times. They are
parsed and compared after the load has ended.
"""

import asyncio
import itertools
import json
import re
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import cast

from pydantic_core import from_json

now = time.perf_counter
CHAT = "/v1/chat/completions"
_WORDS = ("the", "quick", "brown", "fox", "jumps", "over", "the", "lazy", "dog")
_HEAD_END = b"\r\n\r\n"
_LAST_CHUNK = b"0\r\n\r\n"
_LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)


def chat_request(model: str, tokens: int, *, stream: bool) -> bytes:
    messages = [{"role": "user", "content": "Tell me of the fox."}]
    body = {"model": model, "messages": messages, "max_tokens": tokens, "stream": stream}
    return http_request("POST", CHAT, json.dumps(body).encode())


def get_request(path: str) -> bytes:
    return http_request("GET", path, b"")


def http_request(method: str, path: str, body: bytes) -> bytes:
    head = f"{method} {path} HTTP/1.1\r\nhost: localhost\r\ncontent-length: {len(body)}\r\n"
    return f"{head}content-type: application/json\r\n\r\n".encode() + body


@dataclass(slots=True)
class Answer:
    """One response as received. Times are `now()`. `whole`: it is complete."""

    sent: float
    status: int = 0
    status_at: float = 0.0
    head: bytes = b""
    pieces: list[tuple[float, bytes]] = field(default_factory=list)
    ended: float = 0.0
    whole: bool = False

    @property
    def seconds(self) -> float:
        return self.ended - self.sent


class Connection(asyncio.Protocol):
    """One connection, with one request at a time. `began` is called at each response's first content."""

    def __init__(self, began: Callable[[], None] | None = None) -> None:
        self._began = began
        self._transport: asyncio.Transport | None = None
        self._answer = Answer(0.0)
        self._ended: asyncio.Future[Answer] | None = None
        self._left: int | None = None
        self._tail = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # Not isinstance: uvloop's transports do not inherit from asyncio's.
        self._transport = cast(asyncio.Transport, transport)

    async def ask(self, request: bytes) -> Answer:
        """The answer; incomplete if the connection was closed early."""
        self._ended = asyncio.get_running_loop().create_future()
        self._left, self._tail = None, b""
        self._answer = Answer(now())
        if self._transport is None or self._transport.is_closing():
            return self._answer
        self._transport.write(request)
        return await self._ended

    def data_received(self, data: bytes) -> None:
        answer = self._answer
        arrived = now()
        if not answer.pieces:
            if not answer.status:
                answer.status, answer.status_at = int(data[9:12]), arrived
            head, found, data = (answer.head + data).partition(_HEAD_END)
            answer.head = head
            if not found:
                return
            answer.head += _HEAD_END
            length = _LENGTH.search(head)
            self._left = None if length is None else int(length[1])
            if self._began is not None:
                self._began()
        answer.pieces.append((arrived, data))
        if self._left is not None:
            self._left -= len(data)
            if self._left <= 0:
                self._end(arrived, whole=True)
            return
        self._tail = (self._tail + data)[-len(_LAST_CHUNK) :]
        if self._tail == _LAST_CHUNK:
            self._end(arrived, whole=True)

    def connection_lost(self, error: Exception | None) -> None:
        self._end(now(), whole=False)

    def turn_deaf(self) -> None:
        """Stop reading."""
        if self._transport is not None:
            self._transport.pause_reading()

    def cut(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    def _end(self, at: float, *, whole: bool) -> None:
        if self._ended is not None and not self._ended.done():
            self._answer.ended, self._answer.whole = at, whole
            self._ended.set_result(self._answer)


async def connect(address: str, began: Callable[[], None] | None = None) -> Connection:
    """`address` is host:port, or the path of a unix socket."""
    loop = asyncio.get_running_loop()
    if address.startswith("/"):
        return (await loop.create_unix_connection(lambda: Connection(began), address))[1]
    host, _, port = address.rpartition(":")
    return (await loop.create_connection(lambda: Connection(began), host, int(port)))[1]


@dataclass(frozen=True)
class Stream:
    """When each word of a stream arrived, and the number of words lost, repeated or altered."""

    times: list[float]
    wrong: int


def read_stream(answer: Answer, tokens: int) -> Stream:
    """Compare the stream with the fake engine's text, word by word, up to its [DONE]."""
    times, words, done = [], [], False
    if answer.status == 200:
        for arrived, event in events(payloads(answer.pieces)):
            if event == b"data: [DONE]":
                done = True
                continue
            choices = from_json(event.removeprefix(b"data: "))["choices"]
            if choices and (word := choices[0]["delta"].get("content")):
                times.append(arrived)
                words.append(word)
    wrong = sum(got != due for got, due in itertools.zip_longest(words, expected_words(tokens)))
    return Stream(times, wrong if done and answer.whole else max(1, wrong))


def expected_words(tokens: int) -> list[str]:
    first, *others = itertools.islice(itertools.cycle(_WORDS), tokens)
    return [first, *(f" {word}" for word in others)]


def payloads(pieces: Iterable[tuple[float, bytes]]) -> Iterator[tuple[float, bytes]]:
    """The contents of all complete chunks of the transfer encoding."""
    buffer = b""
    for arrived, piece in pieces:
        buffer += piece
        while (line := buffer.find(b"\r\n")) > 0:
            size = int(buffer[:line], 16)
            end = line + 2 + size
            if len(buffer) < end + 2:
                break
            yield arrived, buffer[line + 2 : end]
            buffer = buffer[end + 2 :]


def events(contents: Iterable[tuple[float, bytes]]) -> Iterator[tuple[float, bytes]]:
    """The complete server-sent events of a stream, each with the time of its end."""
    rest = b""
    for arrived, payload in contents:
        *events, rest = (rest + payload).split(b"\n\n")
        for event in events:
            yield arrived, event
