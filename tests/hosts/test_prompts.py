"""From messages to tokens, where a model and its tokenizer do not go together."""

import pytest

from tests.fixtures.tiny import VOCABULARY, Tiny  # isort: skip  (before transformers: it is to stay offline)
from transformers import AutoTokenizer

from inference_service.hosts.openai.prompts import chat_prompt, completion_prompts
from inference_service.hosts.openai.refusal import Refused
from inference_service.hosts.openai.requests import parse_chat, parse_completion


def test_a_token_without_an_embedding_is_refused(tiny: Tiny) -> None:
    """One such row would end the batch of everybody."""
    tokenizer = AutoTokenizer.from_pretrained(tiny.llama)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    chat = parse_chat({"messages": [{"role": "user", "content": "a [PAD] b"}]})
    with pytest.raises(Refused, match=f"token {VOCABULARY} is outside the model's vocabulary"):
        chat_prompt(tokenizer, chat, VOCABULARY, with_tools=False)
    with pytest.raises(Refused, match="outside the model's vocabulary"):
        completion_prompts(tokenizer, parse_completion({"prompt": "a [PAD] b"}), VOCABULARY)
    plain = parse_chat({"messages": [{"role": "user", "content": "a b"}]})
    assert chat_prompt(tokenizer, plain, VOCABULARY, with_tools=False)


def test_messages_that_render_to_nothing_are_refused(tiny: Tiny) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny.llama)
    tokenizer.chat_template = "{{ messages[0].content }}"
    chat = parse_chat({"messages": [{"role": "user", "content": ""}]})
    with pytest.raises(Refused, match="without a token"):
        chat_prompt(tokenizer, chat, VOCABULARY, with_tools=False)
