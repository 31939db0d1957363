"""`inference-service models` and `pull`, as processes, against a real GCS server."""

import fcntl
import json
import os
import pty
import re
import shutil
import signal
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest

from inference_service import __version__
from tests.fixtures.bucket import Bucket
from tests.fixtures.checkpoints import Checkpoints
from tests.fixtures.fault_proxy import Fault, Kind, fault_proxy
from tests.fixtures.ports import free_port

COMMAND = [sys.executable, "-m", "inference_service"]


@pytest.fixture
def environment(bucket: Bucket, tmp_path: Path) -> dict[str, str]:
    return os.environ | {
        "STORAGE_EMULATOR_HOST": bucket.url,
        "GCS_BUCKET": bucket.name,
        "LOCAL_MODEL_CACHE": str(tmp_path / "cache"),
    }


def run(environment: dict[str, str], *arguments: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [*COMMAND, *arguments], env=environment, capture_output=True, text=True, timeout=120, check=False
    )


def test_models_is_a_table(environment: dict[str, str]) -> None:
    done = run(environment, "models")
    assert done.returncode == 0, done.stderr
    header, *rows = done.stdout.splitlines()
    assert header.split() == ["NAME", "KIND", "SIZE", "REVISION", "CREATED", "BASE", "STATUS"]
    by_name = {row.split()[0]: row for row in rows}
    assert list(by_name) == ["acme-smollm2-tuned", "pickled", "smollm2-135m-instruct", "some-adapter"]
    assert by_name["acme-smollm2-tuned"].endswith("ok")
    assert "cannot be served: its weights are pickles" in by_name["pickled"]
    assert "adapter" in by_name["some-adapter"]


def test_models_as_json(environment: dict[str, str]) -> None:
    entries = [json.loads(line) for line in run(environment, "models", "--json").stdout.splitlines()]
    base = next(entry for entry in entries if entry["name"] == "smollm2-135m-instruct")
    assert base["kind"] == "checkpoint"
    assert base["size"] > 100_000_000
    assert base["unservable"] is None


def test_pull_prints_where_the_snapshot_lies(environment: dict[str, str], tmp_path: Path) -> None:
    done = run(environment, "pull", "acme/smollm2-tuned")
    assert done.returncode == 0, done.stderr
    snapshot = Path(done.stdout.strip())
    assert snapshot.parent == tmp_path / "cache" / "acme-smollm2-tuned"
    assert (snapshot / "model.safetensors").stat().st_size > 100_000_000
    # No bar where there is no terminal, but a line where it takes long.
    assert "\r" not in done.stderr
    lines = done.stderr.splitlines()
    assert all(re.fullmatch(r"acme-smollm2-tuned: \d+ % of .*", line) for line in lines), lines


@pytest.fixture
def adapters(checkpoints: Checkpoints, tmp_path: Path) -> str:
    """A directory bucket with a real LoRA adapter and its base."""
    models = tmp_path / "adapters" / "models"
    models.mkdir(parents=True)
    shutil.copytree(checkpoints.adapter, models / "tuned")
    shutil.copytree(checkpoints.base, models / "smollm2-135m-instruct")
    return f"file://{models.parent}"


@pytest.mark.parametrize("engine", ["auto", "transformers", "vllm", "fake"])
def test_pull_of_an_adapter(
    environment: dict[str, str], adapters: str, tmp_path: Path, checkpoints: Checkpoints, engine: str
) -> None:
    done = run(environment | {"GCS_BUCKET": adapters, "ENGINE": engine}, "pull", "tuned")
    assert done.returncode == 0, done.stderr
    snapshot = Path(done.stdout.strip())
    assert snapshot.parent == tmp_path / "cache" / "tuned"
    weights = "adapter_model.safetensors"
    assert (snapshot / weights).read_bytes() == (checkpoints.adapter / weights).read_bytes()
    assert "tuned is an adapter of smollm2-135m-instruct, which is not here: pull it too." in done.stderr


def test_pull_of_an_adapter_that_cannot_be_served(environment: dict[str, str], adapters: str) -> None:
    model = Path(adapters.removeprefix("file://")) / "models" / "tuned"
    config = json.loads((model / "adapter_config.json").read_text())
    (model / "adapter_config.json").write_text(json.dumps(config | {"use_dora": True}))
    done = run(environment | {"GCS_BUCKET": adapters}, "pull", "tuned")
    assert (done.returncode, done.stdout) == (1, "")
    assert "use_dora" in done.stderr


def test_pull_judges_for_the_engine_that_would_serve(environment: dict[str, str], adapters: str) -> None:
    """What vLLM has and transformers has not, and the other way round, is refused for the one only."""
    model = Path(adapters.removeprefix("file://")) / "models" / "smollm2-135m-instruct"
    (model / "serving.json").write_text('{"quantization": "fp8"}')
    for engine, words in (("vllm", ""), ("transformers", "quantization requires the vLLM backend")):
        done = run(environment | {"GCS_BUCKET": adapters, "ENGINE": engine}, "pull", "smollm2-135m-instruct")
        assert words in done.stderr
        assert done.returncode == bool(words)


def test_pull_draws_a_bar_on_a_terminal(environment: dict[str, str]) -> None:
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))
    with subprocess.Popen(
        [*COMMAND, "pull", "smollm2-135m-instruct"], env=environment, stdout=subprocess.PIPE, stderr=theirs
    ) as pulling:
        os.close(theirs)
        drawn = b""
        while True:
            try:
                piece = os.read(ours, 4096)
            except OSError:  # the terminal's other end is closed
                break
            if not piece:
                break
            drawn += piece
        os.close(ours)
    assert pulling.returncode == 0
    assert b"smollm2-135m-instruct: 100%" in drawn


@pytest.mark.parametrize(
    ("arguments", "changes", "code", "words"),
    [
        (["pull", "nobody"], {}, 1, "The model 'nobody' does not exist in the bucket"),
        (["pull", "pickled"], {}, 1, "The model 'pickled' cannot be served: its weights are pickles"),
        (["models"], {"GCS_BUCKET": "nobody-has-this"}, 1, "gs://nobody-has-this"),
        (["models"], {"GCS_BUCKET": "A"}, 2, "GCS_BUCKET='A' is not allowed"),
        (["pull", "smollm2-135m-instruct"], {"DISK_CACHE_GIB": "0.1"}, 1, "DISK_CACHE_GIB"),
        (
            ["pull", "smollm2-135m-instruct"],
            {"LOCAL_MODEL_CACHE": "/proc/no"},
            1,
            "LOCAL_MODEL_CACHE=/proc/no",
        ),
        (["dance"], {}, 2, "invalid choice"),
    ],
)
def test_an_error_is_one_line(
    environment: dict[str, str], arguments: list[str], changes: dict[str, str], code: int, words: str
) -> None:
    done = run(environment | changes, *arguments)
    assert (done.returncode, done.stdout) == (code, "")
    assert words in done.stderr
    assert "Traceback" not in done.stderr


def test_a_store_that_is_away(environment: dict[str, str]) -> None:
    away = environment | {"STORAGE_EMULATOR_HOST": f"http://127.0.0.1:{free_port()}"}
    done = run(away, "models")
    assert done.returncode == 1
    assert "Cannot list gs://fine-tunes/models/" in done.stderr
    assert "Connection refused" in done.stderr


def test_an_empty_directory(environment: dict[str, str], tmp_path: Path) -> None:
    done = run(environment | {"GCS_BUCKET": f"file://{tmp_path}"}, "models")
    assert "No models below models/" in done.stdout


def test_pull_refuses_what_no_machine_may_run(environment: dict[str, str], tmp_path: Path) -> None:
    model = tmp_path / "bucket" / "models" / "m"
    model.mkdir(parents=True)
    (model / "config.json").write_text(
        '{"architectures": ["LlamaForCausalLM"], "auto_map": {"AutoModel": "x.Y"}}'
    )
    (model / "tokenizer.json").write_text("{}")
    (model / "model.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")
    done = run(environment | {"GCS_BUCKET": f"file://{tmp_path / 'bucket'}"}, "pull", "m")
    assert done.returncode == 1
    assert "auto_map" in done.stderr
    assert not (tmp_path / "cache" / "m").exists()


def test_ctrl_c_keeps_what_has_arrived(environment: dict[str, str], bucket: Bucket, tmp_path: Path) -> None:
    with fault_proxy(bucket.url) as proxy:
        proxy.faults = [Fault(Kind.CAP, after=4 << 20, times=10_000)]
        pulling = subprocess.Popen(
            # As a shell starts what runs in its background: with Ctrl-C ignored.
            ["bash", "-c", 'trap "" INT; exec "$@"', "_", *COMMAND, "pull", "smollm2-135m-instruct"],
            env=environment | {"STORAGE_EMULATOR_HOST": proxy.url},
            stderr=subprocess.PIPE,
            text=True,
        )
        with pulling:
            deadline = time.monotonic() + 60
            while proxy.media_bytes < 60 << 20:
                assert time.monotonic() < deadline
                time.sleep(0.05)
            pulling.send_signal(signal.SIGINT)
            assert pulling.stderr is not None
            said = pulling.stderr.read()
        assert pulling.returncode == 130
        assert "what has arrived is kept" in said
        assert "100%" not in said
        proxy.clear()
        assert (
            run(
                environment | {"STORAGE_EMULATOR_HOST": proxy.url}, "pull", "smollm2-135m-instruct"
            ).returncode
            == 0
        )
        assert proxy.media_bytes < 240 << 20, "it went on where it stopped"


def test_a_reader_that_has_seen_enough(environment: dict[str, str]) -> None:
    command = " ".join(COMMAND)
    done = subprocess.run(
        ["bash", "-c", f"{command} models --json | head -c 1"],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stderr == ""


def test_the_version(environment: dict[str, str]) -> None:
    assert run(environment, "--version").stdout == f"inference-service {__version__}\n"
