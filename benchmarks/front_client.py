"""The client process of `benchmarks.front`: one job from stdin, one JSON object per line to stdout.

    {"job": "streams", ...} -> {"event": "open"}, {"event": "closing"}, {"result": {...}}

Between `open` and `closing` the load is steady; the reader samples the processes then.
"""

import asyncio
import gc
import itertools
import json
import sys
from collections.abc import Awaitable, Callable
from typing import Any

import uvloop

from benchmarks.report import percentile
from benchmarks.sse_client import (
    Answer,
    Connection,
    Stream,
    chat_request,
    connect,
    get_request,
    now,
    read_stream,
)

Result = dict[str, float]
# The rate at which streams are opened: their first requests are load too, and must not dominate.
STREAMS_A_SECOND = 400
# How much longer than planned a job of streams may take before it is aborted.
GRACE_SECONDS = 30.0
HEALTH_EVERY_SECONDS = 0.025


async def load(address: str, model: str, tokens: int, concurrency: int, seconds: float) -> Result:
    """Whole answers, as fast as possible over `concurrency` connections."""
    request, started = chat_request(model, tokens, stream=False), now()
    ends = started + 1 + seconds
    answers: list[Answer] = []

    async def ask() -> None:
        connection = await connect(address)
        while now() < ends:
            answers.append(await connection.ask(request))

    asking = [asyncio.create_task(ask()) for _ in range(concurrency)]
    await asyncio.sleep(1)
    tell("open")
    opened = now()
    await asyncio.sleep(ends - now())
    tell("closing")
    closing = now()
    await asyncio.gather(*asking)
    measured = [answer for answer in answers if opened <= answer.ended <= closing]
    return {
        "requests": len(measured),
        "seconds": closing - opened,
        "failed": sum(answer.status != 200 or not answer.whole for answer in answers),
        **_percentiles("latency", [answer.seconds for answer in measured]),
    }


async def pairs(address: str, direct: str, model: str, tokens: int, count: int) -> Result:
    """The same request to the service and to its host, one at a time, in alternating order."""
    request = chat_request(model, tokens, stream=False)
    through: list[float] = []
    plain: list[float] = []
    sides = [(await connect(address), through), (await connect(direct), plain)]
    for number in range(count + 20):
        for connection, seconds in sides if number % 2 else sides[::-1]:
            answer = await connection.ask(request)
            if answer.status != 200 or not answer.whole:
                raise RuntimeError(f"answered {answer.status}")
            if number >= 20:  # the first ones warm up both sides
                seconds.append(answer.seconds)
    over = [ours - theirs for ours, theirs in zip(through, plain, strict=True)]
    return {
        **_percentiles("through", through),
        **_percentiles("direct", plain),
        "paired_median_ms": 1e3 * percentile(over, 0.5),
    }


class _Crowd:
    """Concurrent streams: reports when all of them are open, and when the first one ends."""

    def __init__(self, size: int) -> None:
        self._left = size
        self.connections: list[Connection] = []
        self.opened = self.closing = float("inf")

    def began(self) -> None:
        self._left -= 1
        if self._left == 0:
            self.opened = now()
            tell("open")

    async def ask(self, address: str, request: bytes, at: float) -> Answer:
        await asyncio.sleep(at - now())
        try:
            connection = await connect(address, self.began)
        except OSError:
            return Answer(now())
        self.connections.append(connection)
        answer = await connection.ask(request)
        if self.closing == float("inf"):
            self.closing = now()
            tell("closing")
        connection.cut()
        return answer


async def streams(address: str, model: str, count: int, tokens: int, rate: float) -> Result:
    """`count` concurrent streams, each of `tokens` tokens at `rate`; the text of each is checked."""
    request, crowd, started = chat_request(model, tokens, stream=True), _Crowd(count), now()
    asking = [
        asyncio.create_task(crowd.ask(address, request, started + number / STREAMS_A_SECOND))
        for number in range(count)
    ]
    _, late = await asyncio.wait(asking, timeout=count / STREAMS_A_SECOND + tokens / rate + GRACE_SECONDS)
    if late:
        for connection in crowd.connections:
            connection.cut()
    found = [read_stream(answer, tokens) for answer in await asyncio.gather(*asking)]
    return _steady(found, 1 / rate, crowd.opened, crowd.closing)


def _steady(found: list[Stream], nominal: float, opened: float, closing: float) -> Result:
    gaps, lateness, chunks = [], [], 0
    for stream in found:
        # Lateness is relative to a stream's most punctual word.
        offset = min((at - number * nominal for number, at in enumerate(stream.times)), default=0.0)
        for number, (before, at) in enumerate(itertools.pairwise(stream.times), start=1):
            if opened <= before and at <= closing:
                gaps.append(at - before)
                lateness.append(at - number * nominal - offset)
                chunks += 1
    return {
        "chunks": chunks,
        "seconds": max(0.0, closing - opened),
        "wrong": sum(stream.wrong for stream in found),
        **_percentiles("gap", gaps),
        **_percentiles("lateness", lateness),
    }


async def overload(address: str, model: str, tokens: int, rate: float, seconds: float) -> Result:
    """`rate` requests per second, whatever the outcome, and /health at the same time."""
    request, started = chat_request(model, tokens, stream=True), now()
    answers: list[Answer] = []

    async def offer(number: int) -> None:
        await asyncio.sleep(started + number / rate - now())
        connection = await connect(address)
        answers.append(await connection.ask(request))
        connection.cut()

    offers = [asyncio.create_task(offer(number)) for number in range(int(rate * seconds))]
    probe = asyncio.create_task(_health(address, started + seconds))
    await asyncio.sleep(1)
    tell("open")
    health = await probe
    tell("closing")
    await asyncio.gather(*offers)
    refused = [answer for answer in answers if answer.status == 429]
    admitted = [answer for answer in answers if answer.status == 200]
    return {
        "offered": len(answers),
        "admitted": len(admitted),
        "refused": len(refused),
        "others": len(answers) - len(refused) - len(admitted),
        "without_retry_after": sum(b"\r\nretry-after: " not in answer.head.lower() for answer in refused),
        "wrong": sum(read_stream(answer, tokens).wrong for answer in admitted),
        **_percentiles("refusal", [answer.status_at - answer.sent for answer in refused]),
        **_percentiles("health", health),
    }


async def _health(address: str, until: float) -> list[float]:
    connection, request, seconds = await connect(address), get_request("/health"), []
    while now() < until:
        answer = await connection.ask(request)
        if answer.status != 200:
            raise RuntimeError(f"/health answered {answer.status}")
        seconds.append(answer.seconds)
        await asyncio.sleep(HEALTH_EVERY_SECONDS)
    return seconds


def _percentiles(name: str, seconds: list[float]) -> Result:
    """Milliseconds: `name_p50_ms` and so on."""
    return {
        f"{name}_p{share}_ms": 1e3 * percentile(seconds, share / 100) if seconds else float("inf")
        for share in (50, 95, 99)
    }


def tell(event: str) -> None:
    print(json.dumps({"event": event}), flush=True)


JOBS: dict[str, Callable[..., Awaitable[Result]]] = {
    "load": load,
    "pairs": pairs,
    "streams": streams,
    "overload": overload,
}


async def _do(job: str, parameters: dict[str, Any]) -> Result:
    return await JOBS[job](**parameters)


def main() -> None:
    given = json.loads(sys.stdin.readline())
    # A collection would pause the client; the process ends with its one job.
    gc.disable()
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        result = runner.run(_do(given.pop("job"), given))
    print(json.dumps({"result": result}), flush=True)


if __name__ == "__main__":
    main()
