"""lm-eval through this service's transformers backend against lm-eval's own transformers backend.

    python -m benchmarks.lm_eval --model .demo/models/smollm2-135m-instruct --lm-eval .venv-lm-eval/bin/python

The same questions (a local file, so that nothing is downloaded), once over `local-completions`, which uses
echo with log probabilities, and once with `hf`. Compares the log likelihood of every choice, and the scores.
"""

import argparse
import json
import os
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.report import print_result, print_table, say
from benchmarks.servers import this_service
from inference_service.config import Settings

TASKS = Path(__file__).parent / "lm_eval_tasks"
TASK = "facts"


def run(model: Path, python: Path) -> None:
    settings = Settings(max_model_len=2048)
    with tempfile.TemporaryDirectory() as room:
        tasks = _tasks(Path(room))
        say("lm-eval over HTTP: the transformers backend")
        with this_service(model, settings, ENGINE="transformers", DTYPE="float32") as server:
            arguments = (
                f"base_url={server.url}/v1/completions,model={model.name},tokenizer={model},"
                "tokenizer_backend=huggingface,num_concurrent=4,max_length=2048"
            )
            ours = _evaluate(python, "local-completions", arguments, tasks, Path(room, "ours"))
        say("lm-eval with its own transformers backend")
        own = f"pretrained={model},dtype=float32,max_length=2048"
        theirs = _evaluate(python, "hf", own, tasks, Path(room, "theirs"))
    _report(ours, theirs)


def _tasks(room: Path) -> Path:
    directory = room / "tasks"
    directory.mkdir()
    text = (TASKS / f"{TASK}.yaml").read_text().replace("DIRECTORY", str(directory))
    (directory / f"{TASK}.yaml").write_text(text)
    (directory / f"{TASK}.jsonl").write_bytes((TASKS / f"{TASK}.jsonl").read_bytes())
    return directory


def _evaluate(python: Path, backend: str, arguments: str, tasks: Path, output: Path) -> dict[str, Any]:
    """lm-eval's `results`, and under `likelihoods` the log likelihood of each choice."""
    command = [str(python), "-m", "lm_eval", "run", "--model", backend, "--model_args", arguments]
    command += ["--tasks", TASK, "--include_path", str(tasks), "--device", "cpu"]
    command += ["--log_samples", "--output_path", str(output)]
    environment = os.environ | {
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_CACHE": str(output / "datasets"),
        "OPENAI_API_KEY": "none",
        "OMP_NUM_THREADS": str(len(os.sched_getaffinity(0))),
    }
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if ended.returncode:
        raise SystemExit(f"lm-eval failed:\n{ended.stderr[-3000:]}")
    results: dict[str, Any] = json.loads(next(output.rglob("results_*.json")).read_text())["results"][TASK]
    samples = [json.loads(line) for line in next(output.rglob("samples_*.jsonl")).read_text().splitlines()]
    samples.sort(key=lambda sample: sample["doc_id"])
    likelihoods = [float(each[0][0]) for sample in samples for each in sample["resps"]]
    return {"results": results, "likelihoods": likelihoods}


def _report(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    metrics = [
        name for name, value in theirs["results"].items() if name.endswith(",none") and "stderr" not in name
    ]
    rows = [[name, f"{ours['results'][name]:.4f}", f"{theirs['results'][name]:.4f}"] for name in metrics]
    print_table(["metric", "this service", "lm-eval's own"], rows)
    pairs = list(zip(ours["likelihoods"], theirs["likelihoods"], strict=True))
    worst = max(abs(one - other) for one, other in pairs)
    print(f"log likelihoods of {len(pairs)} choices differ by at most {worst:.2e}")
    apart = max(abs(ours["results"][name] - theirs["results"][name]) for name in metrics)
    print_result("lm_eval", {}, {"worst_log_likelihood": worst, "worst_metric": apart, "choices": len(pairs)})
    if worst > 1e-3 or apart > 1e-3:
        raise SystemExit("the results differ by more than 1e-3")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--lm-eval", type=Path, required=True, dest="python")
    given = parser.parse_args()
    run(given.model.absolute(), given.python.absolute())
