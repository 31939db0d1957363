"""One request: what is sent, how its client behaves, and the outcome."""

import asyncio
import json
import socket
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from benchmarks.soak.models import REQUEST_SECONDS, Part
from benchmarks.sse_client import (
    CHAT,
    Answer,
    Connection,
    events,
    expected_words,
    http_request,
    now,
    payloads,
)

TEXT = "/v1/completions"
# REQUEST_TIMEOUT and a margin for the last word: no client may have to wait longer.
PATIENCE_SECONDS = REQUEST_SECONDS + 8.0
DEAF_BUFFER_BYTES = 4096


class Manner(StrEnum):
    """How a client behaves. `LEAVES_AT_WORDS`: it disconnects at the first content of the answer."""

    STAYS = "stays"
    LEAVES = "leaves"
    LEAVES_AT_WORDS = "leaves at words"
    DEAF = "deaf"


@dataclass(frozen=True)
class Ask:
    """A request for `model`, the canonical name of `part` (None if there is no such model).

    `refusal`: status and code that must be returned in any case. `certain`: no error may be returned.
    `seconds`: how long a client that disconnects stays.
    """

    path: str
    body: bytes
    model: str
    tokens: int = 0
    stream: bool = False
    part: Part | None = None
    manner: Manner = Manner.STAYS
    seconds: float = PATIENCE_SECONDS
    refusal: tuple[int, str] | None = None
    certain: bool = False
    method: str = "POST"

    @property
    def lethal(self) -> bool:
        """Whether it triggers the fault of its model."""
        start = None if self.part is None else self.part.lethal_from
        return start is not None and self.tokens >= start


@dataclass
class Outcome:
    """The outcome of a request. `status` 0: no answer; `code`, `message`: of the error, in head or stream.

    `load`: the number of requests in flight when it was sent. `wrong`: why the answer is invalid.
    """

    ask: Ask
    sent: float
    ended: float
    load: int
    status: int = 0
    code: str | None = None
    message: str = ""
    words: int = 0
    comments: int = 0
    left: bool = False
    retry_after: bool = False
    wrong: str | None = None

    @property
    def seconds(self) -> float:
        return self.ended - self.sent


def generation(part: Part, tokens: int, *, stream: bool, chat: bool, **manner: Any) -> Ask:
    """A request for `tokens` words of a model."""
    said: dict[str, Any] = {"messages": [{"role": "user", "content": "Tell"}]} if chat else {"prompt": "Tell"}
    body = {"model": part.name, "max_tokens": tokens, "stream": stream, **said}
    path = CHAT if chat else TEXT
    return Ask(path, json.dumps(body).encode(), part.canonical, tokens, stream, part, **manner)


async def ask(address: str, request: Ask, load: int) -> Outcome:
    """Send it, behave as its client does, and read the answer."""
    sent = now()
    words = asyncio.Event()
    connection = await _connect(address, words.set, deaf=request.manner is Manner.DEAF)
    answering = asyncio.create_task(connection.ask(http_request(request.method, request.path, request.body)))
    try:
        left = await _behave(request, connection, answering, words)
    finally:
        connection.cut()
    answer = await answering
    outcome = Outcome(request, sent, now(), load, answer.status, left=left)
    _read(answer, outcome)
    return outcome


async def _connect(address: str, began: Callable[[], None], *, deaf: bool) -> Connection:
    host, _, port = address.rpartition(":")
    opened = socket.socket()
    opened.setblocking(False)
    if deaf:  # the service notices after little data in flight
        opened.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, DEAF_BUFFER_BYTES)
    loop = asyncio.get_running_loop()
    try:
        await loop.sock_connect(opened, (host, int(port)))
        return (await loop.create_connection(lambda: Connection(began), sock=opened))[1]
    except BaseException:
        opened.close()
        raise


async def _behave(
    request: Ask, connection: Connection, answering: asyncio.Task[Answer], words: asyncio.Event
) -> bool:
    """Whether the client left before the end of the answer. Running into a timeout does not count."""
    if request.manner is Manner.LEAVES_AT_WORDS:
        waiting = asyncio.create_task(words.wait())
        await asyncio.wait({answering, waiting}, timeout=request.seconds, return_when="FIRST_COMPLETED")
        waiting.cancel()
        return not answering.done()
    if request.manner is Manner.DEAF:
        await asyncio.sleep(0)  # the request is sent
        connection.turn_deaf()
    await asyncio.wait({answering}, timeout=request.seconds)
    return not answering.done() and request.manner is not Manner.STAYS


def _read(answer: Answer, outcome: Outcome) -> None:
    outcome.retry_after = b"\r\nretry-after:" in answer.head.lower()
    if not answer.whole and not outcome.left:
        outcome.wrong = f"the answer was incomplete after {outcome.seconds:.1f} s"
    content = [piece for _, piece in answer.pieces]
    if answer.status == 200 and outcome.ask.stream:
        _read_stream(answer, outcome)
    elif answer.whole:
        _read_whole(b"".join(content), outcome)


def _read_whole(content: bytes, outcome: Outcome) -> None:
    try:
        answer = json.loads(content)
        if outcome.status >= 400:
            outcome.code, outcome.message = answer["error"]["code"], answer["error"]["message"]
            return
        if outcome.ask.part is None or not outcome.ask.tokens:
            return
        choice = answer["choices"][0]
        text = choice["message"]["content"] if outcome.ask.path == CHAT else choice["text"]
        used = answer["usage"]["completion_tokens"]
    except (ValueError, KeyError, TypeError, IndexError):
        outcome.wrong = f"an invalid answer: {content[:300]!r}"
        return
    outcome.words = len(text.split())
    if text != "".join(expected_words(outcome.ask.tokens)) or used != outcome.ask.tokens:
        outcome.wrong = f"a wrong text of {outcome.words} words, usage says {used}: {text[:200]!r}"


def _read_stream(answer: Answer, outcome: Outcome) -> None:
    expected = expected_words(outcome.ask.tokens)
    done = False
    for _, event in events(payloads(answer.pieces)):
        if done or outcome.code is not None:
            outcome.wrong = f"the stream continued after its end: {event[:200]!r}"
        elif event.startswith(b":"):
            outcome.comments += 1
        elif event == b"data: [DONE]":
            done = True
        else:
            _take(json.loads(event.removeprefix(b"data: ")), outcome, expected)
        if outcome.wrong is not None:
            return
    ended = done or outcome.code is not None
    if not ended and not outcome.left:
        outcome.wrong = f"a stream without an end after {outcome.words} words"
    if done and outcome.words != len(expected):
        outcome.wrong = f"[DONE] after {outcome.words} words"


def _take(event: dict[str, Any], outcome: Outcome, expected: list[str]) -> None:
    """One event of a stream: an error, or the next word."""
    if "error" in event:
        outcome.code, outcome.message = event["error"]["code"], event["error"]["message"]
        return
    choice = event["choices"][0]
    word = choice["delta"].get("content") if outcome.ask.path == CHAT else choice["text"]
    if not word:
        return
    if outcome.words >= len(expected) or word != expected[outcome.words]:
        outcome.wrong = f"word {outcome.words + 1} of the stream is {word!r}"
    outcome.words += 1
