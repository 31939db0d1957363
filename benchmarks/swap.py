"""Time to first token after a change of model, and after the start of a process.

    python -m benchmarks.swap [--quick]

a  vLLM's own server, stopped and restarted with the other model, as a process-swapping proxy does. It gets
   the same command line as this service's engines.
b  this service, another model of the same architecture      (weights are loaded into the live engine)
b2 the same, to and from a fine-tune of q_proj and v_proj    (only what differs is copied)
c  this service, a model of another architecture             (a new engine, forked from the launcher)
d  as b with WEIGHT_SWAP=off
e  this service, a new adapter while its base is loaded
f  from the start of the process to the first token, ours and vLLM's own server

One slot, and MIN_RESIDENCY=0: the models change as fast as possible. Every answer is compared with that of a
fresh engine in the same run.
"""

import argparse
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import httpx2

from benchmarks.first_token import first_token
from benchmarks.report import median, print_result, print_table, say, spread
from benchmarks.servers import Server, this_service_over, vllm_server
from inference_service.config import Settings
from tests.fixtures.checkpoints import Checkpoints, checkpoints

ROUNDS = 5
QUICK_ROUNDS = 2
SWAPS = 11
SETTINGS = Settings(max_model_len=2048, max_cached_models=1)
# Change models at once: keep none for requests that may follow.
AT_ONCE = {"MIN_RESIDENCY": "0"}
QUESTION = "What is the capital of France?"


class Swaps:
    """The runs, and whether every answer equals a fresh engine's."""

    def __init__(self, bucket: Path, models: Checkpoints) -> None:
        self.bucket = bucket
        self.models = models
        self.fresh: dict[str, str] = {}
        self.wrong: list[str] = []
        self.lags: list[float] = []

    def loop_lag(self, server: Server) -> float:
        """The longest time in seconds that the service's event loop was blocked since the last call."""
        process = httpx2.get(f"{server.url}/admin/stats").json()["process"]
        return float(process["loop_lag_seconds"])

    def ask(self, server: Server, model: str) -> float:
        """Seconds to the first token; the whole answer is compared with the first fresh one."""
        started = time.monotonic()
        seconds, text = first_token(server.url, model, QUESTION, started)
        expected = self.fresh.setdefault(model, text)
        if text != expected:
            self.wrong.append(f"{server.name}: {model}: {text!r} instead of {expected!r}")
        return seconds

    def fresh_answers(self) -> None:
        """Record the answers of fresh engines, each alone; not timed."""
        with this_service_over(self.bucket, SETTINGS, **AT_ONCE, WEIGHT_SWAP="off") as server:
            for model in ("first", "second", "projections", "other"):
                self.ask(server, model)
        self.fresh["adapter"] = self.fresh["second"]

    def restarts(self, rounds: int) -> tuple[list[float], list[float]]:
        """vLLM's server: seconds to the first token, from the start of the change and from its own start."""
        changes: list[float] = []
        boots: list[float] = []
        ending: float | None = None
        for number in range(rounds + 1):
            model = ("first", "second")[number % 2]
            ended = time.monotonic() if ending is None else ending
            begun = time.monotonic()
            with vllm_server(
                "vLLM's server", self.bucket / "models" / model, SETTINGS, tuned=False
            ) as server:
                self.ask(server, model)
                now = time.monotonic()
                boots.append(now - begun)
                if number:
                    changes.append(now - ended)
                say(f"a  {model}: {now - ended:.1f} s")
                ending = time.monotonic()
        return changes, boots

    def alternate(self, name: str, models: tuple[str, str], rounds: int, **settings: str) -> list[float]:
        """This service with one slot, with requests for two models in turn."""
        with this_service_over(self.bucket, SETTINGS, **AT_ONCE, **settings) as server:
            for model in models:
                self.ask(server, model)
            self.loop_lag(server)
            found = [self.ask(server, models[number % 2]) for number in range(rounds)]
            self.lags.append(self.loop_lag(server))
        say(f"{name}  {' '.join(f'{seconds:.2f}' for seconds in found)} s")
        return found

    def adapters(self, rounds: int) -> list[float]:
        with this_service_over(self.bucket, SETTINGS) as server:
            self.ask(server, "first")
            found = []
            for number in range(rounds):
                seconds, text = first_token(server.url, f"adapter-{number}", QUESTION, time.monotonic())
                found.append(seconds)
                if text != self.fresh["adapter"]:
                    self.wrong.append(f"adapter-{number}: {text!r}")
        say(f"e  {' '.join(f'{seconds:.2f}' for seconds in found)} s")
        return found

    def boots(self, rounds: int) -> list[float]:
        found = []
        for _ in range(rounds):
            begun = time.monotonic()
            with this_service_over(self.bucket, SETTINGS) as server:
                self.ask(server, "first")
                found.append(time.monotonic() - begun)
            say(f"f  ours: {found[-1]:.1f} s")
        return found


def make_bucket(root: Path, models: Checkpoints, adapters: int) -> None:
    """Three fine-tunes of one architecture, `other` of another, and copies of an adapter of `first`."""
    named = {"first": models.base, "second": models.tuned, "other": models.untied[0]}
    named["projections"] = models.projections
    for number in range(adapters):
        named[f"adapter-{number}"] = models.adapter
    for name, source in named.items():
        shutil.copytree(source, root / "models" / name)
    for number in range(adapters):
        (root / "models" / f"adapter-{number}" / "serving.json").write_text('{"base": "first"}')


def run(quick: bool) -> None:
    rounds = QUICK_ROUNDS if quick else ROUNDS
    models = checkpoints()
    with tempfile.TemporaryDirectory() as room:
        bucket = Path(room, "bucket")
        make_bucket(bucket, models, rounds)
        swaps = Swaps(bucket, models)
        say("fresh engines' answers")
        swaps.fresh_answers()
        measured: dict[str, list[float]] = {}
        parts: dict[str, Callable[[], list[float]]] = {
            "b": lambda: swaps.alternate("b", ("first", "second"), SWAPS),
            "b2": lambda: swaps.alternate("b2", ("first", "projections"), SWAPS),
            "c": lambda: swaps.alternate("c", ("first", "other"), rounds + 1),
            "d": lambda: swaps.alternate("d", ("first", "second"), rounds + 1, WEIGHT_SWAP="off"),
            "e": lambda: swaps.adapters(rounds),
            "f": lambda: swaps.boots(rounds),
        }
        for name, part in parts.items():
            measured[name] = part()
        measured["a"], theirs = swaps.restarts(rounds)
        report(measured, theirs, swaps)


def report(measured: dict[str, list[float]], theirs: list[float], swaps: Swaps) -> None:
    what = {
        "a": "vLLM's server restarted with the other model",
        "b": "this service, same architecture",
        "b2": "this service, a fine-tune of two projections",
        "c": "this service, another architecture",
        "d": "this service, same architecture, WEIGHT_SWAP=off",
        "e": "this service, a new adapter",
        "f": "this service, from process start",
    }
    rows = [[name, text, spread(measured[name]), str(len(measured[name]))] for name, text in what.items()]
    rows.append(["f", "vLLM's server, from process start", spread(theirs), str(len(theirs))])
    print_table(["", "seconds to the first token", "median (min-max)", "runs"], rows)
    for line in swaps.wrong:
        print(f"WRONG  {line}")
    middle = {name: median(values) for name, values in measured.items()}
    print_result(
        "swap",
        {
            "same_architecture": round(middle["a"] / middle["b"], 1),
            "two_projections": round(middle["a"] / middle["b2"], 1),
            "other_architecture": round(middle["a"] / middle["c"], 2),
            "boot": round(middle["f"] / median(theirs), 3),
        },
        {
            "swap_s": middle["b"],
            "two_projections_s": middle["b2"],
            "adapter_s": middle["e"],
            "launcher_s": middle["d"],
            "loop_lag_s": max(swaps.lags),
            "outputs_equal": not swaps.wrong,
        },
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two rounds of each")
    run(parser.parse_args().quick)
