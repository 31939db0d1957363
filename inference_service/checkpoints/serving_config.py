"""serving.json: the operator's settings for one model, stored next to its weights in the bucket.

Every key is optional and overrides the environment for that model; an unknown key is an error.
"""

import json
import re
from collections import Counter
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

MAX_ALIASES = 64

_ALIAS = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/-]{0,199}")
_NAME = re.compile(r"[A-Za-z0-9_.][A-Za-z0-9_.-]{0,99}")


def _alias(value: str) -> str:
    if not _ALIAS.fullmatch(value):
        raise ValueError("use letters, digits, '.', '_', '-' and '/', at most 200 characters")
    return value


def _name(value: str) -> str:
    if not _NAME.fullmatch(value):
        raise ValueError("use letters, digits, '.', '_' and '-', at most 100 characters")
    return value


Alias = Annotated[str, AfterValidator(_alias)]
Name = Annotated[str, AfterValidator(_name)]


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)


class SamplingDefaults(_Strict):
    """Sampling parameters for requests that set none. `max_tokens` in tokens."""

    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=0, le=1_000_000)
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float | None = Field(None, gt=0, le=2)
    max_tokens: int | None = Field(None, ge=1, le=10_000_000)

    def generation_config(self) -> dict[str, Any]:
        """The sampling parameters that are set, without `max_tokens`."""
        return self.model_dump(exclude_none=True, exclude={"max_tokens"})


class Serving(_Strict):
    """How one model is served; None means the service's setting."""

    max_model_len: int | None = Field(None, ge=1, le=100_000_000)
    dtype: Literal["float32", "float16", "bfloat16"] | None = None
    quantization: Name | None = None
    tool_call_parser: Name | None = None
    reasoning_parser: Name | None = None
    max_num_seqs: int | None = Field(None, ge=1, le=65_536)
    kv_cache_gib: float | None = Field(None, gt=0, le=100_000)
    tensor_parallel_size: int | None = Field(None, ge=1, le=1024)
    enable_prefix_caching: bool | None = None
    sampling_defaults: SamplingDefaults = SamplingDefaults()
    aliases: tuple[Alias, ...] = Field((), max_length=MAX_ALIASES)
    base: Alias | None = None
    pinned: bool = False
    preload: bool = False
    max_lora_rank: Literal[1, 8, 16, 32, 64, 128, 256, 320, 512] | None = None


class BadServing(ValueError):
    """serving.json is invalid; the message names the key and what is allowed."""


def parse_serving(content: bytes) -> Serving:
    """Raises BadServing."""
    _refuse_doubles(content)
    try:
        return Serving.model_validate_json(content)
    except ValidationError as error:
        problem = error.errors()[0]
        key = ".".join(map(str, problem["loc"])) or "the file"
        if problem["type"] == "extra_forbidden":
            known = ", ".join(SamplingDefaults.model_fields if "." in key else Serving.model_fields)
            raise BadServing(f"serving.json: unknown key '{key}'; known keys are {known}.") from error
        words = problem["msg"].removeprefix("Value error, ")
        raise BadServing(f"serving.json: {key}: {words}.") from error


def _refuse_doubles(content: bytes) -> None:
    """Rejects duplicate keys: one of the two is a mistake."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        doubled = [key for key, count in Counter(key for key, _ in pairs).items() if count > 1]
        if doubled:
            raise BadServing(f"serving.json: the key {doubled[0]!r} is given twice.")
        return dict(pairs)

    try:
        json.loads(content, object_pairs_hook=unique)
    except BadServing:
        raise
    except (ValueError, RecursionError):
        return  # the validation reports it
