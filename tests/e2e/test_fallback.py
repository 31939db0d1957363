"""ENGINE=auto where vLLM lacks an architecture: transformers serves it, and says so."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest

from tests.fixtures.checkpoints import Checkpoints
from tests.fixtures.service_process import ServiceProcess, running_service
from tests.fixtures.tiny import make_tiny


@pytest.fixture(scope="module")
def bucket(checkpoints: Checkpoints, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """GPT-Neo, which vLLM does not run, and whose layers share no batch."""
    bucket = tmp_path_factory.mktemp("bucket")
    model = bucket / "models" / "neo"
    model.parent.mkdir(parents=True)
    make_tiny(checkpoints.base, tmp_path_factory.mktemp("tiny")).neo.rename(model)
    shutil.copytree(model, model.with_name("neo-2"))
    return bucket


def settings(bucket: Path, engine: str) -> dict[str, str]:
    return {"GCS_BUCKET": f"file://{bucket}", "ENGINE": engine, "DTYPE": "float32"}


@pytest.fixture(scope="module")
def service(bucket: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServiceProcess]:
    more = {"MAX_CACHED_MODELS": "1", "MIN_RESIDENCY": "0"}
    with running_service(tmp_path_factory.mktemp("auto"), **settings(bucket, "auto"), **more) as service:
        yield service


def complete(service: ServiceProcess, **options: object) -> str:
    told = service.openai.completions.create(model="neo", prompt="Once", max_tokens=6, **options)  # type: ignore[call-overload]
    return str(told.choices[0].text)


def test_transformers_takes_over_and_says_so(service: ServiceProcess) -> None:
    assert complete(service, temperature=0) == complete(service, temperature=0)
    health = service.http.get("/health").json()
    assert health["backend"] == "vllm"
    notes = health["notes"]["neo"]
    assert any("vLLM does not run this architecture" in note for note in notes)
    assert any("one at a time" in note for note in notes)
    engine = service.engine("neo")
    assert (engine["backend"], engine["notes"]) == ("transformers", notes)
    assert "using the transformers backend" in service.log_text()


def test_a_stream_and_a_client_that_leaves(service: ServiceProcess) -> None:
    body = {"model": "neo", "prompt": "Once", "max_tokens": 400, "ignore_eos": True, "stream": True}
    with service.http.stream("POST", "/v1/completions", content=json.dumps(body)) as response:
        chunks = response.iter_bytes()
        next(chunks)
    service.wait_until(lambda: service.engine("neo")["running"] == 0, 5)
    assert complete(service)


def test_weights_are_swapped_there_too(service: ServiceProcess) -> None:
    process = service.engine("neo")["process_id"]
    expected = complete(service, temperature=0)
    told = service.openai.completions.create(model="neo-2", prompt="Once", max_tokens=6, temperature=0)
    assert told.choices[0].text == expected, "the same weights"
    assert told.model == "neo-2"
    engine = service.engine("neo-2")
    assert (engine["swapped"], engine["process_id"]) == (True, process)
    assert any("vLLM does not run this architecture" in note for note in engine["notes"])


def test_vllm_alone_refuses(bucket: Path, tmp_path: Path) -> None:
    with (
        running_service(tmp_path, **settings(bucket, "vllm")) as service,
        pytest.raises(openai.InternalServerError, match="architecture is not supported"),
    ):
        complete(service)
