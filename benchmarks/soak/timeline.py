"""What the soak has done to the service, and when: every error has to be explained by it."""

from collections import Counter, deque
from dataclasses import dataclass
from enum import StrEnum

from benchmarks.sse_client import now

# Longer than anything done can have an effect.
KEPT_SECONDS = 180.0


class Deed(StrEnum):
    """`PAUSED`: stopped for a moment shorter than the service bears: it explains nothing."""

    KILLED = "killed"
    STOPPED = "stopped"
    PAUSED = "paused"
    UNLOADED = "unloaded"
    FORCED = "unloaded by force"
    PINNED = "pinned"
    LETHAL = "asked for its fault"
    LOADED = "loaded"
    UPLOADED = "uploaded"


@dataclass
class Entry:
    """One deed on one model, in effect from `began` to `ended`; None: still. `state`: its engine's then."""

    deed: Deed
    model: str
    began: float
    ended: float | None = None
    state: str = ""

    def end(self) -> None:
        if self.ended is None:
            self.ended = now()


class Chronicle:
    """Deeds in the order of their beginning."""

    def __init__(self) -> None:
        self._entries: deque[Entry] = deque()
        self.counts: Counter[Deed] = Counter()

    def begin(self, deed: Deed, model: str, state: str = "") -> Entry:
        began = now()
        while self._entries and began - (self._entries[0].ended or began) > KEPT_SECONDS:
            self._entries.popleft()
        entry = Entry(deed, model, began, None, state)
        self._entries.append(entry)
        self.counts[deed] += 1
        return entry

    def at_once(self, deed: Deed, model: str, state: str = "") -> Entry:
        entry = self.begin(deed, model, state)
        entry.ended = entry.began
        return entry

    def during(self, deed: Deed, model: str, since: float, until: float, after: float = 0.0) -> list[Entry]:
        """The deeds on the model in effect, or so many seconds `after` their end, at some time in between."""
        return [
            entry
            for entry in self._entries
            if entry.deed is deed
            and entry.model == model
            and entry.began <= until
            and (entry.ended is None or entry.ended + after >= since)
        ]
