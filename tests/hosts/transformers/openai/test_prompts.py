"""From messages to tokens, where a model and its tokenizer do not go together."""

import pytest

from tests.fixtures.tiny import VOCABULARY, Tiny  # isort: skip  (before transformers: it is to stay offline)
from transformers import AutoTokenizer

from inference_service.hosts.transformers.generation.checkpoint import Bounds
from inference_service.hosts.transformers.openai.errors import RequestError
from inference_service.hosts.transformers.openai.prompts import (
    chat_prompt,
    completion_prompts,
    room_for_answer,
)
from inference_service.hosts.transformers.openai.protocol import parse_chat, parse_completion

BOUNDS = Bounds(VOCABULARY, tokens=100, characters=1000)


def test_a_token_without_an_embedding_is_refused(tiny: Tiny) -> None:
    """One such row would end the batch of everybody."""
    tokenizer = AutoTokenizer.from_pretrained(tiny.llama)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    chat = parse_chat({"messages": [{"role": "user", "content": "a [PAD] b"}]})
    with pytest.raises(RequestError, match=f"token {VOCABULARY} is outside the model's vocabulary"):
        chat_prompt(tokenizer, chat, BOUNDS, with_tools=False)
    with pytest.raises(RequestError, match="outside the model's vocabulary"):
        completion_prompts(tokenizer, parse_completion({"prompt": "a [PAD] b"}), BOUNDS)
    plain = parse_chat({"messages": [{"role": "user", "content": "a b"}]})
    assert chat_prompt(tokenizer, plain, BOUNDS, with_tools=False)


def test_messages_that_render_to_nothing_are_refused(tiny: Tiny) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny.llama)
    tokenizer.chat_template = "{{ messages[0].content }}"
    chat = parse_chat({"messages": [{"role": "user", "content": ""}]})
    with pytest.raises(RequestError, match="has no tokens"):
        chat_prompt(tokenizer, chat, BOUNDS, with_tools=False)


def test_a_text_that_cannot_fit_is_refused_unread(tiny: Tiny) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny.llama)
    for count, fits in ((1000, True), (1001, False)):
        prompt = parse_completion({"prompt": "x" * count})
        if fits:
            assert completion_prompts(tokenizer, prompt, BOUNDS)
        else:
            with pytest.raises(RequestError, match="100 tokens, at most 1000 characters"):
                completion_prompts(tokenizer, prompt, BOUNDS)


def test_half_a_pair_in_a_call_is_refused(tiny: Tiny) -> None:
    """No text of it can be made; a conversation may hold what a model once wrote."""
    call = {"function": {"name": "time", "arguments": '{"x": "\\ud83d"}'}}
    chat = parse_chat({"messages": [{"role": "assistant", "tool_calls": [call]}]})
    with pytest.raises(RequestError, match="tool call in message 0 is malformed") as caught:
        chat_prompt(AutoTokenizer.from_pretrained(tiny.llama), chat, BOUNDS, with_tools=False)
    assert caught.value.param == "messages"


def test_more_log_probabilities_than_anybody_reads_are_refused(tiny: Tiny) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny.llama)
    wide = Bounds(VOCABULARY, tokens=10_000, characters=100_000)
    fields = {"prompt": [5] * 8000, "echo": True, "max_tokens": 0}
    for more, fits in (({"logprobs": 20}, True), ({"n": 128}, True), ({"logprobs": 20, "n": 7}, False)):
        prompt = parse_completion(fields | more)
        if fits:
            assert completion_prompts(tokenizer, prompt, wide)
        else:
            with pytest.raises(RequestError, match=r"would be 1176000, more than 1048576.*lower 'n'"):
                completion_prompts(tokenizer, prompt, wide)


def test_a_prompts_text_is_kept_as_it_came(tiny: Tiny) -> None:
    """A tokenizer may add a mark, or write the text otherwise."""
    tokenizer = AutoTokenizer.from_pretrained(tiny.llama)
    texts = [
        each.text for each in completion_prompts(tokenizer, parse_completion({"prompt": ["a", "b"]}), BOUNDS)
    ]
    assert texts == ["a", "b"]
    (tokens,) = completion_prompts(tokenizer, parse_completion({"prompt": [1, 2]}), BOUNDS)
    assert (tokens.tokens, tokens.text) == ([1, 2], None)


def test_an_answer_gets_what_the_context_has_left() -> None:
    prompt = [1] * 90
    assert [room_for_answer(prompt, wanted, 5, 100) for wanted in (None, 0, 10, 11, 10**9)] == [
        5,
        0,
        10,
        10,
        10,
    ]
    assert room_for_answer([1] * 100, 0, 5, 100) == 0
    for wanted in (None, 1):
        with pytest.raises(RequestError, match="maximum context length"):
            room_for_answer([1] * 100, wanted, 5, 100)
