"""Parses an assistant's message while it is generated: separates content, reasoning and tool calls.

If the model's tokenizer has a response template, transformers' parser follows it; otherwise JSON tool calls
are recognized in the formats that most models use.
"""

import json
import re
import uuid
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Protocol

from transformers.utils import chat_parsing

# The format of Hermes, Qwen 2 and 3, SmolLM 2 and 3 and many fine-tunes of other models.
_JSON_CALLS = {
    "open_pattern": r"\s*<tool_call>",
    "close": "</tool_call>",
    "repeats": True,
    "content": "json",
    "transform": {"type": "function", "function": "{content}"},
}
_THINKING = {"open": "<think>", "close": "</think>", "content": "text"}
_CONTENT = {"content": "text", "content_args": {"strip": False}}
_THINK = "<think>"
# What Llama 3 and Mistral write before the JSON of their calls.
_CALL_MARKS = re.compile(r"\s*(?:<\|python_tag\|>|\[TOOL_CALLS\])?\s*")


@dataclass
class Delta:
    """What is new in a message. `arguments` continue those of the last call."""

    content: str = ""
    reasoning: str = ""
    calls: list[dict[str, Any]] = field(default_factory=list)
    arguments: str = ""

    def __bool__(self) -> bool:
        return bool(self.content or self.reasoning or self.calls or self.arguments)

    def __add__(self, other: "Delta") -> "Delta":
        calls, arguments = self.calls, self.arguments + other.arguments
        if calls and other.arguments:
            *before, last = calls
            calls, arguments = [*before, _continued(last, other.arguments)], self.arguments
        return Delta(
            self.content + other.content,
            self.reasoning + other.reasoning,
            calls + other.calls,
            arguments,
        )


class OutputParser(Protocol):
    """Turns text into the parts of a message."""

    def add(self, text: str) -> Delta: ...

    def finish(self) -> Delta:
        """The rest; `add` is not called afterwards."""
        ...


class Plain:
    """All text is content."""

    def add(self, text: str) -> Delta:
        return Delta(text)

    def finish(self) -> Delta:
        return Delta()


class NamedToolParser:
    """All text is the arguments of one function, which a grammar ensures."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._begun = False

    def add(self, text: str) -> Delta:
        if self._begun:
            return Delta(arguments=text)
        self._begun = True
        return Delta(calls=[_call(self._name, text)])

    def finish(self) -> Delta:
        return Delta() if self._begun else self.add("")


class RequiredToolParser:
    """All text is a list of calls, which a grammar ensures."""

    def __init__(self) -> None:
        self._text = ""

    def add(self, text: str) -> Delta:
        self._text += text
        return Delta()

    def finish(self) -> Delta:
        return _calls_or_content(self._text)


class JsonToolParser:
    """A message that is only JSON may be calls, as its end shows; any other is passed on at once."""

    def __init__(self, names: frozenset[str], otherwise: OutputParser) -> None:
        self._names = names
        self._otherwise = otherwise
        self._held = ""
        self._decided = False

    def add(self, text: str) -> Delta:
        if self._decided:
            return self._otherwise.add(text)
        self._held += text
        start = self._held[_CALL_MARKS.match(self._held).end() :]  # type: ignore[union-attr]
        if not start or start[0] in "{[" or "<|python_tag|>".startswith(start):
            return Delta()
        self._decided = True
        return self._otherwise.add(self._held)

    def finish(self) -> Delta:
        if self._decided:
            return self._otherwise.finish()
        found = _calls_or_content(self._held, self._names)
        if found.calls:
            return found
        return self._otherwise.add(self._held) + self._otherwise.finish()


class TemplateParser:
    """Separates the parts of a message by a response template."""

    def __init__(self, template: Any, prefix: str, tools: list[dict[str, Any]]) -> None:
        self._parser = chat_parsing.ResponseParser(template, prefix=prefix, tools=tools)
        self._raw = ""
        self._broken = False

    def add(self, text: str) -> Delta:
        # Character by character, to know where in the text a part ends.
        return sum(map(self._add, text), Delta())

    def _add(self, character: str) -> Delta:
        if self._broken:
            return Delta(character)
        self._raw += character
        return self._parsed(lambda: self._parser.feed(character))

    def finish(self) -> Delta:
        return Delta() if self._broken else self._parsed(lambda: self._parser.finalize()[1])

    def _parsed(self, step: Any) -> Delta:
        try:
            events = step()
            delta = sum((self._of(event) for event in events), Delta())
        except (ValueError, RecursionError):
            # A call that is not valid JSON, or nested too deeply: passed on as text.
            self._broken = True
            return Delta(self._raw)
        if any(event["type"] == "region_close" and event["field"] != "content" for event in events):
            self._raw = ""
        return delta

    def _of(self, event: dict[str, Any]) -> Delta:
        kind, name = event["type"], event["field"]
        if kind == "region_chunk" and not event["dirty"]:
            if name == "content":
                self._raw = self._raw.partition(event["text"])[2]
                return Delta(content=event["text"])
            return Delta(reasoning=event["text"]) if name == "thinking" else Delta()
        if kind == "region_close" and name == "tool_calls":
            calls = _calls_in(event["value"])
            # JSON that is not a call is passed on as text, too.
            return Delta(self._raw) if calls is None else Delta(calls=calls)
        return Delta()


def parser_for(template: Any, prompt: str, tools: list[dict[str, Any]], *, reasons: bool) -> OutputParser:
    """`template`: the tokenizer's, or None; `reasons`: the model writes its reasoning between tags."""
    if template is not None:
        return TemplateParser(template, prompt, tools)
    if not tools and not reasons:
        return Plain()
    fields: dict[str, Any] = {"tool_calls": _JSON_CALLS} if tools else {}
    if reasons:
        fields["thinking"] = _THINKING
    fields["content"] = _CONTENT
    own = {"defaults": {"role": "assistant"}, "start_anchor_pattern": r"\A", "fields": fields}
    prefix = _THINK if reasons and prompt.rstrip().endswith(_THINK) else ""
    parsed = TemplateParser(own, prefix, tools)
    names = frozenset(tool["function"]["name"] for tool in tools)
    return JsonToolParser(names, parsed) if tools else parsed


def schema_of_calls(tools: list[dict[str, Any]], *, parallel: bool) -> dict[str, Any]:
    """JSON schema of a list of one or more calls of these tools."""
    # Each tool's schema is defined in one place, so that its internal references can be rewritten.
    places = [f"#/$defs/tool-{number}" for number in range(len(tools))]
    schemas = [
        {
            "type": "object",
            "properties": {
                "name": {"type": "string", "enum": [tool["function"]["name"]]},
                "parameters": {"$ref": place},
            },
            "required": ["name", "parameters"],
            "additionalProperties": False,
        }
        for tool, place in zip(tools, places, strict=True)
    ]
    moved = {
        place.rpartition("/")[2]: _moved(schema_of_arguments(tool), place)
        for tool, place in zip(tools, places, strict=True)
    }
    calls: dict[str, Any] = {"$defs": moved, "type": "array", "minItems": 1, "items": {"anyOf": schemas}}
    return calls if parallel else {**calls, "maxItems": 1}


def _moved(schema: Any, place: str) -> Any:
    """The schema with its internal references rewritten for its new place in another schema."""
    if isinstance(schema, list):
        return [_moved(each, place) for each in schema]
    if not isinstance(schema, dict):
        return schema
    moved = {key: _moved(value, place) for key, value in schema.items()}
    target = moved.get("$ref")
    if isinstance(target, str) and target.startswith("#"):
        moved["$ref"] = place + target.removeprefix("#")
    return moved


def schema_of_arguments(tool: dict[str, Any]) -> dict[str, Any]:
    return tool["function"].get("parameters") or {"type": "object", "properties": {}}


def _calls_or_content(text: str, names: frozenset[str] | None = None) -> Delta:
    """The calls in a JSON text; the text itself if it has none, or one of a function not in `names`."""
    mark = _CALL_MARKS.match(text)
    try:
        calls = _calls_in(json.loads(text[mark.end() :] if mark else text))
    except (ValueError, RecursionError):
        return Delta(text)
    if not calls or (names is not None and any(call["function"]["name"] not in names for call in calls)):
        return Delta(text)
    return Delta(calls=calls)


def _calls_in(found: Any) -> list[dict[str, Any]] | None:
    """The call or list of calls in `found`; None if there is none, or anything else among them."""
    functions = list(_functions(found))
    if not functions or any(
        not isinstance(each, dict) or not isinstance(each.get("name"), str) for each in functions
    ):
        return None
    return [
        _call(_writable(each["name"]), _as_text(each.get("arguments", each.get("parameters", {}))))
        for each in functions
    ]


def _functions(found: Any) -> Iterable[Any]:
    """Unwraps nested lists and `function` keys at any depth."""
    pending = [found]
    while pending:
        each = pending.pop()
        if isinstance(each, list):
            pending += reversed(each)
        elif isinstance(each, dict) and "function" in each:
            pending.append(each["function"])
        else:
            yield each


def _as_text(arguments: Any) -> str:
    if isinstance(arguments, str):
        return _writable(arguments)
    text = json.dumps(arguments, ensure_ascii=False)
    # A lone surrogate, which a model may write as an escape, can only be written as an escape.
    return text if _writable(text) == text else json.dumps(arguments)


def _writable(text: str) -> str:
    return text.encode(errors="replace").decode()


def _continued(call: dict[str, Any], arguments: str) -> dict[str, Any]:
    function = call["function"]
    return {**call, "function": {**function, "arguments": function["arguments"] + arguments}}


def _call(name: str, arguments: str) -> dict[str, Any]:
    function = {"name": name, "arguments": arguments}
    return {"id": f"chatcmpl-tool-{uuid.uuid4().hex[:16]}", "type": "function", "function": function}
