"""This service against vLLM's own server: same model, arguments and environment, alternating rounds.

    python -m benchmarks.serve --model .demo/models/smollm2-135m-instruct [--quick]

The client is vLLM's own `bench serve`: random prompts of 64 tokens, 64 generated, concurrency 1, 8 and 32.
One more round runs against vLLM's defaults, labelled as such. Ratios are ours over theirs, pair by pair; the
median counts.
"""

import argparse
import contextlib
import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm.benchmarks.serve import add_cli_args, main
from vllm.utils.argparse_utils import FlexibleArgumentParser

from benchmarks.report import median, print_result, print_table, say, spread
from benchmarks.servers import DidNotStart, Server, this_service, vllm_server
from inference_service.config import Settings

TOKENS = 64
# Concurrency -> prompts per round.
PROMPTS = {1: 8, 8: 32, 32: 64}
QUICK_PROMPTS = {1: 2, 8: 8, 32: 32}
ROUNDS = 3
METRICS = {
    "tokens": "output_throughput",
    "ttft_p50": "p50_ttft_ms",
    "ttft_p99": "p99_ttft_ms",
}


@dataclass(frozen=True)
class Round:
    """The results of one server in one round: concurrency -> metric -> value."""

    server: str
    results: dict[int, dict[str, float]]


def run(model: Path, quick: bool) -> None:
    settings = Settings(max_model_len=2048)
    prompts, rounds = (QUICK_PROMPTS, 1) if quick else (PROMPTS, ROUNDS)
    say("starting this service and vLLM's own server with the same arguments and environment")
    with this_service(model, settings) as ours:
        with vllm_server("vLLM's server", model, settings) as theirs:
            pairs = _alternate(model, (ours, theirs), prompts, rounds)
        defaults = [] if quick else _against_defaults(ours, model, prompts)
    _report(pairs, defaults, prompts)


def _against_defaults(ours: Server, model: Path, prompts: dict[int, int]) -> list[tuple[Round, Round]]:
    """One round against vLLM's defaults; none if that server does not start beside this service."""
    say("starting vLLM's own server with its defaults (it compiles the model first)")
    try:
        with vllm_server("vLLM's server, its defaults", model, None) as theirs:
            return _alternate(model, (ours, theirs), prompts, 1)
    except DidNotStart as error:
        say(str(error))
        return []


def _alternate(
    model: Path, servers: tuple[Server, Server], prompts: dict[int, int], rounds: int
) -> list[tuple[Round, Round]]:
    for server in servers:
        say(f"warming up: {server.name}")
        warm_up = 8 if rounds == 1 else max(prompts)
        _bench(server, model, concurrency=warm_up, prompts=warm_up, seed=999)
    pairs = []
    for number in range(rounds):
        results: dict[str, dict[int, dict[str, float]]] = {server.name: {} for server in servers}
        for cell, (concurrency, count) in enumerate(prompts.items()):
            # The order alternates from cell to cell, so that the machine's drift affects both.
            for server in servers if (number + cell) % 2 == 0 else servers[::-1]:
                # A different seed for every cell, so that no prompt hits a prefix cache.
                seed = 100 * number + concurrency
                results[server.name][concurrency] = _bench(server, model, concurrency, count, seed)
                _say_cell(number, server, concurrency, results[server.name][concurrency])
        ours, theirs = (Round(server.name, results[server.name]) for server in servers)
        pairs.append((ours, theirs))
    return pairs


def _say_cell(number: int, server: Server, concurrency: int, result: dict[str, float]) -> None:
    say(
        f"round {number + 1}, concurrency {concurrency}, {server.name}: "
        f"{result['tokens']:.1f} tokens/s, TTFT p50 {result['ttft_p50']:.0f} ms"
    )


def _bench(server: Server, model: Path, concurrency: int, prompts: int, seed: int) -> dict[str, float]:
    """One call of vLLM's `bench serve`; tokens/s and milliseconds."""
    parser = FlexibleArgumentParser()
    add_cli_args(parser)
    command = ["--backend", "openai", "--base-url", server.url, "--disable-tqdm"]
    command += ["--model", model.name, "--tokenizer", str(model), "--dataset-name", "random"]
    command += ["--random-input-len", str(TOKENS), "--random-output-len", str(TOKENS)]
    command += ["--num-prompts", str(prompts), "--max-concurrency", str(concurrency)]
    command += ["--percentile-metrics", "ttft", "--metric-percentiles", "50,99"]
    command += ["--seed", str(seed), "--temperature", "0", "--ignore-eos"]
    with contextlib.redirect_stdout(io.StringIO()):
        result: dict[str, Any] = main(parser.parse_args(command))
    if result["completed"] != prompts:
        raise RuntimeError(f"{server.name}: {result['completed']} of {prompts} requests completed")
    return {name: float(result[key]) for name, key in METRICS.items()}


def _ratios(pairs: list[tuple[Round, Round]], concurrency: int, metric: str) -> list[float]:
    return [ours.results[concurrency][metric] / theirs.results[concurrency][metric] for ours, theirs in pairs]


def _report(
    pairs: list[tuple[Round, Round]],
    defaults: list[tuple[Round, Round]],
    prompts: dict[int, int],
) -> None:
    rows, ratios = [], {}
    for name, measured in (("same arguments", pairs), ("vLLM's defaults", defaults)):
        for concurrency in prompts:
            for metric in METRICS if measured else ():
                values = _ratios(measured, concurrency, metric)
                ours, theirs = (
                    median([pair[side].results[concurrency][metric] for pair in measured]) for side in (0, 1)
                )
                key = f"{metric}_c{concurrency}"
                ratios[key if measured is pairs else f"{key}_over_defaults"] = median(values)
                rows.append([name, str(concurrency), metric, f"{ours:.1f}", f"{theirs:.1f}", spread(values)])
    print_table(["against", "concurrency", "metric", "ours", "theirs", "ours/theirs (min-max)"], rows)
    figures = {
        "rounds": len(pairs),
        "input_tokens": TOKENS,
        "output_tokens": TOKENS,
        "against_defaults": bool(defaults),
    }
    print_result("serve", ratios, figures)


if __name__ == "__main__":
    arguments = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    arguments.add_argument("--model", type=Path, required=True)
    arguments.add_argument("--quick", action="store_true", help="one round, fewer prompts")
    given = arguments.parse_args()
    run(given.model.resolve(), given.quick)
