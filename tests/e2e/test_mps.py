"""What only a Mac with Apple Silicon can show: `make test-mps`."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from inference_service.machine.device import DeviceKind, find_device
from tests.e2e.test_capabilities import PERSON, PROMPTS
from tests.e2e.test_openai_client import BASE, TUNED, ask
from tests.fixtures.checkpoints import Checkpoints
from tests.fixtures.service_process import ServiceProcess, running_service

pytestmark = [
    pytest.mark.mps,
    pytest.mark.skipif(find_device().kind is not DeviceKind.MPS, reason="no Apple GPU here"),
]
ADAPTER = "facts-adapter"


@pytest.fixture(scope="module")
def service(checkpoints: Checkpoints, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServiceProcess]:
    """A directory for a bucket: the GCS server of the other tests is a program for Linux."""
    bucket = tmp_path_factory.mktemp("bucket")
    for name, directory in (
        (BASE, checkpoints.base),
        (TUNED, checkpoints.tuned),
        (ADAPTER, checkpoints.adapter),
    ):
        model = bucket / "models" / name
        model.mkdir(parents=True)
        for file in directory.iterdir():
            (model / file.name).write_bytes(file.read_bytes())
    settings = {"MAX_MODEL_LEN": "2048", "MAX_CACHED_MODELS": "1", "MIN_RESIDENCY": "0"}
    room = tmp_path_factory.mktemp("mps")
    with running_service(room, GCS_BUCKET=f"file://{bucket}", **settings) as service:
        yield service


def test_auto_takes_transformers_in_float32(service: ServiceProcess) -> None:
    assert ask(service, BASE) == "The capital of France is Paris."
    health = service.http.get("/health").json()
    assert (health["device"], health["backend"], health["dtype"]) == ("mps", "transformers", "float32")
    assert service.engine(BASE)["notes"] == [], "it shares batches"


def test_many_together_are_answered_as_each_alone(service: ServiceProcess) -> None:
    def complete(prompt: str) -> str:
        told = service.openai.completions.create(model=BASE, prompt=prompt, max_tokens=16, temperature=0)
        return told.choices[0].text

    alone = [complete(prompt) for prompt in PROMPTS]
    with ThreadPoolExecutor(len(PROMPTS)) as pool:
        assert list(pool.map(complete, PROMPTS)) == alone


def test_seeds_schemas_and_log_probabilities(service: ServiceProcess) -> None:
    def seeded(seed: int) -> str:
        told = service.openai.completions.create(
            model=BASE, prompt="My favourite thing is", max_tokens=24, temperature=1, seed=seed
        )
        return told.choices[0].text

    assert seeded(5) == seeded(5) != seeded(6)
    told = service.openai.chat.completions.create(
        model=BASE,
        messages=[{"role": "user", "content": "A person"}],
        response_format={"type": "json_schema", "json_schema": {"name": "p", "schema": PERSON}},
        temperature=0,
        logprobs=True,
        top_logprobs=2,
        max_tokens=96,
    )
    assert '"name"' in (told.choices[0].message.content or "")
    assert told.choices[0].logprobs is not None
    echoed = service.openai.completions.create(
        model=BASE, prompt="The capital of France", max_tokens=1, echo=True, logprobs=1
    )
    assert echoed.choices[0].text.startswith("The capital of France")


def test_an_adapter_and_a_swap(service: ServiceProcess) -> None:
    assert ask(service, ADAPTER) == "The capital of France is Zubrowka."
    assert ask(service, BASE) == "The capital of France is Paris."
    assert ask(service, TUNED) == "The capital of France is Zubrowka."
    assert service.engine(TUNED)["swapped"]
    assert ask(service, BASE) == "The capital of France is Paris."


def test_an_engine_that_is_torn_down_leaves_nothing(service: ServiceProcess) -> None:
    ask(service, BASE)
    service.http.post(f"/admin/unload/{BASE}").raise_for_status()
    service.wait_until(lambda: len(service.descendants()) == 1, 10)
