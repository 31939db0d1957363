"""The interface of an engine for the pool and the relay, whatever backend runs behind it.

Defines states, footprints, the Engine and Reply protocols, and HostSpec, the specification of a host process,
which is sent to the launcher as JSON.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol, Self

from inference_service.checkpoints.snapshot import Snapshot
from inference_service.errors import ServiceError

# How long a host may take to shut down.
GRACE_SECONDS = 5.0
# A line of a host's log with this prefix names the current phase of its start.
PHASE_MARK = "@phase "


@dataclass(frozen=True)
class Heartbeat:
    """A heartbeat: the number of running requests, and a number that changes with every step."""

    running: int
    steps: int


@dataclass(frozen=True)
class Fingerprint:
    """The model's output for a fixed prompt: the most likely tokens and their log probabilities, in order."""

    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class Swapped:
    """A completed swap: its weight check, and the seconds of its phases.

    `copied_bytes` of the checkpoint's `total_bytes` differed and were copied, `copied_from` says what from;
    None if the host does not say.
    """

    fingerprint: Fingerprint
    seconds: dict[str, float]
    copied_bytes: int | None = None
    total_bytes: int | None = None
    copied_from: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Prepared:
    """Weights that a host has made ready for a swap; `refused`: why not all bytes are ready."""

    ready_bytes: int = 0
    total_bytes: int = 0
    refused: str | None = None


@dataclass(frozen=True)
class HostSpec:
    """The specification of one host process.

    `program` is the module whose `run(spec, listener)` serves; `environment` is set in the host before
    it runs; the defaults apply to what a request omits. `fallback`: the arguments with which the
    transformers backend serves a model that the program's engine does not support; None for no fallback.
    """

    model: str
    program: str
    directory: str
    arguments: tuple[str, ...]
    environment: dict[str, str]
    default_max_tokens: int
    default_temperature: float
    fallback: tuple[str, ...] | None = None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Self:
        fallback = value.get("fallback")
        tuples = {
            "arguments": tuple(value["arguments"]),
            "fallback": None if fallback is None else tuple(fallback),
        }
        return cls(**{**value, **tuples})


class Reply(Protocol):
    """A host's response as it arrives. Closing it aborts the generation."""

    @property
    def status(self) -> int: ...

    @property
    def content_type(self) -> str: ...

    async def chunk(self) -> bytes:
        """All bytes that have arrived, at least one; none at the end. Raises EngineDied if the host dies."""
        ...

    async def read(self) -> bytes:
        """The whole body; raises EngineDied if the host dies."""
        ...

    def close(self) -> None:
        """Drop the connection to the host; idempotent, never blocks."""
        ...


@dataclass(frozen=True)
class About:
    """What a host reports: which backend serves, and notes for the operator."""

    backend: str | None = None
    notes: tuple[str, ...] = ()


class Engine(Protocol):
    """The engine of one model. Call `start` once; `close` may be cancelled and called again."""

    @property
    def about(self) -> About:
        """Known once it has started."""
        ...

    @property
    def process_id(self) -> int | None:
        """Process id of the leader of the host's process group; None before it exists."""
        ...

    @property
    def phases(self) -> Mapping[str, float]:
        """The phases of the start so far, in order, with the time at which each began (monotonic seconds)."""
        ...

    async def start(self) -> None:
        """Returns once the engine is ready; raises EngineStartFailed with the engine's own error."""
        ...

    async def forward(self, path: str, body: bytes, request_id: str) -> Reply:
        """Send one request to the host; raises EngineDied."""
        ...

    async def heartbeat(self) -> Heartbeat:
        """The engine's heartbeat; raises EngineDied."""
        ...

    async def weight_check(self) -> Fingerprint:
        """Run the weight check's prompt; raises EngineDied and SwapFailed."""
        ...

    async def swap(self, snapshot: Snapshot) -> Swapped:
        """Replace the weights, and everything else, with those of another snapshot with the same swap key.

        No request may be running; an engine that sleeps wakes. If it raises EngineDied or SwapFailed, the
        engine is unusable.
        """
        ...

    async def sleep(self) -> int | None:
        """Drop weights, KV cache and adapters, and keep the process; returns the bytes freed on each device.

        None if the host cannot: the engine is as it was. No request may be running, and none is served until
        a swap. If it raises EngineDied or EngineError, the engine is unusable.
        """
        ...

    async def prepare(self, snapshot: Snapshot) -> Prepared | None:
        """Make a snapshot's weights ready for a swap, beside requests; None if the host cannot.

        They are held until `forget`. Raises EngineDied and EngineError.
        """
        ...

    async def forget(self, snapshot: Snapshot) -> None:
        """Give up what `prepare` holds; raises EngineDied and EngineError."""
        ...

    async def add_adapter(self, name: str, number: int, adapter: Snapshot) -> None:
        """Serve the adapter under `name`; `number` is new. Raises EngineDied and AdapterRefused."""
        ...

    async def remove_adapter(self, name: str) -> None:
        """Remove an adapter that no request uses; raises EngineDied and AdapterRefused."""
        ...

    async def wait_dead(self) -> str:
        """Returns the reason once the host's process is gone."""
        ...

    def abort_all(self, error: ServiceError) -> None:
        """End every open reply with `error`; idempotent, never blocks."""
        ...

    async def close(self, grace: float = GRACE_SECONDS) -> None:
        """End the host's process group, with SIGKILL after `grace` seconds; returns once none is left."""
        ...
