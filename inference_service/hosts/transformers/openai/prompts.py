"""Turns messages or text into prompt tokens that fit the model's context. Blocks for milliseconds."""

import json
from dataclasses import dataclass
from typing import Any

from pydantic_core import from_json

from inference_service.hosts.transformers.generation.checkpoint import Bounds
from inference_service.hosts.transformers.openai.errors import RequestError
from inference_service.hosts.transformers.openai.protocol import ChatRequest, CompletionRequest

# Per request: prompts times n.
MAX_ANSWERS = 2_048
# Per answer with `echo`: tokens of the prompts times n times log probabilities per token.
MAX_LOGPROBS = 1 << 20
_ROLES = ("system", "developer", "user", "assistant", "tool", "function")


@dataclass(frozen=True)
class Prompt:
    """The prompt of a completion. `text`: as the client sent it, None if it sent tokens."""

    tokens: list[int]
    text: str | None = None


def chat_prompt(tokenizer: Any, request: ChatRequest, bounds: Bounds, *, with_tools: bool) -> list[int]:
    """The messages rendered by the model's chat template. Raises RequestError."""
    if not getattr(tokenizer, "chat_template", None):
        raise RequestError(
            "The model has no chat template: use /v1/completions, or upload a chat_template.jinja.",
            "messages",
        )
    if with_tools and "tools" not in _template_text(tokenizer):
        raise RequestError("The model's chat template does not support tools.", "tools")
    messages = [_message(message, number) for number, message in enumerate(request.messages)]
    arguments = dict(request.chat_template_kwargs or {})
    if request.reasoning_effort is not None:
        arguments.setdefault("reasoning_effort", request.reasoning_effort)
    try:
        text = tokenizer.apply_chat_template(
            messages,
            tools=[tool.model_dump(exclude_none=True) for tool in request.tools or ()]
            if with_tools
            else None,
            tokenize=False,
            add_generation_prompt=not request.continue_final_message
            if request.add_generation_prompt is None
            else request.add_generation_prompt,
            continue_final_message=bool(request.continue_final_message),
            **arguments,
        )
    except Exception as error:  # the template is the model's own program: it may raise anything
        raise RequestError(f"The chat template cannot render these messages: {error}", "messages") from error
    return _encode(tokenizer, text, bounds, "messages", special=bool(request.add_special_tokens))


def completion_prompts(tokenizer: Any, request: CompletionRequest, bounds: Bounds) -> list[Prompt]:
    """Raises RequestError."""
    prompt = request.prompt
    if isinstance(prompt, str):
        prompts: list[Any] = [prompt]
    elif prompt and isinstance(prompt[0], int):
        prompts = [prompt]
    else:
        prompts = list(prompt)
    special = request.add_special_tokens is not False
    if len(prompts) * (request.n or 1) > MAX_ANSWERS:
        raise RequestError(
            f"{len(prompts)} prompts times 'n' exceed the maximum of {MAX_ANSWERS} answers: lower 'n' or "
            "send fewer prompts.",
            "n",
        )
    if not prompts:
        raise RequestError("'prompt' is an empty list: send at least one prompt.", "prompt")
    found = [
        Prompt(_encode(tokenizer, each, bounds, "prompt", special=special), each)
        if isinstance(each, str)
        else Prompt(_checked(each, bounds, "prompt"))
        for each in prompts
    ]
    _check_size(request, sum(len(each.tokens) for each in found))
    return found


def _check_size(request: CompletionRequest, tokens: int) -> None:
    if not request.echo or request.logprobs is None:
        return
    count = tokens * (request.n or 1) * (1 + request.logprobs)
    if count > MAX_LOGPROBS:
        raise RequestError(
            f"The prompts' log probabilities would be {count}, more than {MAX_LOGPROBS}: send fewer tokens "
            "in one request, or lower 'n' or 'logprobs'.",
            "logprobs",
        )


def room_for_answer(prompt: list[int], wanted: int | None, default: int, longest: int) -> int:
    """The token limit of an answer: `wanted` or `default`, at most what the context has left.

    Raises RequestError if it has none left.
    """
    left, asked = longest - len(prompt), default if wanted is None else wanted
    if left < min(1, asked):
        raise RequestError(
            f"This model's maximum context length is {longest} tokens. The prompt has {len(prompt)} tokens, "
            "which leaves none for the answer: shorten it.",
            "messages" if wanted is None else "max_tokens",
        )
    return min(asked, left)


def _checked(tokens: list[int], bounds: Bounds, field: str) -> list[int]:
    """Checks the tokenizer's output, too: a fine-tune's tokenizer may know tokens without an embedding."""
    if not tokens:
        raise RequestError("The prompt has no tokens: it must not be empty.", field)
    outside = next((token for token in tokens if not 0 <= token < bounds.vocabulary), None)
    if outside is not None:
        raise RequestError(
            f"The prompt's token {outside} is outside the model's vocabulary of {bounds.vocabulary} tokens.",
            field,
        )
    return tokens


def _encode(tokenizer: Any, text: str, bounds: Bounds, field: str, *, special: bool) -> list[int]:
    if len(text) > bounds.characters:
        raise RequestError(
            f"This model's maximum context length is {bounds.tokens} tokens, at most {bounds.characters} "
            f"characters. The prompt has {len(text)} characters: shorten it.",
            field,
        )
    tokens: list[int] = tokenizer(text, add_special_tokens=special, return_attention_mask=False)["input_ids"]
    return _checked(tokens, bounds, field)


def _template_text(tokenizer: Any) -> str:
    template = tokenizer.chat_template
    return json.dumps(template) if isinstance(template, dict) else str(template)


def _message(message: dict[str, Any], number: int) -> dict[str, Any]:
    """Normalized for templates: content as text, `system` for `developer`, arguments as objects."""
    role = message.get("role")
    if role not in _ROLES:
        raise RequestError(
            f"Message {number} has the unknown role '{str(role)[:40]}': use one of {', '.join(_ROLES)}.",
            "messages",
        )
    normalized = {**message, "role": "system" if role == "developer" else role}
    normalized["content"] = _content(message.get("content"), number)
    calls = message.get("tool_calls") or []
    if not isinstance(calls, list):
        raise RequestError(f"'tool_calls' of message {number} must be a list.", "messages")
    if calls:
        normalized["tool_calls"] = [_tool_call(call, number) for call in calls]
    return normalized


def _content(content: Any, number: int) -> str:
    if content is None or isinstance(content, str):
        return content or ""
    if not isinstance(content, list):
        raise RequestError(f"The content of message {number} must be a text or a list of parts.", "messages")
    texts = []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        text = part.get("refusal" if kind == "refusal" else "text") if isinstance(part, dict) else None
        if kind not in ("text", "refusal") or not isinstance(text, str):
            raise RequestError(
                f"Message {number} has a part of type {kind!r}: the transformers backend supports text only.",
                "messages",
            )
        texts.append(text)
    return "\n".join(texts)


def _tool_call(call: Any, number: int) -> dict[str, Any]:
    try:
        function = dict(call["function"])
        arguments = function.get("arguments") or {}
        function["arguments"] = from_json(arguments) if isinstance(arguments, str) else arguments
    except (TypeError, KeyError, ValueError, RecursionError) as error:
        raise RequestError(f"A tool call in message {number} is malformed: {error}", "messages") from error
    return {**call, "function": function}
