"""Many adapters in one batch: tokens per second against one adapter, and against the base alone.

    python -m benchmarks.adapters [--quick]

32 concurrent streams over 1, 8 and 32 adapters of one base, all in one batch, and over 128: four per slot
(MAX_ADAPTERS=32) and twice what the engine keeps in memory (MAX_CPU_ADAPTERS=64). The bare base runs in an
engine without adapter slots.
"""

import argparse
import shutil
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median

import httpx2

from benchmarks.report import print_result, print_table, say, spread
from benchmarks.servers import Server, this_service_over
from inference_service.config import Settings
from tests.fixtures.checkpoints import Checkpoints, checkpoints

STREAMS = 32
REQUESTS = 64
TOKENS = 32
SLOTS = 32
KEPT = 64
COUNTS = (1, 8, 32, 128)
ROUNDS = 3
QUICK_ROUNDS = 1
SETTINGS = Settings(max_model_len=2048, max_cached_models=1)


def make_bucket(root: Path, models: Checkpoints, adapters: int) -> None:
    shutil.copytree(models.base, root / "models" / "base")
    for number in range(adapters):
        directory = root / "models" / f"adapter-{number}"
        shutil.copytree(models.adapter, directory)
        (directory / "serving.json").write_text('{"base": "base"}')


def tokens_a_second(server: Server, models: list[str]) -> float:
    """At least REQUESTS, and one per model, STREAMS at a time, distributed over the models in turn."""

    def ask(number: int) -> int:
        body = {
            "model": models[number % len(models)],
            "prompt": f"{number} stories of the sea:",
            "max_tokens": TOKENS,
            "ignore_eos": True,
        }
        answer = httpx2.post(f"{server.url}/v1/completions", json=body, timeout=600).raise_for_status()
        return int(answer.json()["usage"]["completion_tokens"])

    started = time.monotonic()
    with ThreadPoolExecutor(STREAMS) as clients:
        tokens = sum(clients.map(ask, range(max(REQUESTS, len(models)))))
    return tokens / (time.monotonic() - started)


def run(quick: bool) -> None:
    models, rounds = checkpoints(), QUICK_ROUNDS if quick else ROUNDS
    found: dict[str, list[float]] = {"the bare base": []}
    with tempfile.TemporaryDirectory() as room:
        bare, adapted = Path(room, "bare"), Path(room, "adapted")
        make_bucket(bare, models, 0)
        make_bucket(adapted, models, max(COUNTS))
        more = {
            "MAX_ADAPTERS": str(SLOTS),
            "MAX_CPU_ADAPTERS": str(KEPT),
            "MAX_CONCURRENT_REQUESTS": str(STREAMS),
        }
        with (
            this_service_over(bare, SETTINGS, **more) as without,
            this_service_over(adapted, SETTINGS, **more) as with_adapters,
        ):
            names = {count: [f"adapter-{number}" for number in range(count)] for count in COUNTS}
            say("warming up")
            tokens_a_second(without, ["base"])
            tokens_a_second(with_adapters, names[SLOTS])
            for number in range(rounds):
                found["the bare base"].append(tokens_a_second(without, ["base"]))
                label = "the base, beside adapters"
                found.setdefault(label, []).append(tokens_a_second(with_adapters, ["base"]))
                for count in COUNTS:
                    label = f"{count} adapters" if count > 1 else "1 adapter"
                    found.setdefault(label, []).append(tokens_a_second(with_adapters, names[count]))
                say(f"round {number + 1} of {rounds}: " + ", ".join(f"{v[-1]:.1f}" for v in found.values()))
    report(found)


def report(found: dict[str, list[float]]) -> None:
    one, bare = found["1 adapter"], found["the bare base"]

    def against(values: list[float], others: list[float]) -> list[float]:
        return [mine / other for mine, other in zip(values, others, strict=True)]

    print_table(
        ["", "tokens/s", "against 1 adapter", "against the bare base"],
        [
            [name, spread(values), spread(against(values, one)), spread(against(values, bare))]
            for name, values in found.items()
        ],
    )
    print_result(
        "adapters",
        {
            "adapters_8": round(median(against(found["8 adapters"], one)), 3),
            "adapters_32": round(median(against(found["32 adapters"], one)), 3),
            "one_over_base": round(median(against(one, bare)), 3),
            "adapters_128": round(median(against(found["128 adapters"], one)), 3),
            "four_to_a_slot": round(median(against(found["128 adapters"], found["32 adapters"])), 3),
        },
        {"streams": STREAMS, "slots": SLOTS, "base_tokens_per_s": round(median(bare), 1)},
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one round")
    run(parser.parse_args().quick)
