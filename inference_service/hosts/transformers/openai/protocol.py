"""Request bodies with every supported field; other fields are ignored or rejected by name.

The service has already bounded sizes and checked the most common fields; the rest is validated here.
"""

from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    StrictBool,
    StrictFloat,
    StrictInt,
    StrictStr,
    ValidationError,
    model_validator,
)

from inference_service.hosts.transformers.openai.errors import RequestError

MAX_STOP_TOKENS = 64
MAX_CHOICES_OF_GRAMMAR = 1_024
MAX_TOOLS = 128
Number = StrictInt | StrictFloat
# Fields that other engines support and this one does not: rejected, because ignoring them would mislead.
LACKING = frozenset(
    {
        *("allowed_token_ids", "audio", "bad_words", "documents", "function_call", "functions"),
        *("guided_choice", "guided_grammar", "guided_json", "guided_regex", "kv_transfer_params"),
        *("length_penalty", "logits_processors", "mm_processor_kwargs", "prompt_embeds"),
        *("prompt_logprobs", "return_token_ids", "thinking_token_budget", "truncate_prompt_tokens"),
        *("use_beam_search", "vllm_xargs", "web_search_options"),
    }
)
# Arguments that the service sets itself; a template's own arguments must have other names.
_NO_TEMPLATE_ARGUMENTS = frozenset(
    {
        *("chat_template", "conversation", "messages", "tokenize", "tools", "documents", "return_dict"),
        *("return_tensors", "padding", "truncation", "max_length", "add_generation_prompt"),
        *("continue_final_message", "return_assistant_tokens_mask", "tokenizer_kwargs"),
    }
)


class JsonSchema(BaseModel):
    model_config = ConfigDict(extra="ignore")

    # `schema` is a method's name in pydantic.
    content: dict[str, Any] | None = Field(None, alias="schema")
    name: StrictStr | None = None
    strict: StrictBool | None = None


class ResponseFormat(BaseModel):
    model_config = ConfigDict(extra="ignore")

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class StructuredOutputs(BaseModel):
    """vLLM's field: exactly one of its keys must be set."""

    model_config = ConfigDict(extra="forbid")

    json_: dict[str, Any] | StrictStr | None = Field(None, alias="json")
    regex: StrictStr | None = None
    choice: Annotated[list[StrictStr], Field(min_length=1, max_length=MAX_CHOICES_OF_GRAMMAR)] | None = None
    grammar: StrictStr | None = None
    json_object: StrictBool | None = None

    @model_validator(mode="after")
    def _one(self) -> Self:
        given = [value for value in self.model_dump().values() if value is not None]
        if len(given) != 1 or self.json_object is False:
            raise ValueError("exactly one of json, json_object, regex, choice and grammar must be given")
        return self


class Function(BaseModel):
    model_config = ConfigDict(extra="ignore")

    name: Annotated[StrictStr, Field(min_length=1, max_length=256)]
    description: StrictStr | None = None
    parameters: dict[str, Any] | None = None
    strict: StrictBool | None = None


class Tool(BaseModel):
    model_config = ConfigDict(extra="ignore")

    type: Literal["function"]
    function: Function


class NamedFunction(BaseModel):
    model_config = ConfigDict(extra="ignore")

    name: StrictStr


class NamedTool(BaseModel):
    model_config = ConfigDict(extra="ignore")

    type: Literal["function"]
    function: NamedFunction


class StreamOptions(BaseModel):
    model_config = ConfigDict(extra="ignore")

    include_usage: StrictBool | None = None
    continuous_usage_stats: StrictBool | None = None


class GenerationRequest(BaseModel):
    """Fields that chat and completions share; None: the model's or the service's default."""

    model_config = ConfigDict(extra="allow", allow_inf_nan=False, populate_by_name=True)

    model: StrictStr | None = None
    stream: StrictBool | None = None
    stream_options: StreamOptions | None = None
    n: Annotated[StrictInt, Field(ge=1, le=128)] | None = None
    best_of: StrictInt | None = None
    temperature: Annotated[Number, Field(ge=0, le=2)] | None = None
    top_p: Annotated[Number, Field(ge=0, le=1)] | None = None
    top_k: Annotated[StrictInt, Field(ge=-1)] | None = None
    min_p: Annotated[Number, Field(ge=0, le=1)] | None = None
    presence_penalty: Annotated[Number, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[Number, Field(ge=-2, le=2)] | None = None
    repetition_penalty: Annotated[Number, Field(ge=0.01, le=2)] | None = None
    logit_bias: dict[str, Annotated[Number, Field(ge=-100, le=100)]] | None = None
    seed: StrictInt | None = None
    stop: StrictStr | list[StrictStr] | None = None
    stop_token_ids: Annotated[list[StrictInt], Field(max_length=MAX_STOP_TOKENS)] | None = None
    include_stop_str_in_output: StrictBool | None = None
    ignore_eos: StrictBool | None = None
    min_tokens: Annotated[StrictInt, Field(ge=0)] | None = None
    skip_special_tokens: StrictBool | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    add_special_tokens: StrictBool | None = None

    @property
    def stops(self) -> list[str]:
        """Strings that end an answer; empty ones are ignored."""
        given = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return [text for text in given if text]

    @property
    def wants_grammar(self) -> bool:
        """Whether answers must follow a grammar; the format `text` has none."""
        wanted = self.response_format is not None and self.response_format.type != "text"
        return wanted or self.structured_outputs is not None

    @property
    def wants_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)

    @property
    def wants_running_usage(self) -> bool:
        return bool(self.wants_usage and self.stream_options and self.stream_options.continuous_usage_stats)


class ChatRequest(GenerationRequest):
    messages: Annotated[list[dict[str, Any]], Field(min_length=1)]
    max_tokens: Annotated[StrictInt, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[StrictInt, Field(ge=1)] | None = None
    logprobs: StrictBool | None = None
    top_logprobs: Annotated[StrictInt, Field(ge=0, le=20)] | None = None
    tools: Annotated[list[Tool], Field(max_length=MAX_TOOLS)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: StrictBool | None = None
    modalities: list[Literal["text"]] | None = None
    add_generation_prompt: StrictBool | None = None
    continue_final_message: StrictBool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    reasoning_effort: StrictStr | None = None

    @property
    def limit(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens


class CompletionRequest(GenerationRequest):
    prompt: StrictStr | list[StrictInt] | list[StrictStr] | list[list[StrictInt]]
    max_tokens: Annotated[StrictInt, Field(ge=0)] | None = None
    logprobs: Annotated[StrictInt, Field(ge=0, le=20)] | None = None
    echo: StrictBool | None = None
    suffix: StrictStr | None = None


Kind = TypeVar("Kind", bound=GenerationRequest)


def parse_chat(body: Any) -> ChatRequest:
    """Raises RequestError with the field's name."""
    request = _parsed(body, ChatRequest)
    if request.top_logprobs and not request.logprobs:
        raise RequestError("'top_logprobs' requires 'logprobs': true.", "top_logprobs")
    if request.continue_final_message and request.add_generation_prompt:
        raise RequestError(
            "'continue_final_message' cannot be combined with 'add_generation_prompt'.",
            "continue_final_message",
        )
    for name in request.chat_template_kwargs or ():
        if name in _NO_TEMPLATE_ARGUMENTS:
            raise RequestError(f"'{name}' cannot be set for the chat template.", "chat_template_kwargs")
    _check_tool_choice(request)
    return request


def parse_completion(body: Any) -> CompletionRequest:
    """Raises RequestError with the field's name."""
    request = _parsed(body, CompletionRequest)
    if request.suffix:
        raise RequestError("'suffix' is not supported.", "suffix")
    if request.max_tokens == 0 and not request.echo:
        raise RequestError("'max_tokens' may be 0 only with 'echo': true.", "max_tokens")
    return request


def _parsed(body: Any, kind: type[Kind]) -> Kind:
    if not isinstance(body, dict):
        raise RequestError("The request's body must be a JSON object.")
    for name in LACKING.intersection(body):
        if body[name] is not None and body[name] is not False and body[name] not in ([], {}):
            raise RequestError(f"'{name}' is not supported by the transformers backend.", name)
    try:
        request = kind.model_validate(body)
    except ValidationError as error:
        problem = error.errors(include_url=False, include_context=False)[0]
        path = ".".join(map(str, problem["loc"]))
        field = path.partition(".")[0] or None
        raise RequestError(f"Invalid value for '{path}': {problem['msg']}.", field) from error
    if request.best_of not in (None, request.n or 1):
        raise RequestError("'best_of' must be equal to 'n': all answers are returned.", "best_of")
    if request.response_format is not None and request.structured_outputs is not None:
        raise RequestError(
            "'structured_outputs' cannot be combined with 'response_format'.", "structured_outputs"
        )
    return request


def _check_tool_choice(request: ChatRequest) -> None:
    choice, tools = request.tool_choice, request.tools or []
    if choice in (None, "none", "auto"):
        return
    if not tools:
        raise RequestError("'tool_choice' requires 'tools'.", "tool_choice")
    names = [tool.function.name for tool in tools]
    if isinstance(choice, NamedTool) and choice.function.name not in names:
        raise RequestError(
            f"'tool_choice' names '{choice.function.name}', which is not one of the tools.", "tool_choice"
        )
