"""What the soak did to the service, and when: it must explain every error."""

from collections import Counter, deque
from dataclasses import dataclass
from enum import StrEnum

from benchmarks.sse_client import now

# Longer than any deed can have an effect.
KEPT_SECONDS = 180.0


class Deed(StrEnum):
    """`PAUSED`: stopped for less time than the service tolerates, so it explains nothing."""

    KILLED = "killed"
    STOPPED = "stopped"
    PAUSED = "paused"
    UNLOADED = "unloaded"
    FORCED = "unloaded by force"
    PINNED = "pinned"
    LETHAL = "fault triggered"
    LOADED = "loaded"
    UPLOADED = "uploaded"


@dataclass
class Entry:
    """One deed on one model, in effect from `began` to `ended` (None: still). `state`: of its engine then."""

    deed: Deed
    model: str
    began: float
    ended: float | None = None
    state: str = ""

    def end(self) -> None:
        if self.ended is None:
            self.ended = now()


class Timeline:
    """Deeds in the order in which they began."""

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
        """Deeds on the model that overlap the interval; each counts until `after` seconds past its end."""
        return [
            entry
            for entry in self._entries
            if entry.deed is deed
            and entry.model == model
            and entry.began <= until
            and (entry.ended is None or entry.ended + after >= since)
        ]
