"""A trace of requests for twelve fine-tunes with two slots: time to first token.

    python -m benchmarks.trace [--quick] [--plot trace.png]

Zipf-distributed models, Poisson arrivals, over eight checkpoints of one architecture and four adapters. The
same trace runs twice: with this service's defaults, and with swaps and the launcher off and every adapter
merged into its own checkpoint. Ratios are the second over the first; for completed requests, the first over
the second.
"""

import argparse
import random
import shutil
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2

from benchmarks.first_token import first_token
from benchmarks.report import percentile, print_result, print_table, say
from benchmarks.servers import Server, this_service_over
from inference_service.config import Settings
from tests.fixtures.checkpoints import Checkpoints, checkpoints

CHECKPOINTS, ADAPTERS = 8, 4
SETTINGS = Settings(max_model_len=2048, max_cached_models=2)
SKEW = 1.1
MEAN_GAP_SECONDS = 3.0
SECONDS = 120.0
QUICK_SECONDS = 40.0
CLIENTS = 64
TOKENS = 8
OFF = {"WEIGHT_SWAP": "off", "WARM_LAUNCHER": "false"}
QUESTION = "What is the capital of France?"


@dataclass(frozen=True)
class Arrival:
    """A request of the trace: when, in seconds from its start, and for which model."""

    at: float
    model: str


@dataclass(frozen=True)
class Run:
    """The results of a trace: seconds to the first token in order of arrival, None for a failure."""

    waits: list[tuple[Arrival, float | None]]
    seconds: float
    loads: int
    swaps: int

    @property
    def served(self) -> list[float]:
        return [wait for _, wait in self.waits if wait is not None]

    @property
    def completed_a_minute(self) -> float:
        return 60 * len(self.served) / self.seconds


def trace(seconds: float, seed: int = 5) -> list[Arrival]:
    """Random arrivals. Adapters and checkpoints are mixed in the order of popularity."""
    chance = random.Random(seed)
    names = [f"tune-{number}" for number in range(CHECKPOINTS)]
    names += [f"adapter-{number}" for number in range(ADAPTERS)]
    chance.shuffle(names)
    weights = [1 / (rank**SKEW) for rank in range(1, len(names) + 1)]
    arrivals, at = [], 0.0
    while (at := at + chance.expovariate(1 / MEAN_GAP_SECONDS)) < seconds:
        arrivals.append(Arrival(at, chance.choices(names, weights)[0]))
    return arrivals


def make_bucket(root: Path, models: Checkpoints, *, merged: bool) -> None:
    """Eight checkpoints with two different answers; four adapters of the first, or their merges."""
    for number in range(CHECKPOINTS):
        shutil.copytree((models.base, models.tuned)[number % 2], root / "models" / f"tune-{number}")
    for number in range(ADAPTERS):
        directory = root / "models" / f"adapter-{number}"
        shutil.copytree(models.tuned if merged else models.adapter, directory)
        if not merged:
            (directory / "serving.json").write_text('{"base": "tune-0"}')


def play(server: Server, arrivals: list[Arrival]) -> Run:
    """Send each request at its time, and wait for all answers."""
    started = time.monotonic()
    progress = _Progress(len(arrivals))

    def ask(arrival: Arrival) -> tuple[Arrival, float | None]:
        time.sleep(max(0.0, started + arrival.at - time.monotonic()))
        due = started + arrival.at
        try:
            wait, _ = first_token(server.url, arrival.model, QUESTION, due, TOKENS)
        except (httpx2.HTTPError, RuntimeError) as error:
            say(f"{arrival.model}: {error}")
            return arrival, None
        finally:
            progress.advance()
        return arrival, wait

    with ThreadPoolExecutor(CLIENTS) as clients:
        waits = list(clients.map(ask, arrivals))
    seconds = time.monotonic() - started
    metrics = httpx2.get(f"{server.url}/metrics").text
    # Neither swaps nor adapters start an engine.
    loads = _total(metrics, "inference_load_phase_seconds_count{", 'phase="start"')
    swaps = _total(metrics, "inference_swaps_total{", 'status="ok"')
    return Run(waits, seconds, loads, swaps)


class _Progress:
    def __init__(self, total: int) -> None:
        self._total, self._done, self._lock = total, 0, threading.Lock()

    def advance(self) -> None:
        with self._lock:
            self._done += 1
            if self._done % 10 == 0 or self._done == self._total:
                say(f"{self._done} of {self._total} answered")


def _total(metrics: str, name: str, label: str) -> int:
    lines = [line for line in metrics.splitlines() if line.startswith(name) and label in line]
    return int(sum(float(line.rpartition(" ")[2]) for line in lines))


def draw(runs: dict[str, Run], file: Path) -> None:
    """Plot the seconds to the first token over the trace, and their distribution."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(12, 4.5))
    over_time: Any = axes[0]
    distribution: Any = axes[1]
    for name, run in runs.items():
        points = [(arrival.at, wait) for arrival, wait in run.waits if wait is not None]
        over_time.plot(*zip(*points, strict=True), "o", markersize=4, label=name)
        ordered = sorted(run.served)
        distribution.step(ordered, [(rank + 1) / len(ordered) for rank in range(len(ordered))], label=name)
    for axis in (over_time, distribution):
        axis.grid(visible=True, alpha=0.3)
    # Outside the axes: the points are everywhere.
    distribution.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2)
    over_time.set(xlabel="arrival (s)", ylabel="seconds to the first token", yscale="log")
    distribution.set(xlabel="seconds to the first token", ylabel="share of requests", xscale="log")
    figure.suptitle(f"{CHECKPOINTS} checkpoints and {ADAPTERS} adapters, two slots, Zipf {SKEW}")
    figure.tight_layout()
    figure.savefig(file, dpi=110)


def run(quick: bool, plot: Path) -> None:
    arrivals = trace(QUICK_SECONDS if quick else SECONDS)
    say(f"{len(arrivals)} requests over {arrivals[-1].at:.0f} s")
    models = checkpoints()
    runs: dict[str, Run] = {}
    with tempfile.TemporaryDirectory() as room:
        kinds: dict[str, tuple[bool, dict[str, str]]] = {
            "this service": (False, {}),
            "swaps, adapters on their base and launcher off": (True, OFF),
        }
        for name, (merged, settings) in kinds.items():
            bucket = Path(room, "merged" if merged else "bucket")
            make_bucket(bucket, models, merged=merged)
            waits = {"QUEUE_TIMEOUT": "3000", "REQUEST_TIMEOUT": "3000"}
            say(name)
            with this_service_over(bucket, SETTINGS, **waits, **settings) as server:
                runs[name] = play(server, arrivals)
    draw(runs, plot)
    report(runs, plot)


def report(runs: dict[str, Run], plot: Path) -> None:
    rows = []
    for name, run in runs.items():
        p50, p99 = percentile(run.served, 0.5), percentile(run.served, 0.99)
        numbers = [
            f"{p50:.2f}",
            f"{p99:.2f}",
            f"{run.completed_a_minute:.1f}",
            str(run.loads),
            str(run.swaps),
        ]
        rows.append([name, f"{len(run.served)}/{len(run.waits)}", *numbers])
    header = ["", "answered", "TTFT p50 s", "p99 s", "completed/min", "fresh loads", "swaps"]
    print_table(header, rows)
    print(f"plot: {plot}")
    ours, theirs = runs.values()
    print_result(
        "trace",
        {
            "ttft_p50": round(percentile(theirs.served, 0.5) / percentile(ours.served, 0.5), 2),
            "ttft_p99": round(percentile(theirs.served, 0.99) / percentile(ours.served, 0.99), 2),
            "completed": round(ours.completed_a_minute / theirs.completed_a_minute, 3),
        },
        {
            "requests": len(ours.waits),
            "failed": len(ours.waits) - len(ours.served),
            "ttft_p50_s": round(percentile(ours.served, 0.5), 3),
            "ttft_p99_s": round(percentile(ours.served, 0.99), 3),
            "loads": ours.loads,
            "swaps": ours.swaps,
        },
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a third of the trace")
    parser.add_argument(
        "--plot", type=Path, default=Path("benchmarks/trace.png"), help="output file of the plot"
    )
    given = parser.parse_args()
    run(given.quick, given.plot)
