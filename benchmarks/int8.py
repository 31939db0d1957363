"""The gains and costs of 8-bit weights on this CPU: speed and perplexity.

    python -m benchmarks.int8 --model .demo/models/smollm2-135m-instruct

One model in four forms, each as a host would run it, in turn. Perplexity over this project's own documents,
which no model was trained on.
"""

import argparse
import asyncio
import math
import multiprocessing
import os
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", str(len(os.sched_getaffinity(0))))

from benchmarks.report import median, print_result, print_table, say, spread
from inference_service.hosts.transformers.generation import attention
from inference_service.hosts.transformers.generation.engine import Engine, EngineOptions
from inference_service.hosts.transformers.generation.sequence import SamplingParams
from inference_service.hosts.transformers.generation.weights import Placement

FORMS = {
    "float32": Placement("cpu", "float32"),
    "float32, int8": Placement("cpu", "float32", int8=True),
    "bfloat16": Placement("cpu", "bfloat16"),
    "bfloat16, int8": Placement("cpu", "bfloat16", int8=True),
}
ROUNDS, TOKENS, STREAMS = 5, 48, (1, 8)
CACHE_BYTES = 128 << 20
PIECE, PIECES = 512, 8
ROOT = Path(__file__).parents[1]


def run(model: Path) -> None:
    say("loading the model in four forms, each in its own process")
    rounds: dict[str, list[list[float]]] = {name: [] for name in FORMS}
    with ExitStack() as stack:
        forms = {name: stack.enter_context(_process(model, place)) for name, place in FORMS.items()}
        for number in range(-1, ROUNDS):
            for name, form in forms.items():
                speeds = [form.submit(_measure_speed, count).result() for count in STREAMS]
                if number >= 0:  # the first is a warm-up
                    rounds[name].append(speeds)
            say(f"round {number + 1} of {ROUNDS}")
        perplexities = {name: form.submit(_measure_perplexity).result() for name, form in forms.items()}
    _report(rounds, perplexities)


_engines: list[Engine] = []


@contextmanager
def _process(model: Path, place: Placement) -> Iterator[ProcessPoolExecutor]:
    """A process with one engine, like a host."""
    spawn = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(1, mp_context=spawn, initializer=_build, initargs=(model, place))
    with pool:
        yield pool
        pool.submit(_end).result()


def _build(model: Path, place: Placement) -> None:
    attention.install()
    _engines.append(Engine(model, EngineOptions(place, CACHE_BYTES, 1024, 16)))


def _end() -> None:
    _engines.pop().close()


def _measure_speed(streams: int) -> float:
    return asyncio.run(_speed(_engines[0], streams))


def _measure_perplexity() -> float:
    return asyncio.run(_perplexity(_engines[0]))


async def _speed(engine: Engine, streams: int) -> float:
    """Tokens per second of `streams` concurrent sequences."""

    async def one(row: int) -> int:
        prompt = [(7919 * (row + 1) + 31 * number) % engine.vocabulary for number in range(16)]
        return sum([1 async for _ in engine.generate(prompt, SamplingParams(TOKENS, temperature=0))])

    started = time.perf_counter()
    counts = await asyncio.gather(*map(one, range(streams)))
    return sum(counts) / (time.perf_counter() - started)


async def _perplexity(engine: Engine) -> float:
    text = "".join((ROOT / name).read_text() for name in ("README.md", "docs/storage.md"))
    ids: list[int] = engine.tokenizer(text)["input_ids"][: PIECE * PIECES]
    logprobs: list[float] = []
    for start in range(0, len(ids), PIECE):
        scored, _ = await engine.score(ids[start : start + PIECE], None, 1, [])
        logprobs += [token.logprob or 0.0 for token in scored]
    return math.exp(-sum(logprobs) / len(logprobs))


def _report(rounds: dict[str, list[list[float]]], perplexities: dict[str, float]) -> None:
    columns = range(len(STREAMS))
    rows = [
        [
            name,
            *(spread([each[column] for each in found]) for column in columns),
            f"{perplexities[name]:.3f}",
            f"{perplexities[name] / perplexities['float32']:.4f}",
        ]
        for name, found in rounds.items()
    ]
    header = ["", *(f"tokens/s, {count} streams" for count in STREAMS), "perplexity", "of float32's"]
    print_table(header, rows)

    def over(name: str, other: str, column: int) -> float:
        pairs = zip(rounds[name], rounds[other], strict=True)
        return median([one[column] / two[column] for one, two in pairs])

    ratios: dict[str, Any] = {
        "int8_over_float32_1": over("float32, int8", "float32", 0),
        "int8_over_float32_8": over("float32, int8", "float32", 1),
        "int8_over_bfloat16_1": over("bfloat16, int8", "bfloat16", 0),
        "int8_over_bfloat16_8": over("bfloat16, int8", "bfloat16", 1),
        "bfloat16_over_float32_8": over("bfloat16", "float32", 1),
        "perplexity_int8": round(perplexities["float32, int8"] / perplexities["float32"], 4),
        "perplexity_bfloat16_int8": round(perplexities["bfloat16, int8"] / perplexities["float32"], 4),
    }
    print_result(
        "int8", ratios, {"perplexity": {name: round(each, 3) for name, each in perplexities.items()}}
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True)
    run(parser.parse_args().model.absolute())
