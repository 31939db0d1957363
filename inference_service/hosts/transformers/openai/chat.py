"""/v1/chat/completions."""

from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

from pydantic_core import to_json
from starlette.requests import Request
from starlette.responses import Response

from inference_service.hosts.transformers.generation.grammar import BadGrammar, Grammar
from inference_service.hosts.transformers.generation.sequence import Token
from inference_service.hosts.transformers.openai.choice import Choice
from inference_service.hosts.transformers.openai.errors import RequestError
from inference_service.hosts.transformers.openai.logprobs import of_chat
from inference_service.hosts.transformers.openai.output_parsers import (
    Delta,
    NamedToolParser,
    OutputParser,
    RequiredToolParser,
    parser_for,
    schema_of_arguments,
    schema_of_calls,
)
from inference_service.hosts.transformers.openai.prompts import chat_prompt, room_for_answer
from inference_service.hosts.transformers.openai.protocol import ChatRequest, NamedTool, parse_chat
from inference_service.hosts.transformers.openai.sampling_params import grammar_of, sampling_params
from inference_service.hosts.transformers.openai.serving import (
    Served,
    begin_choices,
    body_of,
    compiled,
    event,
    head,
    prepared,
    rendered,
    running_usage,
    usage,
)
from inference_service.hosts.transformers.openai.stream import Begin, EventStream, chunks, unless_gone


@dataclass
class _Chat:
    """One request in progress."""

    served: Served
    request: ChatRequest
    prompt: list[int]
    begins: list[tuple[Choice, Begin]]
    parsers: list[OutputParser]

    @property
    def choices(self) -> list[Choice]:
        return [choice for choice, _ in self.begins]


async def chat(request: Request, served: Served) -> Response:
    return await unless_gone(request, _answer(request, served))


async def _answer(request: Request, served: Served) -> Response:
    body = parse_chat(await body_of(request))
    forced = body.tool_choice == "required" or isinstance(body.tool_choice, NamedTool)
    wanted = forced or body.wants_grammar
    grammar = await compiled(lambda: _grammar(served, body)) if wanted else None
    request_under_way = await prepared(lambda: _prepare(served, body, grammar))
    if body.stream:
        return EventStream(_events(request_under_way))
    return Response(await _whole(request_under_way), media_type="application/json")


def _prepare(served: Served, body: ChatRequest, grammar: Grammar | None) -> _Chat:
    """Everything that may take a while or be rejected, before anything runs."""
    engine = served.engine
    tools = _tools(body)
    prompt = chat_prompt(engine.tokenizer, body, engine.bounds, with_tools=bool(tools))
    limit = room_for_answer(prompt, body.limit, served.default_max_tokens, engine.max_model_len)
    logprobs = (body.top_logprobs or 0) if body.logprobs else None
    params = sampling_params(body, engine.defaults, limit, logprobs, engine.stop_tokens, engine.vocabulary)
    template = getattr(engine.tokenizer, "response_template", None)
    begins = begin_choices(served, body, prompt, params, grammar, raw=template is not None or bool(tools))
    text = engine.tokenizer.decode(prompt) if template is not None or served.reasons else ""
    parsers = [_parser(body, tools, template, text, served) for _ in begins]
    return _Chat(served, body, prompt, begins, parsers)


def _tools(body: ChatRequest) -> list[dict[str, Any]]:
    return [tool.model_dump(exclude_none=True) for tool in body.tools or () if body.tool_choice != "none"]


def _grammar(served: Served, body: ChatRequest) -> Grammar | None:
    forced = _forced_schema(body, _tools(body))
    try:
        if forced is not None:
            return served.engine.grammars.schema(forced, compact=True)
    except BadGrammar as error:
        raise RequestError(
            f"A tool's parameters are not a supported JSON schema: {error}", "tools"
        ) from error
    return grammar_of(body, lambda: served.engine.grammars)


def _forced_schema(body: ChatRequest, tools: list[dict[str, Any]]) -> dict[str, Any] | None:
    if isinstance(body.tool_choice, NamedTool):
        name = body.tool_choice.function.name
        return schema_of_arguments(next(tool for tool in tools if tool["function"]["name"] == name))
    if body.tool_choice == "required":
        return schema_of_calls(tools, parallel=body.parallel_tool_calls is not False)
    return None


def _parser(
    body: ChatRequest, tools: list[dict[str, Any]], template: Any, prompt: str, served: Served
) -> OutputParser:
    if isinstance(body.tool_choice, NamedTool):
        return NamedToolParser(body.tool_choice.function.name)
    if body.tool_choice == "required":
        return RequiredToolParser()
    return parser_for(template, prompt, tools, reasons=served.reasons)


async def _whole(chat: _Chat) -> bytes:
    deltas = [Delta() for _ in chat.begins]
    tokens: list[list[Token]] = [[] for _ in chat.begins]
    finishes: list[str | None] = [None] * len(chat.begins)
    async for choice, chunk in chunks(chat.begins, chat.served.engine.runner.cancel):
        deltas[choice.index] += chat.parsers[choice.index].add(chunk.text)
        tokens[choice.index] += chunk.tokens
        finishes[choice.index] = chunk.finish
    return await rendered(chat.request, lambda: to_json(_told(chat, deltas, tokens, finishes)))


def _told(
    chat: _Chat, deltas: list[Delta], tokens: list[list[Token]], finishes: list[str | None]
) -> dict[str, Any]:
    choices = []
    for index, parser in enumerate(chat.parsers):
        delta = _bounded(chat.request, deltas[index] + parser.finish(), 0)
        choices.append(
            {
                "index": index,
                "message": _message(delta),
                "finish_reason": _finish(chat.request, finishes[index], called=bool(delta.calls)),
                "logprobs": _logprobs(chat, tokens[index]),
            }
        )
    start = head("chatcmpl", "chat.completion", chat.served, chat.request)
    return start | {"choices": choices, "usage": usage(len(chat.prompt), chat.choices)}


async def _events(chat: _Chat) -> AsyncIterator[bytes]:
    start = head("chatcmpl", "chat.completion.chunk", chat.served, chat.request)
    called = [0] * len(chat.begins)

    def event_of(index: int, delta: dict[str, Any], finish: str | None = None, logprobs: Any = None) -> bytes:
        part = {"index": index, "delta": delta, "finish_reason": finish, "logprobs": logprobs}
        return event(
            start | {"choices": [part]} | running_usage(chat.request, chat.prompt, chat.choices[index])
        )

    begun: set[int] = set()
    waiting: list[list[Token]] = [[] for _ in chat.begins]
    async for choice, chunk in chunks(chat.begins, chat.served.engine.runner.cancel):
        index, parser = choice.index, chat.parsers[choice.index]
        if index not in begun:
            begun.add(index)
            yield event_of(index, {"role": "assistant", "content": ""})
        delta = parser.add(chunk.text)
        if chunk.finish is not None:
            delta += parser.finish()
        delta = _bounded(chat.request, delta, called[index])
        waiting[index] += chunk.tokens
        if delta or chunk.finish is not None or _logprobs(chat, waiting[index]):
            logprobs, waiting[index] = _logprobs(chat, waiting[index]), []
            if delta or logprobs:
                yield event_of(index, _delta(delta, called[index]), logprobs=logprobs)
            called[index] += len(delta.calls)
        if chunk.finish is not None:
            finish = _finish(chat.request, chunk.finish, called=bool(called[index]))
            yield event_of(index, {}, finish)
    if chat.request.wants_usage:
        yield event(start | {"choices": [], "usage": usage(len(chat.prompt), chat.choices)})


def _bounded(request: ChatRequest, delta: Delta, before: int) -> Delta:
    """At most one call if the client disables parallel calls."""
    if request.parallel_tool_calls is False:
        delta.calls = delta.calls[: max(0, 1 - before)]
    return delta


def _logprobs(chat: _Chat, tokens: list[Token]) -> dict[str, Any] | None:
    return of_chat(tokens, chat.served.texts) if chat.request.logprobs and tokens else None


def _finish(request: ChatRequest, finish: str | None, *, called: bool) -> str | None:
    """OpenAI reports `stop` if the client named the function itself."""
    if called and finish == "stop" and not isinstance(request.tool_choice, NamedTool):
        return "tool_calls"
    return finish


def _message(delta: Delta) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": delta.content}
    if delta.calls:
        message |= {"content": delta.content or None, "tool_calls": delta.calls}
    return message | ({"reasoning": delta.reasoning} if delta.reasoning else {})


def _delta(delta: Delta, before: int) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    if delta.content or not (delta.reasoning or delta.calls or delta.arguments):
        fields["content"] = delta.content
    if delta.reasoning:
        fields["reasoning"] = delta.reasoning
    if delta.calls:
        fields["tool_calls"] = [call | {"index": before + number} for number, call in enumerate(delta.calls)]
    if delta.arguments:
        fields["tool_calls"] = [{"index": before - 1, "function": {"arguments": delta.arguments}}]
    return fields
