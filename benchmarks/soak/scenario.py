"""The scenario of a soak: before the load, the load in rounds, settling, the end."""

import asyncio
import random
import shutil
import sys
import tempfile
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from benchmarks.report import say
from benchmarks.servers import Server, free_port, running
from benchmarks.soak.asking import generation
from benchmarks.soak.faults import Faults
from benchmarks.soak.ledger import Ledger
from benchmarks.soak.load import Load
from benchmarks.soak.models import BY_NAME, SETTINGS, Bucket, Part
from benchmarks.soak.samples import MIB, Sample
from benchmarks.soak.timeline import Timeline
from benchmarks.soak.watch import Watch
from benchmarks.sse_client import now
from inference_service.config import Settings

SETTLE_SECONDS = 45.0
COME_BACK_SECONDS = 15.0
# DRAIN_TIMEOUT, and the shutdown of engines and connections.
EXIT_SECONDS = 6.0
SAY_EVERY_ROUNDS = 3
# In the service's log these are bugs.
ALARMS = ("unexpected error", "never retrieved", "Exception in callback", "did not close cleanly")
ALARMED_LINES = 12


@dataclass
class Findings:
    """The results of a soak. `exit_code` None: the service had to be killed."""

    ledger: Ledger
    watch: Watch
    seconds: float = 0.0
    samples: list[Sample] = field(default_factory=list)
    before: Sample | None = None
    after: Sample | None = None
    counters: Counter[str] = field(default_factory=Counter)
    exit_code: int | None = None
    processes_left: int = 0


async def soak(duration: float, seed: int, log: Path | None) -> Findings:
    """Run one soak. Its service and its directory are gone when this returns or raises."""
    port = free_port()
    with tempfile.TemporaryDirectory() as directory:
        room = Path(directory)
        bucket = Bucket(room / "bucket")
        with running("this service", *_command(port, room), port, room, "/ready") as server:
            ledger = Ledger(server.address, Timeline())
            findings = Findings(ledger, Watch(ledger))
            try:
                await _Scenario(server, bucket, findings, random.Random(seed)).run(duration)
            finally:
                _read_log(findings.ledger, room / "server.log", log)
    return findings


def _command(port: int, room: Path) -> tuple[list[str], dict[str, str]]:
    # An empty variable counts as unset.
    environment = {name.upper(): "" for name in (*Settings.model_fields, "K_SERVICE")} | {
        "GCS_BUCKET": f"file://{room}/bucket",
        "LOCAL_MODEL_CACHE": f"{room}/cache",
        "LISTEN_ADDRESS": "127.0.0.1",
        "PORT": str(port),
        **SETTINGS,
    }
    return [sys.executable, "-m", "inference_service"], environment


class _Scenario:
    def __init__(self, server: Server, bucket: Bucket, findings: Findings, dice: random.Random) -> None:
        self._server = server
        self._ledger = findings.ledger
        self._watch = findings.watch
        self._load = Load(self._ledger, dice)
        self._faults = Faults(self._ledger, self._watch, server, bucket, dice)
        self._findings = findings

    async def run(self, duration: float) -> None:
        findings = self._findings
        await self._play_once()
        findings.before = await self._settled()
        say(f"before the load: {_summary(findings.before)}")
        began = now()
        try:
            await self._under_load(began + duration)
            findings.seconds = now() - began
            await self._load.quiet(SETTLE_SECONDS)
            await self._faults.settle(SETTLE_SECONDS)
        finally:
            self._faults.resume()
            self._load.leave()
        findings.after = await self._settled()
        say(f"settled after the load: {_summary(findings.after)}")
        findings.counters = await self._watch.counters()
        await self._end()

    async def _play_once(self) -> None:
        """Trigger what happens only once: the launcher's imports, the first use of every component."""
        for name in ("quick", "acme-keeper"):
            await self._ask(BY_NAME[name], stream=name == "quick")

    async def _ask(self, part: Part, *, stream: bool) -> None:
        await self._ledger.send(generation(part, 3, stream=stream, chat=True))

    async def _under_load(self, until: float) -> None:
        scraping = asyncio.create_task(self._watch.scrape(until))
        injecting = asyncio.create_task(self._faults.inject(until))
        try:
            rounds = 0
            while now() < until:
                await self._load.round(until)
                self._findings.samples.append(await self._sample())
                rounds += 1
                if rounds % SAY_EVERY_ROUNDS == 0:
                    self._say_progress(until)
            await asyncio.gather(scraping, injecting)
        finally:
            scraping.cancel()
            injecting.cancel()

    def _say_progress(self, until: float) -> None:
        ledger, sample = self._ledger, self._findings.samples[-1]
        say(
            f"{max(0.0, until - now()):.0f} s to go: {ledger.requests} requests, {ledger.ok} right, "
            f"{ledger.left.total()} left, {ledger.explained.total()} explained, {ledger.unexplained} "
            f"unexplained; {_summary(sample)}"
        )

    async def _settled(self) -> Sample:
        """Unload all engines; sample once resources are back, or after COME_BACK_SECONDS."""
        await self._faults.unload_all()
        before, ends = self._findings.before, now() + COME_BACK_SECONDS
        sample = await self._sample()
        while now() < ends and not (_is_idle(self._watch) and _is_back(sample, before)):
            await asyncio.sleep(0.5)
            sample = await self._sample()
        return sample

    async def _sample(self) -> Sample:
        stats = await self._watch.look()
        process = stats["process"]
        return Sample(
            at=now(),
            resident_mib=process["resident_bytes"] / MIB,
            open_files=process["open_files"],
            threads=process["threads"],
            tasks=process["tasks"],
            processes=len(self._server.processes()) - 1,
            leases=stats["leases"],
        )

    async def _end(self) -> None:
        """SIGTERM with engines loaded: the exit code must be 0, and no process may be left."""
        for name in ("stubborn", "quick"):
            await self._ask(BY_NAME[name], stream=False)
        processes = self._server.processes()
        self._server.process.terminate()
        ends = now() + EXIT_SECONDS
        while self._server.process.poll() is None and now() < ends:  # noqa: ASYNC110  (it has no event)
            await asyncio.sleep(0.05)
        self._findings.exit_code = self._server.process.returncode
        left = [process for process in processes[1:] if _runs(process)]
        self._findings.processes_left = len(left)
        for process in left:
            with suppress(psutil.NoSuchProcess):
                process.kill()


def _is_idle(watch: Watch) -> bool:
    stats = watch.stats
    return not (stats["engines"] or stats["waiters"] or stats["leases"])


def _is_back(sample: Sample, before: Sample | None) -> bool:
    return before is None or (sample.open_files, sample.tasks) == (before.open_files, before.tasks)


def _runs(process: psutil.Process) -> bool:
    with suppress(psutil.NoSuchProcess):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


def _summary(sample: Sample) -> str:
    return (
        f"{sample.resident_mib:.1f} MiB, {sample.open_files} files, {sample.threads} threads, "
        f"{sample.tasks} tasks, {sample.processes} processes, {sample.leases} leases"
    )


def _read_log(ledger: Ledger, log: Path, kept: Path | None) -> None:
    if kept is not None:
        shutil.copyfile(log, kept)
    lines = log.read_text(errors="replace").splitlines()
    for number, line in enumerate(lines):
        if any(alarm in line for alarm in ALARMS):
            ledger.complain("log", "\n".join(lines[number : number + ALARMED_LINES]))
