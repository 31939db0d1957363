"""The sampling parameters and the grammar of a request's sequences."""

import re
from collections.abc import Callable
from typing import Any

from inference_service.hosts.transformers.generation.grammar import BadGrammar, Grammar, Grammars
from inference_service.hosts.transformers.generation.sequence import SamplingParams
from inference_service.hosts.transformers.openai.errors import RequestError
from inference_service.hosts.transformers.openai.protocol import GenerationRequest, StructuredOutputs

_TOKEN_ID = re.compile(r"[0-9]{1,9}")


def sampling_params(
    request: GenerationRequest,
    defaults: dict[str, Any],
    max_tokens: int,
    logprobs: int | None,
    stop_tokens: frozenset[int],
    vocabulary: int,
) -> SamplingParams:
    """Fields that the request does not set come from `defaults`. Raises RequestError."""

    def chosen(name: str, neutral: float) -> float:
        value = getattr(request, name)
        return float(defaults.get(name, neutral) if value is None else value)

    own_stops = frozenset(request.stop_token_ids or ())
    if not all(0 <= token < vocabulary for token in own_stops):
        raise RequestError(f"A stop token is not in the vocabulary of {vocabulary} tokens.", "stop_token_ids")
    return SamplingParams(
        max_tokens=max_tokens,
        temperature=chosen("temperature", 1.0),
        top_p=chosen("top_p", 1.0),
        top_k=max(0, int(chosen("top_k", 0))),
        min_p=chosen("min_p", 0.0),
        presence_penalty=float(request.presence_penalty or 0),
        frequency_penalty=float(request.frequency_penalty or 0),
        repetition_penalty=chosen("repetition_penalty", 1.0),
        logit_bias=_biases(request.logit_bias or {}, vocabulary),
        seed=request.seed,
        min_tokens=min(request.min_tokens or 0, max_tokens),
        stop_tokens=own_stops if request.ignore_eos else own_stops | stop_tokens,
        logprobs=logprobs,
    )


def _biases(given: dict[str, Any], vocabulary: int) -> dict[int, float]:
    biases = {}
    for name, bias in given.items():
        if not _TOKEN_ID.fullmatch(name) or int(name) >= vocabulary:
            raise RequestError(
                f"'{name[:40]}' is not a token id of this model: use 0 to {vocabulary - 1}.", "logit_bias"
            )
        biases[int(name)] = float(bias)
    return biases


def grammar_of(request: GenerationRequest, grammars: Callable[[], Grammars]) -> Grammar | None:
    """The grammar that the request asks for. Raises RequestError; blocks while it compiles."""
    wanted = request.response_format
    try:
        if request.structured_outputs is not None:
            return _structured(request.structured_outputs, grammars())
        if wanted is None or wanted.type == "text":
            return None
        if wanted.type == "json_object":
            return grammars().json()
        if wanted.json_schema is None or wanted.json_schema.content is None:
            raise RequestError("'json_schema' requires a 'schema'.", "response_format")
        return grammars().schema(wanted.json_schema.content)
    except BadGrammar as error:
        field = "response_format" if request.structured_outputs is None else "structured_outputs"
        raise RequestError(f"The grammar is invalid or not supported: {error}", field) from error


def _structured(wanted: StructuredOutputs, grammars: Grammars) -> Grammar:
    if wanted.json_ is not None:
        return grammars.schema(wanted.json_)
    if wanted.regex is not None:
        return grammars.regex(wanted.regex)
    if wanted.choice is not None:
        return grammars.choice(wanted.choice)
    if wanted.grammar is not None:
        return grammars.ebnf(wanted.grammar)
    return grammars.json()
