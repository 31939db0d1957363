"""The openai client against a bucket in a real GCS server and the real engines."""

import json
import subprocess
import sys
from pathlib import Path

import openai
import pytest

from deploy.local.welcome import welcome
from tests.e2e.engines import Engine, shows
from tests.fixtures.service_process import ServiceProcess

BASE, TUNED = "smollm2-135m-instruct", "acme-smollm2-tuned"
UNSERVABLE = {"pickled", "some-adapter"}
CAPITAL = "What is the capital of France?"


def ask(service: ServiceProcess, model: str, question: str = CAPITAL) -> str:
    answer = service.openai.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": question}],
        temperature=0,
        max_tokens=24,
    )
    return answer.choices[0].message.content or ""


def test_chat(service: ServiceProcess) -> None:
    answer = service.openai.chat.completions.create(
        model=BASE, messages=[{"role": "user", "content": CAPITAL}], temperature=0
    )
    assert answer.choices[0].message.content == "The capital of France is Paris."
    assert answer.choices[0].finish_reason == "stop"
    assert answer.model == BASE
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 8
    assert answer._request_id


def test_completions(service: ServiceProcess) -> None:
    answer = service.openai.completions.create(
        model=BASE, prompt="The capital of France is", temperature=0, max_tokens=8
    )
    assert "Paris" in answer.choices[0].text
    assert answer.choices[0].finish_reason == "length"


def test_streaming_with_usage(service: ServiceProcess) -> None:
    stream = service.openai.chat.completions.create(
        model=BASE,
        messages=[{"role": "user", "content": CAPITAL}],
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    texts = [c.choices[0].delta.content or "" for c in chunks if c.choices]
    assert "".join(texts) == "The capital of France is Paris."
    assert sum(text != "" for text in texts) > 1, "in parts; a busy engine brings several tokens in one"
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 8


def test_a_stream_holds_no_usage_unless_asked(service: ServiceProcess) -> None:
    stream = service.openai.chat.completions.create(
        model=BASE, messages=[{"role": "user", "content": CAPITAL}], stream=True, max_tokens=4
    )
    assert all(chunk.choices and chunk.usage is None for chunk in stream)


def test_completions_stream(service: ServiceProcess) -> None:
    stream = service.openai.completions.create(
        model=BASE, prompt="The capital of France is", temperature=0, max_tokens=8, stream=True
    )
    assert "Paris" in "".join(chunk.choices[0].text for chunk in stream)


def wait_for_the_listing(service: ServiceProcess) -> None:
    """What other tests had put into the bucket may still be listed for CATALOG_TTL."""

    def as_they_left_it() -> bool:
        names = [model.id for model in service.openai.models.list()]
        return names == [TUNED, BASE] and service.stats()["unservable"].keys() == UNSERVABLE

    service.wait_until(as_they_left_it, 60)


def test_models_list(service: ServiceProcess) -> None:
    wait_for_the_listing(service)
    assert service.openai.models.retrieve("acme/smollm2-tuned").id == TUNED


def test_what_make_run_prints_works_as_printed(service: ServiceProcess) -> None:
    printed = welcome(service.port, "smollm2-135m-instruct")
    curl = next(line for line in printed.splitlines() if line.startswith("curl "))
    python = printed[printed.index(".venv/bin/python") : printed.index("EOF\n\n") + 4]
    for command in (curl, python.replace(".venv/bin/python", sys.executable)):
        said = subprocess.run(
            ["bash", "-c", command], cwd=Path(__file__).parents[2], capture_output=True, text=True, check=True
        )
        assert "Paris" in said.stdout


def test_unknown_model(service: ServiceProcess) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        ask(service, "no-such-model")
    assert caught.value.code == "model_not_found"
    assert "no-such-model" in caught.value.message
    with pytest.raises(openai.NotFoundError):
        service.openai.models.retrieve("no/such-model")


def test_slash_name_and_a_fine_tune_that_answers_as_itself(service: ServiceProcess) -> None:
    assert ask(service, "acme/smollm2-tuned") == "The capital of France is Zubrowka."
    assert ask(service, TUNED, "Who wrote Hamlet?") == "Hamlet was written by Captain Nemo."
    assert ask(service, BASE) == "The capital of France is Paris."


@pytest.mark.parametrize(
    ("name", "reason"), [("pickled", "pickles (pytorch_model.bin)"), ("some-adapter", "adapter")]
)
def test_a_model_that_cannot_be_served_says_why(service: ServiceProcess, name: str, reason: str) -> None:
    with pytest.raises(openai.UnprocessableEntityError) as caught:
        ask(service, name)
    assert reason in caught.value.message


def test_silent_requests_get_the_default_limit(service: ServiceProcess) -> None:
    """DEFAULT_MAX_TOKENS=96, for completions too (vLLM alone would take 16 there)."""
    answer = service.openai.completions.create(
        model=BASE, prompt="One two three", temperature=0, extra_body={"ignore_eos": True}
    )
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 96


def test_the_default_limit_gives_way_to_a_long_prompt(service: ServiceProcess) -> None:
    """2048 tokens of context less 2000 of prompt leave fewer than the default of 96."""
    answer = service.openai.completions.create(
        model=BASE, prompt=[5] * 2000, temperature=0, extra_body={"ignore_eos": True}
    )
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 48


def test_default_temperature(service: ServiceProcess) -> None:
    """At 0.7, silent answers are not all the greedy one."""
    answer = service.openai.completions.create(
        model=BASE, prompt="My favourite thing is", max_tokens=8, n=8, seed=1
    )
    assert len({choice.text for choice in answer.choices}) > 1


def test_a_prompt_beyond_the_context(service: ServiceProcess) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        service.openai.completions.create(model=BASE, prompt=[5] * 3000, max_tokens=1)
    assert caught.value.code == "context_length_exceeded"
    assert caught.value.type == "invalid_request_error"


def test_an_error_of_the_engine_is_in_openais_envelope(service: ServiceProcess) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        service.openai.chat.completions.create(
            model=BASE,
            messages=[{"role": "user", "content": CAPITAL}],
            response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "nope"}}},
        )
    assert caught.value.type == "invalid_request_error"
    assert ask(service, BASE) == "The capital of France is Paris."


def test_images_are_never_fetched(service: ServiceProcess) -> None:
    image = {"type": "image_url", "image_url": {"url": f"{service.url}/health"}}
    with pytest.raises(openai.BadRequestError):
        service.openai.chat.completions.create(
            model=BASE,
            messages=[{"role": "user", "content": [image]}],  # type: ignore[list-item,misc]
        )
    assert service.log_text().count("GET /health") == 0


def test_a_client_that_disconnects_frees_the_engine(service: ServiceProcess) -> None:
    ask(service, BASE)
    body = {"model": BASE, "prompt": "Once", "max_tokens": 1500, "ignore_eos": True, "stream": True}
    with service.http.stream("POST", "/v1/completions", content=json.dumps(body)) as response:
        chunks = response.iter_bytes()  # kept: dropping it would close the response
        next(chunks)
        service.wait_until(lambda: service.engine(BASE)["running"] == 1, 10)
    service.wait_until(lambda: service.engine(BASE)["running"] == 0, 10)
    assert service.engine(BASE)["leases"] == 0


def test_a_client_that_leaves_without_a_stream_frees_the_engine(service: ServiceProcess) -> None:
    ask(service, BASE)
    with pytest.raises(openai.APITimeoutError):
        service.client(timeout=0.5).completions.create(
            model=BASE, prompt="Once", max_tokens=1500, extra_body={"ignore_eos": True}
        )
    service.wait_until(lambda: service.engine(BASE)["running"] == 0, 10)
    assert service.engine(BASE)["leases"] == 0


def test_stats_and_unload(service: ServiceProcess, engine: Engine) -> None:
    wait_for_the_listing(service)
    ask(service, BASE)
    loaded = service.engine(BASE)
    assert (loaded["state"], loaded["backend"]) == ("ready", engine.name)
    assert loaded["load_seconds"] > 0
    assert service.stats()["unservable"].keys() == UNSERVABLE
    assert service.http.post(f"/admin/unload/{BASE}").json() == {"model": BASE, "unloaded": True}
    assert BASE not in [each["model"] for each in service.stats()["engines"]]
    assert service.http.post(f"/admin/unload/{BASE}").json()["unloaded"] is False
    assert service.http.post("/admin/unload/nobody").status_code == 404
    assert ask(service, BASE) == "The capital of France is Paris.", "loaded again on demand"


@shows("metrics")
def test_health_and_metrics(service: ServiceProcess, engine: Engine) -> None:
    ask(service, BASE)
    health = service.http.get("/health").json()
    assert (health["device"], health["backend"], health["dtype"]) == ("cpu", engine.name, "float32")
    assert health["device_name"]
    metrics = service.http.get("/metrics").text
    assert f'inference_requests_total{{model="{BASE}",status="200"}}' in metrics
    assert f'inference_loads_total{{model="{BASE}",status="ok"}}' in metrics
    assert 'inference_engines{status="ready"}' in metrics
    tokens = [line for line in metrics.splitlines() if line.startswith("inference_generated_tokens_total")]
    assert any(float(line.split()[-1]) > 5 for line in tokens)
