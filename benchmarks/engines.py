"""Tokens per second on the CPU: vLLM, the transformers backend, plain `generate`, `transformers serve`.

    python -m benchmarks.engines --model .demo/models/smollm2-135m-instruct [--quick]

The same prompts and number of tokens, float32, greedy, 1 and 8 streams. All servers are up before the first
round and take turns in each, on an otherwise idle machine. Ratios are per round; the median counts.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import median as middle
from typing import Any

import httpx2

from benchmarks.report import median, print_result, print_table, say, spread
from benchmarks.servers import Server, free_port, running, this_service
from inference_service.config import Settings

TOKENS = 64
STREAMS = (1, 8)
ROUNDS, QUICK_ROUNDS = 7, 2
OURS, VLLM, BATCH, ALONE, SERVE = (
    "transformers backend",
    "vLLM CPU",
    "generate, static batch",
    "generate, one at a time",
    "transformers serve",
)
PROMPTS = [
    f"{start} Write a long text about it."
    for start in (
        *("The sea is deep.", "A fox met a crow.", "Rome was not built in a day.", "The train was late."),
        *("Music is everywhere.", "He opened the old door.", "The garden was quiet.", "Snow fell all night."),
    )
]
Run = Callable[[int], float]


def run(model: Path, quick: bool) -> None:
    with ExitStack() as stack:
        contenders = _contenders(stack, model)
        for name, measure in contenders.items():
            say(f"warming up: {name}")
            measure(STREAMS[-1])
        rounds = []
        for number in range(QUICK_ROUNDS if quick else ROUNDS):
            rounds.append(
                {name: [measure(count) for count in STREAMS] for name, measure in contenders.items()}
            )
            say(
                f"round {number + 1}: " + ", ".join(f"{name} {at[-1]:.1f}" for name, at in rounds[-1].items())
            )
    _report(rounds)


def _contenders(stack: ExitStack, model: Path) -> dict[str, Run]:
    settings = Settings(max_model_len=2048, max_cached_models=1)
    say("starting the service twice, `transformers serve` and plain generate")
    ours, vllm = (
        stack.enter_context(this_service(model, settings, ENGINE=engine, DTYPE="float32"))
        for engine in ("transformers", "vllm")
    )
    serve = stack.enter_context(_transformers_serve(model))
    generate = stack.enter_context(_plain_generate(model))
    return {
        OURS: lambda count: _of_server(ours, model.name, count, {"ignore_eos": True}),
        VLLM: lambda count: _of_server(vllm, model.name, count, {"ignore_eos": True}),
        BATCH: lambda count: generate(count, True),
        ALONE: lambda count: generate(count, False),
        SERVE: lambda count: _of_server(serve, str(model), count, {}),
    }


def _of_server(server: Server, model: str, count: int, more: dict[str, Any]) -> float:
    """Tokens per second of `count` clients, each with its own prompt."""
    with httpx2.Client(base_url=server.url, timeout=600) as client, ThreadPoolExecutor(count) as pool:

        def ask(prompt: str) -> int:
            body = {"model": model, "prompt": prompt, "max_tokens": TOKENS, "temperature": 0, **more}
            answer = client.post("/v1/completions", json=body).raise_for_status().json()
            return int(answer["usage"]["completion_tokens"])

        started = time.perf_counter()
        tokens = sum(pool.map(ask, PROMPTS[:count]))
        return tokens / (time.perf_counter() - started)


@contextmanager
def _transformers_serve(model: Path) -> Iterator[Server]:
    """With its own continuous batching, and a cache of similar size to ours instead of most of the memory."""
    port = free_port()
    command = [sys.executable, "-m", "transformers.cli.transformers", "serve", str(model)]
    command += ["--host", "127.0.0.1", "--port", str(port), "--device", "cpu", "--dtype", "float32"]
    command += ["--continuous-batching", "--cb-block-size", "32", "--cb-num-blocks", "256"]
    command += ["--cb-max-batch-tokens", "512"]
    with (
        tempfile.TemporaryDirectory() as room,
        running(SERVE, command, _environment(), port, Path(room), "/health") as server,
    ):
        yield server


@contextmanager
def _plain_generate(model: Path) -> Iterator[Callable[[int, bool], float]]:
    command = [sys.executable, "-m", "benchmarks.plain_generate", str(model), "float32"]
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=os.environ | _environment(), text=True
    )
    requests, answers = process.stdin, process.stdout
    if requests is None or answers is None:
        raise RuntimeError("the process has no pipes")

    def generate(count: int, together: bool) -> float:
        request = {"prompts": PROMPTS[:count], "tokens": TOKENS, "together": together}
        requests.write(json.dumps(request) + "\n")
        requests.flush()
        answer = json.loads(answers.readline())
        return float(answer["tokens"] / answer["seconds"])

    try:
        json.loads(answers.readline())
        yield generate
    finally:
        process.kill()
        process.wait()


def _environment() -> dict[str, str]:
    """The same number of threads as the engines get."""
    return {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(len(os.sched_getaffinity(0)))}


def _report(rounds: list[dict[str, list[float]]]) -> None:
    header = ["tokens/s, median (min-max)", *(f"{count} streams" for count in STREAMS)]
    columns = range(len(STREAMS))
    rows = [
        [name, *(spread([each[name][column] for each in rounds]) for column in columns)] for name in rounds[0]
    ]
    print_table(header, rows)

    def over(name: str, column: int) -> list[float]:
        return [each[OURS][column] / each[name][column] for each in rounds]

    others = [name for name in rounds[0] if name != OURS]
    print_table(
        ["ratio: ours over", *header[1:]],
        [[name, *(spread(over(name, column)) for column in columns)] for name in others],
    )
    keys = {BATCH: "static_batch", SERVE: "transformers_serve", VLLM: "vllm", ALONE: "one_at_a_time"}
    ratios = {
        f"over_{keys[name]}_{count}": median(over(name, column))
        for name in others
        for column, count in enumerate(STREAMS)
    }
    figures = {
        name: [round(middle(each[name][at] for each in rounds), 1) for at in columns] for name in rounds[0]
    }
    print_result("engines", ratios, {"tokens_per_second": figures, "rounds": len(rounds), "tokens": TOKENS})


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--quick", action="store_true")
    given = parser.parse_args()
    run(given.model.absolute(), given.quick)
