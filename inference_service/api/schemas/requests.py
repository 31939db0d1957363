"""Request bodies: the fields that this service must understand or bound.

Every other field passes through to the engine, which validates it. Numbers are strict: `true` is no
token count, and `"5"` is no number.
"""

from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StrictBool,
    StrictFloat,
    StrictInt,
    StrictStr,
)

MAX_CHOICES = 128
MAX_MESSAGES = 16_384
MAX_PROMPTS = 2_048
MAX_BIASES = 1_024
_INT32 = 2**31 - 1
_INT64 = 2**63 - 1

Count = Annotated[StrictInt, Field(ge=1, le=_INT32)]
Number = StrictInt | StrictFloat
Temperature = Annotated[Number, Field(ge=0, le=2)]
Share = Annotated[Number, Field(ge=0, le=1)]
Penalty = Annotated[Number, Field(ge=-2, le=2)]
TokenIds = Annotated[list[Annotated[StrictInt, Field(ge=0, le=_INT32)]], Field(fail_fast=True, min_length=1)]


def _biases(value: Any) -> Any:
    # Before the entries are looked at: an error for each of a million would take seconds.
    if isinstance(value, dict) and len(value) > MAX_BIASES:
        raise ValueError(f"at most {MAX_BIASES} tokens can have a bias")
    return value


class StreamOptions(BaseModel):
    model_config = ConfigDict(extra="allow")

    include_usage: StrictBool | None = None


class GenerationBody(BaseModel):
    """What chat and completion requests have in common."""

    model_config = ConfigDict(extra="allow", allow_inf_nan=False)

    model: Annotated[StrictStr, Field(min_length=1, max_length=512)]
    stream: StrictBool | None = None
    stream_options: StreamOptions | None = None
    n: Annotated[StrictInt, Field(ge=1, le=MAX_CHOICES)] | None = None
    temperature: Temperature | None = None
    top_p: Share | None = None
    frequency_penalty: Penalty | None = None
    presence_penalty: Penalty | None = None
    seed: Annotated[StrictInt, Field(ge=-_INT64, le=_INT64)] | None = None
    stop: StrictStr | Annotated[list[StrictStr], Field(fail_fast=True, max_length=64)] | None = None
    logit_bias: Annotated[dict[str, Number], BeforeValidator(_biases)] | None = None
    top_k: Annotated[StrictInt, Field(ge=-1, le=_INT32)] | None = None
    min_tokens: Annotated[StrictInt, Field(ge=0, le=_INT32)] | None = None
    prompt_logprobs: Annotated[StrictInt, Field(ge=0, le=20)] | None = None
    # A template is code; only the model's own is run.
    chat_template: None = None

    @property
    def wants_usage(self) -> bool:
        """Whether the client asked for the last chunk of a stream, the one with the usage."""
        return bool(self.stream_options and self.stream_options.include_usage)

    def forwarded(self, model: str) -> bytes:
        """The body for the host: the engine's name of the model, and usage in every stream.

        The service counts tokens by the usage chunk; the relay drops it where it was not asked for.
        """
        changed: dict[str, Any] = {"model": model}
        if self.stream:
            options = self.stream_options or StreamOptions()
            changed["stream_options"] = options.model_copy(update={"include_usage": True})
        return self.model_copy(update=changed).model_dump_json(exclude_unset=True).encode()


class ChatBody(GenerationBody):
    messages: Annotated[list[dict[str, Any]], Field(fail_fast=True, min_length=1, max_length=MAX_MESSAGES)]
    max_tokens: Count | None = None
    max_completion_tokens: Count | None = None
    logprobs: StrictBool | None = None
    top_logprobs: Annotated[StrictInt, Field(ge=0, le=20)] | None = None


class CompletionBody(GenerationBody):
    prompt: (
        StrictStr
        | TokenIds
        | Annotated[list[StrictStr], Field(fail_fast=True, min_length=1, max_length=MAX_PROMPTS)]
        | Annotated[list[TokenIds], Field(fail_fast=True, min_length=1, max_length=MAX_PROMPTS)]
    )
    # Zero is of use with echo: the prompt's own log probabilities.
    max_tokens: Annotated[StrictInt, Field(ge=0, le=_INT32)] | None = None
    logprobs: Annotated[StrictInt, Field(ge=0, le=20)] | None = None
    echo: StrictBool | None = None
    suffix: Literal[""] | None = None
