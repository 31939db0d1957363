"""Bad input gets a clear 400 that names the field."""

import json
import tracemalloc
from typing import Any

import pytest

from inference_service.api.body import parse
from inference_service.api.schemas.requests import ChatBody, CompletionBody
from inference_service.errors import InvalidRequest

MESSAGES = [{"role": "user", "content": "hi"}]


def chat(**fields: Any) -> bytes:
    return json.dumps({"model": "m", "messages": MESSAGES, **fields}).encode()


def completion(**fields: Any) -> bytes:
    return json.dumps({"model": "m", "prompt": "hi", **fields}).encode()


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"model": None}, "model"),
        ({"model": ""}, "model"),
        ({"model": 5}, "model"),
        ({"messages": []}, "messages"),
        ({"messages": "hi"}, "messages"),
        ({"messages": [1]}, "messages"),
        ({"stream": "yes"}, "stream"),
        ({"max_tokens": True}, "max_tokens"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": "5"}, "max_tokens"),
        ({"max_tokens": 2**31}, "max_tokens"),
        ({"max_completion_tokens": -1}, "max_completion_tokens"),
        ({"n": 0}, "n"),
        ({"n": 10**9}, "n"),
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": 2.1}, "temperature"),
        ({"temperature": True}, "temperature"),
        ({"top_p": 1.5}, "top_p"),
        ({"seed": 2**64}, "seed"),
        ({"stop": [1]}, "stop"),
        ({"stop": ["x"] * 65}, "stop"),
        ({"top_logprobs": 21}, "top_logprobs"),
        ({"top_k": 2**31}, "top_k"),
        ({"logit_bias": {str(n): 1 for n in range(1025)}}, "logit_bias"),
        ({"stream_options": {"include_usage": 1}}, "stream_options"),
        ({"chat_template": "{{ x }}"}, "chat_template"),
    ],
)
def test_chat_fields(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        parse(chat(**fields), ChatBody)
    assert caught.value.param == param
    assert param in caught.value.message


def test_a_field_of_several_types_says_all_of_them() -> None:
    for fields, expected in (
        ({"temperature": "hot"}, "should be a valid integer or a valid number."),
        ({"temperature": 3}, "should be less than or equal to 2."),
        ({"stop": 5}, "should be a valid string or a valid list."),
    ):
        with pytest.raises(InvalidRequest) as caught:
            parse(chat(**fields), ChatBody)
        assert caught.value.message.endswith(f"Input {expected}")


@pytest.mark.parametrize(
    "fields",
    [
        {"prompt": []},
        {"prompt": [[]]},
        {"prompt": [-1]},
        {"prompt": ["a", 1]},
        {"prompt": {"a": 1}},
        {"prompt": ["x"] * 2049},
        {"suffix": "end"},
        {"logprobs": True},
    ],
)
def test_completion_fields(fields: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest) as caught:
        parse(completion(**fields), CompletionBody)
    assert caught.value.param == next(iter(fields))


@pytest.mark.parametrize("prompt", ["hi", ["a", "b"], [1, 2, 3], [[1], [2, 3]]])
def test_every_kind_of_prompt(prompt: Any) -> None:
    body = parse(completion(prompt=prompt), CompletionBody)
    assert json.loads(body.forwarded("m"))["prompt"] == prompt


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"null",
        b"[]",
        b"{",
        b"\xff\xfe",
        b'{"model": "m", "messages": [{"role": "user", "content": "\\ud800"}]}',
        b'{"model": "m", "messages": [{}], "temperature": NaN}',
        b'{"model": "m", "messages": [{}], "temperature": Infinity}',
        b'{"model": "m", "messages": [{}], "temperature": 1e999}',
        b'{"model": "m", "messages": [{}], "other": 1e999}',
        b'{"model": "m", "messages": [{}], "other": ' + b"9" * 305 + b"e10}",
        b'{"model": "m", "messages": [{}], "other": [99999999999999999999]}',
        b"[" * 100_000,
    ],
)
def test_what_is_no_strict_json_object(raw: bytes) -> None:
    with pytest.raises(InvalidRequest):
        parse(raw, ChatBody)


@pytest.mark.parametrize("prompt", ['""', "-1", '[""]', "{}"])
def test_a_million_wrong_elements_are_one_error(prompt: str) -> None:
    """Counted in memory, not in time: an error object for each would be gigabytes."""
    raw = f'{{"model": "m", "prompt": [{",".join([prompt] * 300_000)}]}}'.encode()
    tracemalloc.start()
    with pytest.raises(InvalidRequest):
        parse(raw, CompletionBody)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 64 << 20


def test_other_fields_pass_through_unchanged() -> None:
    fields = {"tools": [{"type": "function"}], "ignore_eos": True, "temperature": 1}
    sent = json.loads(parse(chat(**fields), ChatBody).forwarded("canonical"))
    assert sent == {"model": "canonical", "messages": MESSAGES, **fields}


def test_a_stream_always_reports_usage_to_the_service() -> None:
    body = parse(chat(stream=True, stream_options={"include_usage": False, "x": 1}), ChatBody)
    assert not body.wants_usage
    assert json.loads(body.forwarded("m"))["stream_options"] == {"include_usage": True, "x": 1}
    assert json.loads(parse(chat(stream=True), ChatBody).forwarded("m"))["stream_options"] == {
        "include_usage": True
    }


def test_a_duplicate_key_reaches_the_engine_once() -> None:
    raw = b'{"model": "a", "model": "b", "messages": [{"role": "user", "content": "x"}]}'
    assert parse(raw, ChatBody).forwarded("b").count(b"model") == 1
