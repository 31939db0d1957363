"""/v1/completions."""

from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from pydantic_core import to_json
from starlette.requests import Request
from starlette.responses import Response

from inference_service.hosts.transformers.generation.engine import NoRoom
from inference_service.hosts.transformers.generation.grammar import Grammar
from inference_service.hosts.transformers.generation.sequence import SamplingParams, Token
from inference_service.hosts.transformers.openai.choice import Choice, TextChunk
from inference_service.hosts.transformers.openai.errors import RequestError
from inference_service.hosts.transformers.openai.logprobs import of_completion
from inference_service.hosts.transformers.openai.prompts import Prompt, completion_prompts, room_for_answer
from inference_service.hosts.transformers.openai.protocol import CompletionRequest, parse_completion
from inference_service.hosts.transformers.openai.sampling_params import grammar_of, sampling_params
from inference_service.hosts.transformers.openai.serving import (
    Served,
    begin_choices,
    body_of,
    compiled,
    event,
    for_answer,
    head,
    prepared,
    rendered,
    running_usage,
    usage,
)
from inference_service.hosts.transformers.openai.stream import Begin, EventStream, chunks, unless_gone


@dataclass
class _Text:
    """One of the answers. `offset`: characters of the tokens whose log probabilities were sent."""

    choice: Choice
    begin: Begin
    prompt: Prompt
    params: SamplingParams
    text: str = ""
    offset: int = 0
    tokens: list[Token] = field(default_factory=list)
    finish: str | None = None

    def take(self, chunk: TextChunk) -> None:
        self.text += chunk.text
        self.tokens += chunk.tokens
        self.finish = chunk.finish


@dataclass
class _Completion:
    """One request in progress. `free`: no grammar constrains its answers."""

    served: Served
    request: CompletionRequest
    prompts: list[Prompt]
    answers: list[_Text]
    free: bool

    @property
    def usage(self) -> dict[str, int]:
        tokens = sum(len(prompt.tokens) for prompt in self.prompts)
        return usage(tokens, [answer.choice for answer in self.answers])


async def complete(request: Request, served: Served) -> Response:
    return await unless_gone(request, _answer(request, served))


async def _answer(request: Request, served: Served) -> Response:
    body = parse_completion(await body_of(request))
    grammar = None
    if body.wants_grammar:
        grammar = await compiled(lambda: grammar_of(body, lambda: served.engine.grammars))
    request_under_way = await prepared(lambda: _prepare(served, body, grammar))
    if body.stream:
        return EventStream(_events(request_under_way))
    return Response(await _whole(request_under_way), media_type="application/json")


def _prepare(served: Served, body: CompletionRequest, grammar: Grammar | None) -> _Completion:
    """Everything that may take a while or be rejected, before anything runs."""
    engine = served.engine
    prompts = completion_prompts(engine.tokenizer, body, engine.bounds)
    answers: list[_Text] = []
    for prompt in prompts:
        answers += _answers(served, body, prompt, grammar, len(answers))
    return _Completion(served, body, prompts, answers, free=grammar is None)


def _answers(
    served: Served, body: CompletionRequest, prompt: Prompt, grammar: Grammar | None, first: int
) -> list[_Text]:
    engine = served.engine
    limit = room_for_answer(prompt.tokens, body.max_tokens, served.default_max_tokens, engine.max_model_len)
    params = sampling_params(
        body, engine.defaults, limit, body.logprobs, engine.stop_tokens, engine.vocabulary
    )
    begins = begin_choices(served, body, prompt.tokens, params, grammar, first)
    return [
        _Text(choice, begin, prompt, for_answer(params, number))
        for number, (choice, begin) in enumerate(begins)
    ]


async def _whole(completion: _Completion) -> bytes:
    echoed = await _echo(completion)
    left = [(answer.choice, answer.begin) for answer in completion.answers if answer.finish is None]
    async for choice, chunk in chunks(left, completion.served.engine.runner.cancel):
        completion.answers[choice.index].take(chunk)
    return await rendered(completion.request, lambda: to_json(_told(completion, echoed)))


def _told(completion: _Completion, echoed: list[TextChunk]) -> dict[str, Any]:
    choices = [
        {
            "index": answer.choice.index,
            "text": echoed[number].text + answer.text,
            "finish_reason": answer.finish,
            "logprobs": _logprobs(completion, echoed[number].tokens + answer.tokens, 0),
        }
        for number, answer in enumerate(completion.answers)
    ]
    start = head("cmpl", "text_completion", completion.served, completion.request)
    return start | {"choices": choices, "usage": completion.usage}


async def _events(completion: _Completion) -> AsyncIterator[bytes]:
    start = head("cmpl", "text_completion", completion.served, completion.request)

    def event_of(answer: _Text, chunk: TextChunk) -> bytes:
        part = {
            "index": answer.choice.index,
            "text": chunk.text,
            "finish_reason": chunk.finish,
            "logprobs": (logprobs := _logprobs(completion, chunk.tokens, answer.offset)),
        }
        answer.offset += sum(map(len, logprobs["tokens"])) if logprobs is not None else 0
        running = running_usage(completion.request, answer.prompt.tokens, answer.choice)
        return event(start | {"choices": [part]} | running)

    echoed = await _echo(completion)
    for answer, prompt in zip(completion.answers, echoed, strict=True):
        if completion.request.echo:
            yield await rendered(completion.request, partial(event_of, answer, prompt))
            if answer.finish is not None:
                yield event_of(answer, TextChunk(answer.text, answer.tokens, answer.finish))
    left = [(answer.choice, answer.begin) for answer in completion.answers if answer.finish is None]
    async for choice, chunk in chunks(left, completion.served.engine.runner.cancel):
        yield event_of(completion.answers[choice.index], chunk)
    if completion.request.wants_usage:
        yield event(start | {"choices": [], "usage": completion.usage})


async def _echo(completion: _Completion) -> list[TextChunk]:
    """Each answer's prompt, with log probabilities if requested, or an empty chunk without `echo`."""
    if not completion.request.echo:
        return [TextChunk("") for _ in completion.answers]
    each = completion.request.n or 1
    echoed = []
    for first in range(0, len(completion.answers), each):
        answers = completion.answers[first : first + each]
        echoed += [await _read_prompt(completion, answers)] * each
        for answer in answers:
            if answer.params.max_tokens == 0:
                answer.finish, answer.choice.finished = "length", True
    return echoed


async def _read_prompt(completion: _Completion, answers: list[_Text]) -> TextChunk:
    """These answers' prompt with its log probabilities. If each answer has one token, generate it, too."""
    request, engine, prompt = completion.request, completion.served.engine, answers[0].prompt.tokens
    text = answers[0].prompt.text
    if text is None:
        text = engine.tokenizer.decode(prompt, clean_up_tokenization_spaces=False)
    if request.logprobs is None:
        return TextChunk(text)
    adapter = completion.served.adapter(request.model)
    following = answers if completion.free and answers[0].params.max_tokens == 1 else []
    params = [answer.params for answer in following]
    try:
        scored, chosen = await engine.score(prompt, adapter, request.logprobs, params)
    except NoRoom as error:
        raise RequestError(f"{error} Send a shorter prompt.", "prompt") from error
    for answer, token in zip(following, chosen, strict=True):
        chunk = answer.choice.take(token)
        if chunk is not None:
            answer.take(chunk)
    return TextChunk(text, [Token(prompt[0]), *scored])


def _logprobs(completion: _Completion, tokens: list[Token], offset: int) -> dict[str, Any] | None:
    if completion.request.logprobs is None or not tokens:
        return None
    return of_completion(tokens, completion.served.texts, offset)
