"""Messages while they are written: calls and thoughts told apart, however the text is cut."""

import json
from typing import Any

import pytest

from tests.fixtures.tiny import VOCABULARY, Tiny  # isort: skip  (before transformers: it is to stay offline)
from transformers import AutoTokenizer

from inference_service.hosts.transformers.generation.grammar import Grammars
from inference_service.hosts.transformers.openai.output_parsers import (
    Delta,
    NamedToolParser,
    parser_for,
    schema_of_calls,
)

TOOLS = [
    {"type": "function", "function": {"name": name, "parameters": {"type": "object"}}}
    for name in ("weather", "time")
]
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n</tool_call>'
TIME = '<tool_call>{"name": "time", "arguments": {}}</tool_call>'


def written(text: str, size: int, *, tools: bool = True, reasons: bool = False, prompt: str = "") -> Delta:
    parser = parser_for(None, prompt, TOOLS if tools else [], reasons=reasons)
    delta = Delta()
    for start in range(0, len(text), size):
        delta += parser.add(text[start : start + size])
    return delta + parser.finish()


def called(delta: Delta) -> list[tuple[str, Any]]:
    return [(call["function"]["name"], json.loads(call["function"]["arguments"])) for call in delta.calls]


ROME = ("weather", {"city": "Rome"})


@pytest.mark.parametrize("size", [1, 3, 1000])
@pytest.mark.parametrize(
    ("text", "content", "calls"),
    [
        ("Just words.", "Just words.", []),
        (CALL, "", [ROME]),
        (f"Let me see.\n{CALL}", "Let me see.", [ROME]),
        (f"{CALL}\n{TIME}", "", [ROME, ("time", {})]),
        ('{"name": "weather", "parameters": {"city": "Rome"}}', "", [ROME]),
        ('[{"name": "time", "arguments": {}}]', "", [("time", {})]),
        ('[TOOL_CALLS][{"name": "time", "arguments": {}}]', "", [("time", {})]),
        ('<|python_tag|>{"name": "weather", "parameters": {"city": "Rome"}}', "", [ROME]),
        ('{"name": "nobody", "arguments": {}}', '{"name": "nobody", "arguments": {}}', []),
        ('{"some": "json"}', '{"some": "json"}', []),
        ("{never closed", "{never closed", []),
        ("a < b and <tool", "a < b and <tool", []),
    ],
)
def test_calls_are_found_in_the_forms_that_models_write(
    text: str, content: str, calls: list[Any], size: int
) -> None:
    delta = written(text, size)
    assert called(delta) == calls
    assert delta.content.strip() == content


@pytest.mark.parametrize("size", [1, 1000])
def test_a_call_that_is_no_json_is_shown(size: int) -> None:
    delta = written("Look: <tool_call>{oops</tool_call> done", size)
    assert delta.calls == []
    assert "oops" in delta.content


@pytest.mark.parametrize("size", [1, 4, 1000])
def test_thoughts(size: int) -> None:
    delta = written("<think>hm, well</think>Yes.", size, tools=False, reasons=True)
    assert (delta.reasoning.strip(), delta.content.strip()) == ("hm, well", "Yes.")
    begun = written("hm</think>Yes.", size, tools=False, reasons=True, prompt="…<think>\n")
    assert (begun.reasoning.strip(), begun.content.strip()) == ("hm", "Yes.")
    plain = written("<think>hm</think>Yes.", size, tools=False)
    assert plain.content == "<think>hm</think>Yes."


def test_arguments_of_a_named_function() -> None:
    """They come as they are written, and in the end make one call."""
    parser = NamedToolParser("weather")
    first, second, last = parser.add('{"city": '), parser.add('"Rome"}'), parser.finish()
    assert [call["function"]["arguments"] for call in first.calls] == ['{"city": ']
    assert (second.calls, second.arguments) == ([], '"Rome"}')
    assert not last
    assert called(first + second + last) == [ROME]
    assert called(NamedToolParser("time").finish() + Delta(arguments="{}")) == [("time", {})]


# As a tokenizer's file has it: a channel for thoughts, calls with the name in their mark.
TEMPLATE = {
    "defaults": {"role": "assistant"},
    "start_anchor": "<|turn>model\n",
    "fields": {
        "thinking": {"open": "<|channel>thought\n", "close": "<channel|>", "content": "text"},
        "tool_calls": {
            "open_pattern": r"<\|tool_call>call:(?P<name>\w+)",
            "close": "<tool_call|>",
            "repeats": True,
            "content": "json",
            "transform": {"type": "function", "function": {"name": "{name}", "arguments": "{content}"}},
        },
        "content": {"close": ["<turn|>"], "content": "text"},
    },
}


@pytest.mark.parametrize("size", [1, 5, 1000])
def test_a_tokenizers_own_response_template(size: int) -> None:
    text = '<|channel>thought\nhm<channel|>Look:<|tool_call>call:weather{"city": "Rome"}<tool_call|><turn|>'
    parser = parser_for(TEMPLATE, "<|turn>user\nx<turn|>\n<|turn>model\n", TOOLS, reasons=False)
    delta = Delta()
    for start in range(0, len(text), size):
        delta += parser.add(text[start : start + size])
    delta += parser.finish()
    assert (delta.reasoning, delta.content, called(delta)) == ("hm", "Look:", [ROME])


@pytest.mark.parametrize("size", [1, 3, 11, 1000])
def test_nothing_of_a_call_that_is_no_json_is_lost(size: int) -> None:
    text = f"Sure.\n<tool_call>{{bad</tool_call> and {CALL}"
    delta = written(text, size)
    assert delta.content == text
    whole = written(f"{CALL}{TIME} <tool_call>[1,</tool_call>", size)
    assert called(whole) == [ROME, ("time", {})]
    assert whole.content.strip() == "<tool_call>[1,</tool_call>"


@pytest.mark.parametrize("size", [1, 7, 1000])
def test_calls_in_a_list_are_calls(size: int) -> None:
    listed = '<tool_call>[{"name": "time", "arguments": {}}, {"function": {"name": "time"}}]</tool_call>'
    assert called(written(f"Well. {listed}{CALL}", size)) == [("time", {}), ("time", {}), ROME]


@pytest.mark.parametrize("size", [1, 7, 1000])
@pytest.mark.parametrize(
    "text",
    [
        '<tool_call>{"tool": "weather"}</tool_call>',
        '<tool_call>[{"name": "time"}, 5]</tool_call>',
        '<tool_call>{"name": 5}</tool_call>',
        '<tool_call>"weather"</tool_call>',
        "<tool_call>[]</tool_call>",
        "<tool_call>" + "[" * 2000 + "]" * 2000 + "</tool_call>",
        '<tool_call>{"name": "time", "arguments": ' + "[" * 990 + "]" * 990 + "}</tool_call>",
        '[{"name": "time"}, {"some": "json"}]',
    ],
)
def test_json_that_is_no_call_is_shown(text: str, size: int) -> None:
    delta = written(text, size)
    assert (delta.calls, delta.content) == ([], text)
    assert written(f"Well. {text}", size).content == f"Well. {text}"


def test_half_a_pair_stays_an_escape() -> None:
    """JSON that a model writes may hold it; what the client gets is UTF-8."""
    (call,) = written('{"name": "time", "arguments": {"x": "\\ud83d"}}', 1000).calls
    assert call["function"]["arguments"].encode() == b'{"x": "\\ud83d"}'
    (call,) = written('<tool_call>{"name": "t\\ud83d", "arguments": "\\ud83d"}</tool_call>', 1000).calls
    assert (call["function"]["name"], call["function"]["arguments"]) == ("t?", "?")


def test_brackets_without_an_end_are_text() -> None:
    assert written("[" * 100_000, 50_000).content == "[" * 100_000


def test_required_calls_follow_schemas_that_refer_to_themselves(tiny: Tiny) -> None:
    """As pydantic writes the schemas of nested models, each with definitions of its own."""
    node = {"type": "object", "properties": {"next": {"$ref": "#/$defs/Node"}}, "additionalProperties": False}
    schemas = {
        "walk": {"$defs": {"Node": node}, "type": "object", "properties": {"to": {"$ref": "#/$defs/Node"}}},
        "look": {
            "$defs": {"Node": {"enum": ["up", "down"]}},
            "type": "object",
            "properties": {"to": {"$ref": "#/$defs/Node"}, "then": {"$ref": "#"}},
            "additionalProperties": False,
        },
    }
    tools = [{"function": {"name": name, "parameters": schema}} for name, schema in schemas.items()]
    grammars = Grammars(AutoTokenizer.from_pretrained(tiny.llama), VOCABULARY, frozenset({2}))
    grammar = grammars.schema(schema_of_calls(tools, parallel=True), compact=True)
    tokenizer = AutoTokenizer.from_pretrained(tiny.llama)

    def follows(calls: list[dict[str, Any]]) -> bool:
        matcher = grammar.matcher(frozenset({2}))
        ids = tokenizer.encode(json.dumps(calls))
        return all(matcher.accept(token) for token in [*ids, 2])

    walk = {"name": "walk", "parameters": {"to": {"next": {"next": {}}}}}
    look = {"name": "look", "parameters": {"to": "up", "then": {"to": "down"}}}
    assert follows([walk, look])
    assert not follows([{"name": "walk", "parameters": {"to": "up"}}])
    assert not follows([{"name": "look", "parameters": {"to": "up", "then": {"to": {"next": {}}}}}])
