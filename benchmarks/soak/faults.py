"""The faults and operator actions that are injected during the load."""

import asyncio
import random
import signal
from collections.abc import Awaitable, Callable

import psutil

from benchmarks.servers import Server
from benchmarks.soak.asking import Ask
from benchmarks.soak.ledger import Ledger
from benchmarks.soak.models import BY_NAME, MODELS, PINNED, UPLOADED, Bucket, Part
from benchmarks.soak.timeline import Deed
from benchmarks.soak.watch import Watch
from benchmarks.sse_client import now

FAULTS_A_SECOND = 0.5
PAUSE_SECONDS = 0.8
POLL_INTERVAL = 0.1
# How long to poll for a host that is starting.
START_SECONDS = 5.0
# A stopped host is resumed after this time if the service has not ended it.
STOPPED_SECONDS = 15.0
# An unload waits for running requests and for the teardown.
UNLOAD_SECONDS = 30.0

Fault = Callable[[], Awaitable[None]]


class Faults:
    """Starts one fault at a time; some last."""

    def __init__(
        self, ledger: Ledger, watch: Watch, server: Server, bucket: Bucket, dice: random.Random
    ) -> None:
        self._ledger = ledger
        self._timeline = ledger.timeline
        self._bucket = bucket
        self._dice = dice
        self._watch = watch
        self._server = server
        self._under_way: set[asyncio.Future[None]] = set()
        self._stopped: set[psutil.Process] = set()

    async def inject(self, until: float) -> None:
        kinds: dict[Fault, int] = {
            self._kill: 6,
            self._stop: 2,
            self._kill_in_its_start: 2,
            self._stop_in_its_start: 1,
            self._pause: 4,
            self._unload: 4,
            self._force: 3,
            self._load: 6,
            self._pin: 3,
            self._upload: 3,
        }
        while now() < until:
            await asyncio.sleep(self._dice.expovariate(FAULTS_A_SECOND))
            fault = self._dice.choices(list(kinds), list(kinds.values()))[0]
            task = asyncio.ensure_future(fault())
            self._under_way.add(task)
            task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Future[None]) -> None:
        self._under_way.discard(task)
        if not task.cancelled() and task.exception() is not None:
            self._ledger.complain("operator", f"a fault could not be injected: {task.exception()!r}")

    async def settle(self, seconds: float) -> None:
        """Wait for lasting faults to end."""
        if self._under_way:
            await asyncio.wait(self._under_way, timeout=seconds)
        for task in self._under_way:
            self._ledger.complain("operator", f"{task} has not ended after another {seconds:g} s")
            task.cancel()
        for name in PINNED:
            await self._operate(f"/admin/unpin/{name}", BY_NAME[name])

    def resume(self) -> None:
        """Resume all stopped processes."""
        for process in self._stopped:
            _signal(process, signal.SIGCONT)

    async def unload_all(self) -> None:
        for part in MODELS:
            await self._operate(f"/admin/unload/{part.canonical}", part)

    async def _kill(self) -> None:
        found = self._host()
        if found is not None:
            self._timeline.at_once(Deed.KILLED, *found[1:])
            _signal(found[0], signal.SIGKILL)

    async def _stop(self) -> None:
        """Until the service ends it, or for STOPPED_SECONDS."""
        found = self._host()
        if found is not None:
            await self._hold(found[0], Deed.STOPPED, found[1], found[2], STOPPED_SECONDS)

    async def _pause(self) -> None:
        found = self._host()
        if found is not None and found[0] not in self._stopped:
            await self._hold(found[0], Deed.PAUSED, found[1], found[2], PAUSE_SECONDS)

    async def _kill_in_its_start(self) -> None:
        found = await self._starting()
        if found is not None:
            self._timeline.at_once(Deed.KILLED, *found[1:])
            _signal(found[0], signal.SIGKILL)

    async def _stop_in_its_start(self) -> None:
        found = await self._starting()
        if found is not None:
            await self._hold(found[0], Deed.STOPPED, found[1], found[2], STOPPED_SECONDS)

    async def _starting(self) -> tuple[psutil.Process, str, str] | None:
        """The next host that is starting."""
        ends = now() + START_SECONDS
        while now() < ends:
            await self._watch.look()
            found = self._host("starting")
            if found is not None:
                return found
            await asyncio.sleep(POLL_INTERVAL)
        return None

    async def _hold(
        self, process: psutil.Process, deed: Deed, model: str, state: str, seconds: float
    ) -> None:
        entry = self._timeline.begin(deed, model, state)
        self._stopped.add(process)
        ends = now() + seconds
        try:
            _signal(process, signal.SIGSTOP)
            while now() < ends and process.is_running():  # noqa: ASYNC110  (it has no event)
                await asyncio.sleep(POLL_INTERVAL)
        finally:
            _signal(process, signal.SIGCONT)
            self._stopped.discard(process)
            entry.end()

    async def _unload(self) -> None:
        await self._unload_by(Deed.UNLOADED, "")

    async def _force(self) -> None:
        await self._unload_by(Deed.FORCED, "?force=true")

    async def _unload_by(self, deed: Deed, query: str) -> None:
        part = self._one_that_is_loaded()
        entry = self._timeline.begin(deed, part.canonical)
        try:
            await self._operate(f"/admin/unload/{part.name}{query}", part)
        finally:
            entry.end()

    def _one_that_is_loaded(self) -> Part:
        """A loaded model most of the time, else any model."""
        engines = self._watch.engines()
        if not engines or self._dice.random() < 0.2:
            return self._dice.choice(MODELS)
        return BY_NAME[self._dice.choice(engines)["model"]]

    async def _load(self) -> None:
        part = self._dice.choice(MODELS)
        self._timeline.at_once(Deed.LOADED, part.canonical)
        query = self._dice.choice(("", "?wait=false"))
        # Judged like any request: the table must explain an error.
        await self._ledger.send(Ask(f"/admin/load/{part.name}{query}", b"", part.canonical, part=part))

    async def _pin(self) -> None:
        part = BY_NAME[self._dice.choice(PINNED)]
        if self._timeline.during(Deed.PINNED, part.canonical, now(), now()):
            return
        entry = self._timeline.begin(Deed.PINNED, part.canonical)
        try:
            await self._operate(f"/admin/pin/{part.name}", part)
            await asyncio.sleep(self._dice.uniform(2.0, 8.0))
            await self._operate(f"/admin/unpin/{part.name}", part)
        finally:
            entry.end()

    async def _upload(self) -> None:
        part = BY_NAME[self._dice.choice(UPLOADED)]
        self._timeline.at_once(Deed.UPLOADED, part.canonical)
        await asyncio.to_thread(self._bucket.upload, part)

    async def _operate(self, path: str, part: Part) -> None:
        """An operator's request, which must always succeed."""
        request = Ask(path, b"", part.canonical, part=part, seconds=UNLOAD_SECONDS, certain=True)
        await self._ledger.send(request)

    def _host(self, state: str | None = None) -> tuple[psutil.Process, str, str] | None:
        """A random host of an engine in `state` (None: any): its process, model and state of the engine."""
        engines = [
            engine
            for engine in self._watch.engines()
            if engine["process_id"] is not None and state in (None, engine["state"])
        ]
        if not engines:
            return None
        engine = self._dice.choice(engines)
        # Only the service's own processes: the stats may be out of date.
        for process in self._server.processes():
            if process.pid == engine["process_id"]:
                return process, engine["model"], engine["state"]
        return None


def _signal(process: psutil.Process, number: signal.Signals) -> None:
    try:
        process.send_signal(number)
    except psutil.NoSuchProcess:
        return
