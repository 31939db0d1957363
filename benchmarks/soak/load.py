"""The load: clients of every kind, in rounds, each followed by a lull."""

import asyncio
import json
import random
from collections.abc import Iterator

from benchmarks.soak.asking import TEXT, Ask, Manner, generation
from benchmarks.soak.ledger import Ledger
from benchmarks.soak.models import MODELS, RUNNING, WAITING, Part
from benchmarks.sse_client import CHAT, now

ROUND_SECONDS = 14.0
LULL_SECONDS = 5.0
REQUESTS_A_SECOND = 12.0
# One healthy model at a time is requested more often than the others, so that there is something to disturb.
FAVOURED = 0.65
NEW_FAVOURITE_A_SECOND = 0.1
BURST = RUNNING + WAITING + 20
BURSTS_A_SECOND = 0.03
DEAF_A_SECOND = 0.05
MOST_WORDS = 90
NAMES = [part for part in MODELS for _ in range(part.share)]
HEALTHY = [part for part in MODELS if part.healthy]
FAVOURITES = [part for part in HEALTHY if not part.stubborn]


class Load:
    """The clients; `dice` chooses the next request."""

    def __init__(self, ledger: Ledger, dice: random.Random) -> None:
        self._ledger = ledger
        self._dice = dice
        self._favourite = FAVOURITES[0]
        self._asking: set[asyncio.Task[object]] = set()

    async def round(self, until: float) -> None:
        """Send for ROUND_SECONDS, but not after `until`; then a lull of at most LULL_SECONDS."""
        ends = min(until, now() + ROUND_SECONDS)
        while now() < ends:
            await asyncio.sleep(self._dice.expovariate(REQUESTS_A_SECOND))
            for request in self._next():
                self._send(request)
        await self.quiet(LULL_SECONDS)

    async def quiet(self, seconds: float) -> None:
        """Wait until no request is in flight, at most `seconds`."""
        if self._asking:
            await asyncio.wait(self._asking, timeout=seconds)

    def leave(self) -> None:
        """Disconnect all clients."""
        for asking in self._asking:
            asking.cancel()

    def _send(self, request: Ask) -> None:
        task: asyncio.Task[object] = asyncio.create_task(self._ledger.send(request))
        self._asking.add(task)
        task.add_done_callback(self._asking.discard)

    def _next(self) -> Iterator[Ask]:
        if self._dice.random() * REQUESTS_A_SECOND < NEW_FAVOURITE_A_SECOND:
            self._favourite = self._dice.choice(FAVOURITES)
        throw = self._dice.random() * REQUESTS_A_SECOND
        if throw < BURSTS_A_SECOND:
            yield from (self._generation() for _ in range(BURST))
        elif throw < BURSTS_A_SECOND + DEAF_A_SECOND:
            yield self._deaf()
        elif self._dice.random() < 0.05:
            yield self._bad()
        else:
            yield self._generation()

    def _generation(self) -> Ask:
        dice = self._dice
        part = self._favourite if dice.random() < FAVOURED else dice.choice(NAMES)
        manner, seconds = dice.choices(
            (
                (Manner.STAYS, None),
                (Manner.LEAVES, dice.uniform(0.005, 0.3)),
                (Manner.LEAVES, dice.uniform(0.3, 2.5)),
                (Manner.LEAVES_AT_WORDS, 10.0),
            ),
            (75, 10, 8, 7),
        )[0]
        behaviour = {"manner": manner} | ({} if seconds is None else {"seconds": seconds})
        stream, chat = dice.random() < 0.6, dice.random() < 0.5
        return generation(part, self._words(part), stream=stream, chat=chat, **behaviour)

    def _words(self, part: Part) -> int:
        if part.lethal_from is None:
            return self._dice.randint(1, MOST_WORDS)
        if self._dice.random() < 0.25:
            return self._dice.randint(part.lethal_from, MOST_WORDS)
        return self._dice.randint(1, part.lethal_from - 1)

    def _deaf(self) -> Ask:
        """A client that requests more than it reads."""
        seconds = self._dice.uniform(2.0, 16.0)
        part = self._dice.choice(HEALTHY)
        return generation(part, 100_000, stream=True, chat=True, manner=Manner.DEAF, seconds=seconds)

    def _bad(self) -> Ask:
        """A request that must be refused in any case."""
        known = {"model": "quick", "prompt": "Tell"}
        bad, unknown = (400, "invalid_value"), (404, "model_not_found")
        return self._dice.choice(
            (
                Ask(TEXT, b"{no json", "bad body", refusal=bad),
                Ask(TEXT, json.dumps({**known, "max_tokens": "5"}).encode(), "bad body", refusal=bad),
                Ask(CHAT, json.dumps({"model": "quick", "messages": []}).encode(), "bad body", refusal=bad),
                Ask(TEXT, b" " * (5 << 20), "huge body", refusal=(413, "request_too_large")),
                Ask(TEXT, json.dumps({**known, "model": "nobody"}).encode(), "nobody", refusal=unknown),
                Ask(TEXT, json.dumps({**known, "model": "quick@0123"}).encode(), "nobody", refusal=unknown),
                Ask("/v1/nothing", b"", "nobody", refusal=(404, "unknown_url"), method="GET"),
            )
        )
