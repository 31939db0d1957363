"""Runs one job of the client and samples the processes under load meanwhile."""

import json
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import psutil

Processes = Mapping[str, Sequence[psutil.Process]]


@dataclass
class Outcome:
    """The client's result; CPU seconds and resident bytes of each role while the load was steady."""

    result: dict[str, float] = field(default_factory=dict)
    processor: dict[str, float] = field(default_factory=dict)
    resident: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0

    def busy(self) -> str:
        """`service 61 %, host 40 %, client 12 %` of one core each."""
        if not self.seconds:
            return "never steady"
        return ", ".join(f"{role} {100 * used / self.seconds:.0f} %" for role, used in self.processor.items())

    def microseconds_a_chunk(self, role: str) -> float:
        return 1e6 * self.processor[role] / max(1.0, self.result["chunks"])


def run_job(job: str, processes: Processes, **parameters: Any) -> Outcome:
    """Run the client's job in a process of its own. Raises RuntimeError if it fails."""
    outcome = Outcome()
    before: dict[str, float] = {}
    with _client() as client:
        watched = {**processes, "client": [psutil.Process(client.pid)]}
        for message in _messages(client, {"job": job, **parameters}):
            match message:
                case {"event": "open"}:
                    before = {"seconds": time.perf_counter(), **_processor(watched)}
                case {"event": "closing"} if before:
                    after = {"seconds": time.perf_counter(), **_processor(watched)}
                    used = {name: value - before[name] for name, value in after.items()}
                    outcome.seconds = used.pop("seconds")
                    outcome.processor = used
                    outcome.resident = {
                        role: sum(process.memory_info().rss for process in members)
                        for role, members in processes.items()
                    }
                case {"result": result}:
                    outcome.result = result
    if not outcome.result:
        raise RuntimeError(f"the client's job '{job}' ended with exit code {client.returncode}")
    return outcome


@contextmanager
def _client() -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-m", "benchmarks.front_client"]
    # In its own session: Ctrl-C must reach only the benchmark, which ends its client.
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    with process:
        try:
            yield process
        finally:
            process.kill()


def _messages(client: subprocess.Popen[str], job: dict[str, Any]) -> Iterator[dict[str, Any]]:
    if client.stdin is None or client.stdout is None:
        return
    client.stdin.write(f"{json.dumps(job)}\n")
    client.stdin.flush()
    for line in client.stdout:
        yield json.loads(line)


def _processor(processes: Processes) -> dict[str, float]:
    """User and system seconds of each role so far."""
    used = {}
    for role, members in processes.items():
        times = [process.cpu_times() for process in members]
        used[role] = sum(each.user + each.system for each in times)
    return used
