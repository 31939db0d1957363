"""The transformers host's own HTTP, in this process."""

import json
from collections.abc import AsyncIterator
from typing import Any

import httpx2
import pytest
from tokenizers.processors import TemplateProcessing

from inference_service.hosts.transformers.generation.engine import Engine
from inference_service.hosts.transformers.openai.detokenizer import TokenTexts
from inference_service.hosts.transformers.openai.serving import Served
from inference_service.hosts.transformers.server import build_app
from tests.fixtures.tiny import Tiny
from tests.hosts.transformers.conftest import Start

MARK = "<|im_start|>"


@pytest.fixture
def engine(start: Start, tiny: Tiny) -> Engine:
    return start(tiny.llama)


@pytest.fixture
async def client(engine: Engine) -> AsyncIterator[httpx2.AsyncClient]:
    app = build_app(Served(engine, "m", 16, False, TokenTexts(engine.tokenizer)), [])
    async with httpx2.AsyncClient(
        transport=httpx2.ASGITransport(app=app), base_url="http://host", timeout=60
    ) as client:
        yield client


async def complete(client: httpx2.AsyncClient, **fields: Any) -> httpx2.Response:
    return await client.post("/v1/completions", json={"model": "m", "temperature": 0, **fields})


@pytest.fixture
def marking(engine: Engine) -> None:
    """Its tokenizer puts a mark before each text, as Llama's, Mistral's and Gemma's do."""
    mark = engine.tokenizer.convert_tokens_to_ids(MARK)
    engine.tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{MARK} $A", special_tokens=[(MARK, mark)]
    )


@pytest.mark.usefixtures("marking")
@pytest.mark.parametrize("logprobs", [None, 1])
async def test_an_echoed_prompt_is_the_clients_own(client: httpx2.AsyncClient, logprobs: int | None) -> None:
    fields: dict[str, Any] = {"prompt": ["Hello there", "Ho"], "max_tokens": 3, "logprobs": logprobs}
    plain = (await complete(client, **fields)).json()
    echoed = (await complete(client, **fields, echo=True)).json()
    for prompt, one, other in zip(fields["prompt"], plain["choices"], echoed["choices"], strict=True):
        assert other["text"] == prompt + one["text"]
    assert echoed["usage"] == plain["usage"]
    if logprobs is not None:
        assert echoed["choices"][0]["logprobs"]["tokens"][0] == MARK
    answer = await complete(client, **fields, echo=True, stream=True)
    events = [json.loads(line[6:]) for line in answer.text.splitlines() if line.startswith("data: {")]
    first = [event["choices"][0] for event in events if event["choices"][0]["index"] == 0]
    assert "".join(part["text"] for part in first) == echoed["choices"][0]["text"]


@pytest.mark.usefixtures("marking")
async def test_echoed_tokens_are_told_as_text(client: httpx2.AsyncClient, engine: Engine) -> None:
    tokens = engine.tokenizer("Hello there")["input_ids"]
    told = (await complete(client, prompt=tokens, max_tokens=0, echo=True)).json()
    assert told["choices"][0]["text"] == f"{MARK}Hello there"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
async def test_a_fault_of_ours_is_one_requests_and_told(
    client: httpx2.AsyncClient,
    engine: Engine,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    path: str,
    stream: bool,
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise TypeError("of no use")

    body = {"model": "m", "prompt": "x", "messages": [{"role": "user", "content": "x"}], "stream": stream}
    monkeypatch.setattr(engine, "submit", fail)
    answer = await client.post(path, json=body)
    assert answer.status_code == (200 if stream else 500)
    told = answer.text.splitlines()[-2].removeprefix("data: ") if stream else answer.text
    assert "[DONE]" not in answer.text
    error = json.loads(told)["error"]
    assert (error["code"], error["type"]) == (500, "internal_error")
    assert "TypeError: of no use" in error["message"]
    assert "Traceback" in caplog.text
    monkeypatch.undo()
    assert (await client.post(path, json=body)).status_code == 200


async def test_a_prompt_too_long_for_the_memory_that_is_free_is_not_scored(
    client: httpx2.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Up to some length the memory is reserved; beyond it is looked at."""
    monkeypatch.setattr(
        "inference_service.hosts.transformers.generation.engine.free_bytes", lambda device: 300 << 20
    )
    monkeypatch.setattr("inference_service.hosts.transformers.generation.engine.ENOUGH_TOKENS", 100)
    fields: dict[str, Any] = {"echo": True, "logprobs": 0, "max_tokens": 0}
    assert (await complete(client, prompt=[5] * 100, **fields)).status_code == 200
    refused = await complete(client, prompt=[5] * 101, **fields)
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "prompt")
    assert "300 MiB are free. Send a shorter prompt." in refused.json()["error"]["message"]


async def test_a_conversation_with_half_a_pair_is_refused(client: httpx2.AsyncClient) -> None:
    call = {"type": "function", "function": {"name": "time", "arguments": '{"x": "\\ud83d"}'}}
    messages = [{"role": "user", "content": "x"}, {"role": "assistant", "tool_calls": [call]}]
    answer = await client.post("/v1/chat/completions", json={"model": "m", "messages": messages})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "messages"
