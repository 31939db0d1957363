"""Streams at a concurrency, the same for this service and for vLLM's server."""

import asyncio
import json
from dataclasses import dataclass

from benchmarks.report import percentile
from benchmarks.sse_client import connect, http_request, now

INPUT_WORDS = 64


@dataclass(frozen=True)
class Rate:
    """Generated tokens a second, and the median of seconds to the first token."""

    tokens: float
    first_token: float


def rate(address: str, model: str, concurrency: int, requests: int, tokens: int) -> Rate:
    """`requests` streams of `tokens` tokens each, `concurrency` at a time."""
    return asyncio.run(_rate(address, model, concurrency, requests, tokens))


async def _rate(address: str, model: str, concurrency: int, requests: int, tokens: int) -> Rate:
    numbers = iter(range(requests))
    firsts: list[float] = []

    async def client() -> None:
        connection = await connect(address)
        for number in numbers:
            answer = await connection.ask(_request(model, tokens, number))
            if answer.status != 200 or not answer.whole:
                raise RuntimeError(
                    f"{model}: {answer.status} {b''.join(piece for _, piece in answer.pieces)[:300]!r}"
                )
            # Headers may come long before the first token.
            first = next(at for at, piece in answer.pieces if b"data:" in piece)
            firsts.append(first - answer.sent)
        connection.cut()

    started = now()
    await asyncio.gather(*(client() for _ in range(concurrency)))
    return Rate(requests * tokens / (now() - started), percentile(firsts, 0.5))


def _request(model: str, tokens: int, number: int) -> bytes:
    # Another beginning each time: no prefix is shared.
    prompt = f"{number} " + "word " * INPUT_WORDS
    body = {"model": model, "prompt": prompt, "max_tokens": tokens, "stream": True}
    return http_request(
        "POST", "/v1/completions", json.dumps(body | {"temperature": 0, "ignore_eos": True}).encode()
    )
