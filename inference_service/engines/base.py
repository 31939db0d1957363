"""What the pool and the relay know of an engine, whatever runs behind it.

Owns the words: states, footprints, the Engine and Reply protocols, and HostSpec, the order for a host
process that travels to the launcher as JSON.
"""

from collections.abc import AsyncIterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Protocol, Self

from inference_service.checkpoints.snapshot import Snapshot
from inference_service.errors import ServiceError

# So long a host may take to end in good order.
GRACE_SECONDS = 5.0
# A line of a host's log that begins so names the phase that its start is in.
PHASE_MARK = "@phase "


@dataclass(frozen=True)
class Heartbeat:
    """A sign of life: requests that the engine works on, and a number that changes with every step."""

    running: int
    steps: int


@dataclass(frozen=True)
class Fingerprint:
    """What the weights make of a fixed prompt: the likeliest tokens and their log probabilities, in order."""

    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class Swapped:
    """A swap that the host has carried out: its weight check, and the seconds of its phases."""

    fingerprint: Fingerprint
    seconds: dict[str, float]


@dataclass(frozen=True)
class HostSpec:
    """The order for one host process.

    `program` is the module whose `run(spec, listener)` serves; `environment` is set in the host before
    it runs; the defaults apply where a request is silent. `fallback`: the arguments with which the
    transformers backend serves what the program's engine refuses; None: it shall not.
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
    """A host's answer while it arrives. Closing it aborts the generation."""

    @property
    def status(self) -> int: ...

    @property
    def content_type(self) -> str: ...

    def chunks(self) -> AsyncIterator[bytes]:
        """Bytes as they come; raises EngineDied when the host goes away."""
        ...

    async def read(self) -> bytes:
        """The whole body; raises EngineDied when the host goes away."""
        ...

    def close(self) -> None:
        """Drop the connection to the host; idempotent, never blocks."""
        ...


@dataclass(frozen=True)
class About:
    """What a host says of itself: which backend answers, and what its operator should know of it."""

    backend: str | None = None
    notes: tuple[str, ...] = ()


class Engine(Protocol):
    """One model's engine. `start` once; `close` may be cancelled and called again."""

    @property
    def about(self) -> About:
        """Known once it has started."""
        ...

    @property
    def process_id(self) -> int | None:
        """Leader of the host's process group, None before it exists."""
        ...

    @property
    def phases(self) -> Mapping[str, float]:
        """The phases of its start so far, in order, with the time at which each began (monotonic seconds)."""
        ...

    async def start(self) -> None:
        """Return once the engine answers; raises EngineStartFailed with the engine's own reason."""
        ...

    async def forward(self, path: str, body: bytes, request_id: str) -> Reply:
        """Send one request to the host; raises EngineDied."""
        ...

    async def heartbeat(self) -> Heartbeat:
        """What the engine is doing at this moment; raises EngineDied."""
        ...

    async def weight_check(self) -> Fingerprint:
        """What the weights make of the weight check's prompt; raises EngineDied and SwapFailed."""
        ...

    async def swap(self, snapshot: Snapshot) -> Swapped:
        """Take the weights, and everything else, of another snapshot with the same swap key.

        No request may be under way. Raises EngineDied and SwapFailed; the engine is of no use then.
        """
        ...

    async def add_adapter(self, name: str, number: int, adapter: Snapshot) -> None:
        """Serve the adapter under `name`; `number` is new. Raises EngineDied and AdapterRefused."""
        ...

    async def remove_adapter(self, name: str) -> None:
        """Forget an adapter that no request uses; raises EngineDied and AdapterRefused."""
        ...

    async def wait_dead(self) -> str:
        """Return, with the reason, once the host's process is gone."""
        ...

    def abort_all(self, error: ServiceError) -> None:
        """End every reply under way with `error`; idempotent, never blocks."""
        ...

    async def close(self, grace: float = GRACE_SECONDS) -> None:
        """End the host's process group, with SIGKILL after `grace` seconds; returns when nothing is left."""
        ...
