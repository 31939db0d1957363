"""The words between pool and scheduler: what has happened, and what is to be done.

`key` is a model's reference, `number` a request's, counted in order of arrival.
"""

from dataclasses import dataclass
from enum import StrEnum


@dataclass(frozen=True)
class Request:
    """A request wants the engine of `key`, which would take `bytes` on its device.

    `order`: it is the operator's, who waits beside the clients' queue. `swap`: an engine with the same swap
    key, that takes adapters of rank `adapters`, can take its weights; None: none can. `fetched`: its files
    are there. `instead_of`: the engine that it is to replace, a revision's by the next one's. `adapter`: the
    one that it is for, whose files are not there; None: they are, or it is for none.
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


@dataclass(frozen=True)
class Fetched:
    """The files of `key`, a model's or an adapter's, for which somebody waits, are there."""

    key: str


@dataclass(frozen=True)
class FetchFailed:
    """The files of `key`, a model's or an adapter's that a request waits for, could not be fetched."""

    key: str
    error: Exception


@dataclass(frozen=True)
class Left:
    """A waiter is gone; a load that it waited for goes on for `linger` seconds."""

    number: int
    linger: float = 0.0


@dataclass(frozen=True)
class Released:
    """A lease of the engine `key` has come back."""

    key: str


@dataclass(frozen=True)
class Starting:
    """The device's turn is the engine's now, whose files are there: `bytes` is what it will take."""

    key: str
    bytes: int


@dataclass(frozen=True)
class Loaded:
    """The engine answers; its load took `seconds`."""

    key: str
    seconds: float = 0.0


@dataclass(frozen=True)
class Failed:
    """The load of `key` failed; what is left of it is being torn down."""

    key: str
    error: Exception


@dataclass(frozen=True)
class Died:
    """The engine's process ended, or hangs; what it left is being torn down."""

    key: str


@dataclass(frozen=True)
class Gone:
    """Nothing of the engine is left: its slot and its memory are free."""

    key: str


@dataclass(frozen=True)
class Unload:
    """The operator wants the engine gone, once its leases are back or (`force`) now."""

    key: str
    force: bool = False


@dataclass(frozen=True)
class Pinned:
    """The operator has pinned the model, or unpinned it."""

    key: str
    pinned: bool


@dataclass(frozen=True)
class RoomWanted:
    """A load lacks space on the disk or memory on the device: an idle engine is to give up its own."""


@dataclass(frozen=True)
class TimePassed:
    """Nothing happened, but it is later."""


EngineEvent = Released | Starting | Loaded | Failed | Died | Gone | Unload
Event = Request | Fetched | FetchFailed | Left | Pinned | RoomWanted | TimePassed | EngineEvent


@dataclass(frozen=True)
class Grant:
    """Give the waiter a lease on the ready engine `key`."""

    number: int
    key: str


@dataclass(frozen=True)
class Load:
    """Start an engine for `key`; there is room for it."""

    key: str


@dataclass(frozen=True)
class Swap:
    """Put the weights of `key` into the engine of `old`, which no lease holds."""

    key: str
    old: str


@dataclass(frozen=True)
class Drain:
    """The busy engine `key` admits nobody any more and goes with its last lease."""

    key: str


@dataclass(frozen=True)
class Evict:
    """Tear the engine `key` down, which no lease holds."""

    key: str


@dataclass(frozen=True)
class CancelLoad:
    """Stop loading `key`: nobody wants it any more."""

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
    """Answer the waiter with the error of the load, or of the fetch, that it waited for."""

    number: int
    failure: Failed | FetchFailed


Action = Grant | Load | Swap | Drain | Evict | CancelLoad | Reject | RejectFailed
