"""Scrapes the service continuously, as its monitoring would, and checks each result for consistency."""

import asyncio
import json
import re
from collections import Counter
from typing import Any

from benchmarks.soak.ledger import Ledger
from benchmarks.soak.models import RUNNING, SLOTS, WAITING
from benchmarks.sse_client import connect, get_request, now

EVERY_SECONDS = 0.4
# /admin/stats waits up to a second for an engine that does not respond.
ANSWER_SECONDS = 5.0
_METRIC = re.compile(r"^inference_(\w+)_total(?:\{(.*)\})? ([\d.e+]+)$", re.MULTILINE)


class Watch:
    """`stats`: the last /admin/stats; `slowest`: seconds of the slowest answer of each route."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self.stats: dict[str, Any] = {"engines": []}
        self.slowest: dict[str, float] = {}
        self.scrapes = 0

    def engines(self) -> list[dict[str, Any]]:
        engines: list[dict[str, Any]] = self.stats["engines"]
        return engines

    async def scrape(self, until: float) -> None:
        while now() < until:
            await self.get("/health")
            await self.get("/metrics")
            await self.look()
            await asyncio.sleep(EVERY_SECONDS)

    async def look(self) -> dict[str, Any]:
        """The current /admin/stats."""
        content = await self.get("/admin/stats")
        if content is not None:
            self.stats = json.loads(content)
            self._check(self.stats)
        return self.stats

    async def get(self, path: str) -> bytes | None:
        """The body of the answer. Complains if it is missing or late."""
        self.scrapes += 1
        try:
            connection = await connect(self._ledger.address)
        except OSError as error:
            self._ledger.complain(path, f"no connection: {error!r}")
            return None
        asking = asyncio.create_task(connection.ask(get_request(path)))
        await asyncio.wait({asking}, timeout=ANSWER_SECONDS)
        connection.cut()
        answer = await asking
        self.slowest[path] = max(self.slowest.get(path, 0.0), answer.seconds)
        if answer.status != 200 or not answer.whole:
            self._ledger.complain(path, f"status {answer.status} after {answer.seconds:.1f} s")
            return None
        return b"".join(piece for _, piece in answer.pieces)

    async def counters(self) -> Counter[str]:
        """The service's counters, summed over models: `loads_ok`, `loads_failed`, `evictions`, ..."""
        counted: Counter[str] = Counter()
        for name, labels, value in _METRIC.findall((await self.get("/metrics") or b"").decode()):
            outcome = re.search(r'status="(ok|failed)"', labels)
            counted[f"{name}_{outcome[1]}" if outcome else name] += round(float(value))
        return counted

    def _check(self, stats: dict[str, Any]) -> None:
        """Check the limits of engines, leases and waiters."""
        # Operator requests wait outside the clients' queue.
        waiters = sum(not waiter["operator"] for waiter in stats["waiters"])
        if stats["slots"]["used"] > SLOTS or len(stats["engines"]) > SLOTS:
            self._ledger.complain("/admin/stats", f"too many engines: {stats['engines']}")
        if not 0 <= stats["leases"] <= RUNNING or waiters > WAITING:
            self._ledger.complain("/admin/stats", f"{stats['leases']} leases, {waiters} waiters")
