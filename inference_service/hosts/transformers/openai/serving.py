"""What chat and completions share: from a request's body to choices that are ready to start."""

import asyncio
import time
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar

from pydantic_core import from_json, to_json
from starlette.requests import Request

from inference_service.checkpoints.reference import model_of
from inference_service.hosts.transformers.generation.engine import Engine
from inference_service.hosts.transformers.generation.grammar import Grammar
from inference_service.hosts.transformers.generation.sequence import SamplingParams
from inference_service.hosts.transformers.openai.choice import Choice
from inference_service.hosts.transformers.openai.detokenizer import Detokenizer, StopFinder, TokenTexts
from inference_service.hosts.transformers.openai.errors import RequestError
from inference_service.hosts.transformers.openai.interruptible import interruptible
from inference_service.hosts.transformers.openai.protocol import (
    ChatRequest,
    CompletionRequest,
    GenerationRequest,
)
from inference_service.hosts.transformers.openai.stream import Begin


@dataclass
class Served:
    """What the host currently serves: the engine, its model's name and its defaults."""

    engine: Engine
    name: str
    default_max_tokens: int
    reasons: bool
    texts: TokenTexts

    def adapter(self, name: str | None) -> str | None:
        """The adapter that a request names, None for the model itself. Raises RequestError."""
        if name is None or name == self.name:
            return None
        if name in self.engine.adapters:
            return name
        raise RequestError(f"The model `{name}` does not exist.", "model", status=404)


Prepared = TypeVar("Prepared")

# Separate from templates and tokenizers, and from each other: slow work delays only work of its own kind.
_PARSERS = ThreadPoolExecutor(2, thread_name_prefix="parse")
_COMPILERS = ThreadPoolExecutor(2, thread_name_prefix="compile")
_RENDERERS = ThreadPoolExecutor(2, thread_name_prefix="render")
COMPILE_SECONDS = 20.0
PREPARE_SECONDS = 20.0


async def compiled(work: Callable[[], Grammar | None]) -> Grammar | None:
    """The grammar that `work` compiles; raises RequestError if that takes too long."""
    try:
        async with asyncio.timeout(COMPILE_SECONDS):
            return await asyncio.get_running_loop().run_in_executor(_COMPILERS, work)
    except TimeoutError as error:
        raise RequestError(
            f"Compiling the grammar took more than {COMPILE_SECONDS:.0f} s: simplify it, or try again.",
            "response_format",
        ) from error


async def prepared(work: Callable[[], Prepared]) -> Prepared:
    """The result of `work`, which prepares a request; raises RequestError if that takes too long."""
    try:
        return await interruptible(work, PREPARE_SECONDS)
    except TimeoutError as error:
        raise RequestError(
            f"Preparing the prompt took more than {PREPARE_SECONDS:.0f} s: shorten it, or fix the model's "
            "chat template.",
        ) from error


async def rendered(request: ChatRequest | CompletionRequest, work: Callable[[], bytes]) -> bytes:
    """An answer's bytes; log probabilities, which may be megabytes, are serialized outside the event loop."""
    if request.logprobs is None:
        return work()
    return await asyncio.get_running_loop().run_in_executor(_RENDERERS, work)


async def body_of(request: Request) -> Any:
    try:
        body = await request.body()
        return await asyncio.get_running_loop().run_in_executor(_PARSERS, from_json, body)
    except ValueError as error:
        raise RequestError(f"The request's body is not valid JSON: {error}") from error


def begin_choices(
    served: Served,
    request: GenerationRequest,
    prompt: list[int],
    params: SamplingParams,
    grammar: Grammar | None,
    first_index: int = 0,
    *,
    raw: bool = False,
) -> list[tuple[Choice, Begin]]:
    """The choices of one prompt, and how to start each. `raw`: special tokens are part of the text."""
    adapter = served.adapter(request.model)
    skip_special = request.skip_special_tokens is not False and not raw
    begins: list[tuple[Choice, Begin]] = []
    for number in range(request.n or 1):
        choice = Choice(
            first_index + number,
            Detokenizer(served.engine.tokenizer, prompt, skip_special=skip_special),
            StopFinder(request.stops, keep=bool(request.include_stop_str_in_output)),
            params.min_tokens,
        )
        own = for_answer(params, number)
        begins.append((choice, partial(served.engine.submit, prompt, own, adapter=adapter, grammar=grammar)))
    return begins


def for_answer(params: SamplingParams, number: int) -> SamplingParams:
    """The parameters of one of a request's answers: each has its own seed."""
    return params if params.seed is None else replace(params, seed=params.seed + number)


def head(prefix: str, kind: str, served: Served, request: GenerationRequest) -> dict[str, Any]:
    """The first fields of every chunk of an answer; the model's name without the revision."""
    return {
        "id": f"{prefix}-{uuid.uuid4().hex}",
        "object": kind,
        "created": int(time.time()),
        "model": model_of(request.model or served.name),
    }


def usage(prompt_tokens: int, choices: list[Choice]) -> dict[str, int]:
    generated = sum(choice.tokens for choice in choices)
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": generated,
        "total_tokens": prompt_tokens + generated,
    }


def running_usage(request: GenerationRequest, prompt: list[int], choice: Choice) -> dict[str, Any]:
    """The usage for one chunk of an answer, if the client requests it in every chunk."""
    return {"usage": usage(len(prompt), [choice])} if request.wants_running_usage else {}


def event(chunk: dict[str, Any]) -> bytes:
    return b"data: " + to_json(chunk) + b"\n\n"
