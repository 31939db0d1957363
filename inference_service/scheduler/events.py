"""What pool and scheduler exchange: events that happened, and actions to carry out.

`key` is a model's reference, `number` a request's, counted in order of arrival.
"""

from dataclasses import dataclass
from enum import StrEnum


@dataclass(frozen=True)
class Request:
    """A request asks for the engine of `key`, which would take `bytes` on its device.

    `by_operator`: it waits beside the clients' queue. `swap`: an engine with the same swap key, that takes
    adapters of rank `adapters`, can take its weights; None: none can. `fetched`: its files are there.
    `instead_of`: the engine that it replaces, that of the previous revision. `adapter`: the adapter that it
    is for, if the files of that are not there yet. `asleep_bytes`: what its engine is expected to keep on its
    device while it sleeps; None: it cannot sleep.
    """

    number: int
    key: str
    bytes: int = 0
    pinned: bool = False
    by_operator: bool = False
    swap: str | None = None
    adapters: int = 0
    fetched: bool = True
    instead_of: str | None = None
    adapter: str | None = None
    asleep_bytes: int | None = None


@dataclass(frozen=True)
class Fetched:
    """The files of `key`, a model's or an adapter's that a request waits for, are there."""

    key: str


@dataclass(frozen=True)
class FetchFailed:
    """The files of `key`, a model's or an adapter's that a request waits for, could not be fetched."""

    key: str
    error: Exception


@dataclass(frozen=True)
class Left:
    """A waiter has left; a load that it waited for goes on for `linger` seconds."""

    number: int
    linger: float = 0.0


@dataclass(frozen=True)
class Released:
    """A lease on the engine `key` was released."""

    key: str


@dataclass(frozen=True)
class Starting:
    """The engine, whose files are there, has the device's turn and will take `bytes`."""

    key: str
    bytes: int


@dataclass(frozen=True)
class Loaded:
    """The engine answers; its load took `seconds`."""

    key: str
    seconds: float = 0.0


@dataclass(frozen=True)
class Failed:
    """The load of `key` failed; its remains are being removed."""

    key: str
    error: Exception


@dataclass(frozen=True)
class Died:
    """The engine's process ended, or hangs; its remains are being removed."""

    key: str


@dataclass(frozen=True)
class Asleep:
    """The engine `key` has dropped its weights and keeps `bytes`; it is called `sleeper` from now on."""

    key: str
    sleeper: str
    bytes: int


@dataclass(frozen=True)
class Gone:
    """The engine is gone: its slot and its memory are free."""

    key: str


@dataclass(frozen=True)
class Unload:
    """The operator unloads the engine, once its leases are released or (`force`) now."""

    key: str
    force: bool = False


@dataclass(frozen=True)
class Pinned:
    """The operator has pinned the model, or unpinned it."""

    key: str
    pinned: bool


@dataclass(frozen=True)
class RoomWanted:
    """A load lacks memory on the device, or space on the `disk`: an idle engine is to be evicted."""

    disk: bool = False


@dataclass(frozen=True)
class TimePassed:
    """Only time has passed."""


EngineEvent = Released | Starting | Loaded | Failed | Died | Asleep | Gone | Unload
Event = Request | Fetched | FetchFailed | Left | Pinned | RoomWanted | TimePassed | EngineEvent


@dataclass(frozen=True)
class Grant:
    """Give the waiter a lease on the ready engine `key`."""

    number: int
    key: str


@dataclass(frozen=True)
class Load:
    """Start an engine for `key`, which fits."""

    key: str


@dataclass(frozen=True)
class Swap:
    """Put the weights of `key` into the engine of `old`, which no lease holds, or which sleeps."""

    key: str
    old: str


@dataclass(frozen=True)
class Prepare:
    """The engine `engine`, busy or asleep, will probably take `key`: it is to make its weights ready."""

    key: str
    engine: str


@dataclass(frozen=True)
class Drain:
    """The busy engine `key` admits no more requests and ends with its last lease."""

    key: str


@dataclass(frozen=True)
class Sleep:
    """Put the engine `key`, which has no leases, to sleep, or stop it if that is not possible."""

    key: str


@dataclass(frozen=True)
class Evict:
    """Stop the engine `key`, which has no leases."""

    key: str


@dataclass(frozen=True)
class CancelLoad:
    """Stop loading `key`: no request waits for it."""

    key: str


class Reason(StrEnum):
    """Why a request is rejected."""

    OVERLOADED = "overloaded"
    NO_ROOM = "no room"
    UNLOADED = "unloaded"


@dataclass(frozen=True)
class Reject:
    """Answer the waiter with an error."""

    number: int
    reason: Reason


@dataclass(frozen=True)
class RejectFailed:
    """Answer the waiter with the error of the load or fetch that it waited for."""

    number: int
    failure: Failed | FetchFailed


Action = Grant | Load | Swap | Prepare | Drain | Sleep | Evict | CancelLoad | Reject | RejectFailed
