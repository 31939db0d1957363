"""The service's settings: environment variables and `.env`, read once at the start.

Owns names, defaults, bounds and descriptions; docs/configuration.md and .env.example are generated from them.
What a setting means for a device or an engine is decided in backends/ and engines/.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import (
    BeforeValidator,
    Field,
    SecretStr,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

# https://cloud.google.com/storage/docs/buckets#naming
_BUCKET = re.compile(r"[a-z0-9][a-z0-9._-]{1,220}[a-z0-9]")

QUEUED_PER_RUNNING = 4
# Seconds that a request waits for a place in a loaded engine if QUEUE_TIMEOUT is unset.
PLACE_SECONDS = 120.0
# The part of REQUEST_TIMEOUT that remains when the wait for a load ends: for an answer at the last moment, or
# for a 503 with Retry-After instead of a 504.
ANSWER_SHARE = 0.05
ANSWER_SECONDS = 10.0


class EngineChoice(StrEnum):
    AUTO = "auto"
    VLLM = "vllm"
    TRANSFORMERS = "transformers"
    FAKE = "fake"


class Backend(StrEnum):
    """What runs the models; ENGINE chooses one."""

    VLLM = "vllm"
    TRANSFORMERS = "transformers"
    FAKE = "fake"


class DtypeChoice(StrEnum):
    AUTO = "auto"
    FLOAT32 = "float32"
    FLOAT16 = "float16"
    BFLOAT16 = "bfloat16"


class LoadFormat(StrEnum):
    SAFETENSORS = "safetensors"
    READ_AHEAD = "read_ahead"
    FASTSAFETENSORS = "fastsafetensors"
    RUNAI_STREAMER = "runai_streamer"


class WeightSwap(StrEnum):
    AUTO = "auto"
    OFF = "off"


MAX_ENGINES = 64


@dataclass(frozen=True)
class WaitLimit:
    """The longest that a request waits for something, in seconds, and the settings that it comes from."""

    seconds: float
    source: str = "QUEUE_TIMEOUT"

    def __str__(self) -> str:
        return f"{self.seconds:g} s ({self.source})"


def _names(value: Any) -> Any:
    if isinstance(value, str):
        return tuple(name.strip() for name in value.split(",") if name.strip())
    return value


Names = Annotated[tuple[str, ...], NoDecode, BeforeValidator(_names)]
Sizes = Annotated[tuple[Annotated[int, Field(ge=1, le=65_536)], ...], NoDecode, BeforeValidator(_names)]


class Settings(BaseSettings):
    """All settings; the field's name in capitals is the environment variable."""

    model_config = SettingsConfigDict(
        env_file=".env", env_ignore_empty=True, extra="ignore", frozen=True, hide_input_in_errors=True
    )

    gcs_bucket: str = Field(
        "your-models-bucket",
        min_length=1,
        description="Bucket that holds the models, or `file:///dir` for a local directory with the same "
        "layout",
    )
    gcs_model_prefix: str = Field(
        "models/", description="Prefix of the models inside the bucket; `/` for the whole bucket"
    )
    local_model_cache: Path = Field(
        Path("/tmp/model_cache"),  # noqa: S108  (the documented default)
        description="Directory for verified snapshots of the models",
    )
    disk_cache_gib: float | None = Field(
        None,
        gt=0,
        le=1_000_000,
        description="Quota of LOCAL_MODEL_CACHE in GiB; the least recently used snapshots are evicted. "
        "Unset: 90 % of the file system, or half of the memory if files are kept in memory",
    )
    catalog_ttl: float = Field(
        30, ge=0, le=86_400, description="Seconds that a listing of the bucket is reused"
    )
    max_cached_models: Literal["auto"] | Annotated[int, Field(ge=1, le=MAX_ENGINES)] = Field(
        2,
        description="Maximum number of engines at a time; each has an equal share of the memory. `auto`: as "
        "many as fit, each with the KV cache that MAX_CONCURRENT_REQUESTS need, or four of full length",
    )
    max_concurrent_requests: int = Field(
        50,
        ge=1,
        le=100_000,
        description="Maximum number of requests that run at a time (1 with LOCAL_DEV unless set)",
    )
    max_queued_requests: int | None = Field(
        None,
        ge=1,
        le=1_000_000,
        description="Maximum number of requests that wait; further ones get 429. Unset: four times the "
        "number that may run",
    )
    queue_timeout: float | None = Field(
        None,
        gt=0,
        le=86_400,
        description="Maximum seconds that a request waits for its model; then it gets 503, and the load "
        "goes on. Unset: 120 for a place in a loaded engine, and as long as REQUEST_TIMEOUT allows for a "
        "model that is being loaded",
    )
    warm_launcher: bool = Field(
        True,
        description="Fork engines from a process that has imported the backend; false: each engine imports "
        "it",
    )
    weight_swap: WeightSwap = Field(
        WeightSwap.AUTO,
        description="`auto`: an idle engine takes the weights of another model of its architecture; `off`: "
        "every model gets a fresh engine",
    )
    load_format: LoadFormat = Field(
        LoadFormat.SAFETENSORS,
        description="How a fresh vLLM engine reads its weights: `safetensors`, vLLM's way; `read_ahead`, as "
        "a swap does, which can help on CUDA only; `fastsafetensors` and `runai_streamer`, if their packages "
        "are installed",
    )
    max_sleeping: int = Field(
        0,
        ge=0,
        le=MAX_ENGINES,
        description="Maximum number of engines that sleep, beside MAX_CACHED_MODELS: an engine that gives "
        "way to another model frees its weights and KV cache and keeps its process, kernels and CUDA graphs, "
        "until a model of its architecture wakes it. The engines' shares leave room for what these keep",
    )
    host_cache_gib: float = Field(
        0,
        ge=0,
        le=100_000,
        description="GiB of recently used weights to keep locked in the machine's memory, on CUDA ready for "
        "the GPU; 0: only those that a request waits for",
    )
    compile_cache: str | None = Field(
        None,
        min_length=1,
        description="Absolute directory, or `gs://bucket/prefix`, that shares what engines compile between "
        "machines. It is code: see SECURITY.md for who may write there. Unset: each machine compiles for "
        "itself",
    )
    max_adapters: int = Field(
        8,
        ge=1,
        le=1_024,
        description="Maximum number of LoRA adapters of one base in one batch; each takes the memory of an "
        "adapter on the device",
    )
    max_cpu_adapters: int = Field(
        64,
        ge=1,
        le=100_000,
        description="Maximum number of LoRA adapters that an engine keeps in the machine's memory; the "
        "least recently used idle ones are removed",
    )
    load_timeout: float = Field(600, gt=0, le=86_400, description="Maximum seconds of a load")
    cold_start_grace: float = Field(
        15,
        ge=0,
        le=86_400,
        description="Seconds after which a stream that waits for its model is opened and shows the "
        "progress in SSE comments; a failure before that is an HTTP status, after it an error event",
    )
    engine_stall_timeout: float = Field(
        60,
        gt=0,
        le=86_400,
        description="Seconds without progress after which an engine that has work is replaced",
    )
    fairness_wait: float = Field(
        10,
        ge=0,
        le=86_400,
        description="Seconds that a request for another model waits before a busy engine is drained for it",
    )
    min_residency: float = Field(
        5, ge=0, le=86_400, description="Minimum seconds that an engine serves before it is evicted"
    )
    model_idle_ttl: float | None = Field(
        None, gt=0, description="Seconds without a request after which an engine is stopped. Unset: never"
    )
    request_timeout: float = Field(
        300, gt=0, le=86_400, description="Maximum seconds of a request, from arrival to the last byte"
    )
    default_max_tokens: int = Field(
        512, ge=1, le=10_000_000, description="Maximum number of generated tokens if the request sets none"
    )
    default_temperature: float = Field(
        0.7, ge=0, le=2, description="Sampling temperature if the request sets none"
    )
    cpu_int8: bool = Field(
        False,
        description="With LOCAL_DEV and the transformers backend on a CPU: 8-bit weights, faster for one "
        "request at a time and slightly less exact",
    )
    local_dev: bool = Field(False, description="One request at a time, for development on a laptop")
    listen_address: str = Field("0.0.0.0", min_length=1, description="Address to listen on")
    admin_api_key: SecretStr | None = Field(
        None,
        description="Key that /admin requires (`Authorization: Bearer KEY`). Unset: /admin answers only "
        "requests from the same machine",
    )
    admin_open: bool = Field(
        False, description="Serve /admin to every client that can reach the port, without a key"
    )
    port: int = Field(8080, ge=0, le=65_535, description="Port to listen on; 0: the system picks one")
    engine: EngineChoice = Field(
        EngineChoice.AUTO,
        description="Backend: `auto` (the best for the device), `vllm`, `transformers`, or `fake`, which "
        "answers without a model",
    )
    dtype: DtypeChoice = Field(
        DtypeChoice.AUTO,
        description="Type of the weights: `float32`, `float16`, `bfloat16`, or `auto`: float16 on CUDA "
        "(bfloat16 if the checkpoint is bfloat16) and float32 elsewhere (the transformers backend keeps "
        "bfloat16 on a processor that multiplies it faster)",
    )
    max_model_len: int | None = Field(
        None,
        ge=1,
        le=100_000_000,
        description="Maximum context length in tokens, for models with at least as many positions. Unset: "
        "the longest that the model and the memory allow",
    )
    engine_eager: bool | None = Field(
        None,
        description="Skip compilation and CUDA graphs. Unset: true on the CPU, false elsewhere",
    )
    cuda_graph_sizes: Sizes = Field(
        (),
        description="Batch sizes to capture CUDA graphs for at the start of an engine, such as `1,2,4,8`. "
        "Unset: 1, 2, 4 to 64, then every 64, up to the sequences that can run at a time, 512 at most",
    )
    gpu_memory_utilization: float = Field(
        0.9,
        gt=0,
        le=1,
        description="Fraction of the device's memory for all engines together",
    )
    tensor_parallel_size: Literal["auto"] | Annotated[int, Field(ge=1, le=1024)] = Field(
        "auto", description="GPUs per engine; `auto`: all GPUs of the machine. No effect on the CPU"
    )
    preload_models: Names = Field((), description="Names of models to load at the start, comma-separated")
    drain_timeout: float = Field(
        7, ge=0, le=3_600, description="Seconds that running requests get after SIGTERM"
    )
    log_format: Literal["auto", "json", "text"] = Field(
        "auto",
        description="`json`, `text`, or `auto`: JSON on Cloud Run (if K_SERVICE is set), text elsewhere",
    )
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = Field(
        "INFO", description="Lowest level that is logged: `DEBUG`, `INFO`, `WARNING` or `ERROR`"
    )
    fake_tokens_per_second: float = Field(
        20, gt=0, le=1_000_000, description="Tokens per second of one stream with ENGINE=fake"
    )

    @field_validator("gcs_bucket")
    @classmethod
    def _known_scheme(cls, value: str) -> str:
        value = value.removeprefix("gs://").rstrip("/") if value.startswith("gs://") else value
        if "://" in value and not value.startswith("file:///"):
            raise ValueError("a bucket's name, gs://name or file:///absolute/directory")
        if value.startswith("file:///"):
            value = value.rstrip("/") if value != "file:///" else value
            if not Path(value.removeprefix("file://")).is_dir():
                raise ValueError("the directory does not exist")
        elif "/" in value:
            raise ValueError(
                "a bucket's name without a path (GCS_MODEL_PREFIX holds the path), or file:///absolute/directory"
            )
        elif not _BUCKET.fullmatch(value):
            raise ValueError("3 to 222 lower-case letters, digits, '-', '_' and '.'")
        return value

    @field_validator("compile_cache")
    @classmethod
    def _directory_or_prefix(cls, value: str | None) -> str | None:
        if value is None:
            return None
        if value.startswith("gs://"):
            if not _BUCKET.fullmatch(value.removeprefix("gs://").partition("/")[0]):
                raise ValueError("gs:// wants a bucket's name after it")
        elif not value.startswith(("/", "file:///")):
            raise ValueError("an absolute directory, or gs://bucket/prefix")
        return value

    @field_validator("gcs_model_prefix")
    @classmethod
    def _ends_in_slash(cls, value: str) -> str:
        value = value.strip("/")
        if any(segment in ("", ".", "..") for segment in value.split("/") if value):
            raise ValueError("a path like models/ or team/models/")
        return f"{value}/" if value else ""

    @field_validator("admin_api_key")
    @classmethod
    def _fits_into_a_header(cls, value: SecretStr | None) -> SecretStr | None:
        # A secret that was stored with `echo` ends in a line break.
        key = "" if value is None else value.get_secret_value().strip()
        if value is not None and not (key and key.isascii() and key.isprintable() and " " not in key):
            raise ValueError("one or more printable ASCII characters without spaces")
        return value and SecretStr(key)

    @model_validator(mode="after")
    def _open_or_locked(self) -> Self:
        if self.admin_open and self.admin_api_key is not None:
            raise ValueError("ADMIN_OPEN=true and ADMIN_API_KEY contradict each other: unset one of them")
        return self

    @property
    def load_wait(self) -> WaitLimit:
        """How long a request waits for a model that is not loaded."""
        if self.queue_timeout is not None:
            return WaitLimit(self.queue_timeout)
        margin = min(ANSWER_SECONDS, ANSWER_SHARE * self.request_timeout)
        return WaitLimit(self.request_timeout - margin, f"REQUEST_TIMEOUT less {margin:g} s")

    @property
    def place_wait(self) -> WaitLimit:
        """How long a request waits for a place in an engine that is loaded."""
        if self.queue_timeout is not None:
            return WaitLimit(self.queue_timeout)
        return WaitLimit(PLACE_SECONDS, "the default; QUEUE_TIMEOUT sets another")

    @property
    def slots(self) -> int:
        """The maximum number of engines."""
        return MAX_ENGINES if self.max_cached_models == "auto" else self.max_cached_models

    @property
    def concurrency(self) -> int:
        """MAX_CONCURRENT_REQUESTS with LOCAL_DEV applied."""
        if self.local_dev and "max_concurrent_requests" not in self.model_fields_set:
            return 1
        return self.max_concurrent_requests

    @property
    def quantizes(self) -> bool:
        """CPU_INT8, which is for development only."""
        return self.cpu_int8 and self.local_dev

    @property
    def queued(self) -> int:
        """MAX_QUEUED_REQUESTS, or what follows from the requests that run."""
        if self.max_queued_requests is None:
            return QUEUED_PER_RUNNING * self.concurrency
        return self.max_queued_requests


# Never printed, not even where they cannot be used.
_SECRETS = frozenset({"admin_api_key"})


class BadSettings(Exception):
    """One line for the operator: which variable, its value, what is allowed."""


def load_settings() -> Settings:
    """Read the environment and `.env`; raises BadSettings."""
    try:
        return Settings()
    except UnicodeDecodeError as error:
        raise BadSettings(f".env is no UTF-8 text: {error}") from error
    except ValidationError as error:
        # One line for each variable: a union reports each of its branches. No location: several variables.
        problems: dict[str, list[Any]] = {}
        for problem in error.errors():
            problems.setdefault(str(next(iter(problem["loc"]), "")), []).append(problem)
        raise BadSettings("; ".join(_explain(*item) for item in problems.items())) from error


def _explain(field: str, problems: list[Any]) -> str:
    message = " or ".join(problem["msg"].removeprefix("Value error, ") for problem in problems)
    about = Settings.model_fields.get(field)
    if about is None:
        return message
    branches = [branch for each in get_args(about.annotation) for branch in getattr(each, "__metadata__", ())]
    inner = [constraint for branch in branches for constraint in branch.metadata]
    bounds = [f"{sign} {bound}" for sign, bound in _bounds([*about.metadata, *inner])]
    allowed = f"; allowed: {' and '.join(bounds)}" if bounds else ""
    given = field.upper() if field in _SECRETS else f"{field.upper()}={problems[0]['input']!r}"
    return f"{given} is not allowed: {message}{allowed} ({about.description})"


def _bounds(metadata: list[Any]) -> Iterator[tuple[str, float]]:
    signs = {"ge": "at least", "gt": "more than", "le": "at most"}
    for constraint in metadata:
        for name, sign in signs.items():
            if hasattr(constraint, name):
                yield sign, getattr(constraint, name)
