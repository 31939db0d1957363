"""Moves bytes: spans of objects into files, over a few connections that all fetches share.

A free connection serves the fetch that has the fewest at work, so two fetches share the bandwidth
evenly. The span that it takes shrinks as the fetch nears its end, and where none is left it takes over
half of the largest rest of another: all connections finish together, and none waits for a slow one. Every
file is checked as a whole when its last byte is there.
"""

import random
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from contextlib import closing
from dataclasses import replace

import google_crc32c

from inference_service.errors import SnapshotCorrupt, StoreUnavailable
from inference_service.storage.job import Job, Pace, Part, Span
from inference_service.storage.progress import Progress
from inference_service.storage.staging import Arrival, Stretch
from inference_service.storage.store import RETRY_AFTER_SECONDS, Store


class Mover:
    """The connections to one store."""

    def __init__(self, store: Store, pace: Pace | None = None) -> None:
        self._store = store
        self._pace = pace or Pace()
        self._jobs: list[Job] = []
        self._threads = 0
        self._changed = threading.Condition()

    def move(self, spans: Iterable[Span], progress: Progress, note: Callable[[Stretch], None]) -> Job:
        """Begin a fetch; returns at once. `note` is told of every stretch that has arrived.

        All files of `spans` are verified and durable once the job has ended without an error.
        """
        waiting = deque(spans)
        arrivals = frozenset(span.arrival for span in waiting)
        job = Job(progress, note, waiting, arrivals, len(arrivals), self._pace.retries)
        if not waiting:
            job.ended.set()
            return job
        with self._changed:
            self._jobs.append(job)
            for _ in range(self._threads, self._pace.connections):
                self._threads += 1
                threading.Thread(target=self._work, name="fetch", daemon=True).start()
            self._changed.notify_all()
        return job

    def _work(self) -> None:
        while (taken := self._take()) is not None:
            job, part = taken
            try:
                self._fetch(job, part)
            except Exception as error:
                self._end(job, error)
            finally:
                with self._changed:
                    job.parts.discard(part)
                    left = not job.parts and job.ended.is_set()
                    self._changed.notify_all()
                if left:
                    # Only the last closes the files: until then another may still write to them.
                    for arrival in job.arrivals:
                        arrival.close()

    def _take(self) -> tuple[Job, Part] | None:
        """What to fetch next; waits for it; None once there is no job any more."""
        with self._changed:
            while self._jobs:
                now = time.monotonic()
                for job in sorted(self._jobs, key=lambda job: len(job.parts)):
                    part = self._cut(job, now) or self._split(job)
                    if part is not None:
                        job.parts.add(part)
                        return job, part
                waits = [wait for job in self._jobs if (wait := job.ready_in(now)) is not None]
                # A part that is too small to be split now is not worth a look every moment.
                self._changed.wait(min(waits, default=None))
            self._threads -= 1
            return None

    def _cut(self, job: Job, now: float) -> Part | None:
        """Guided self-scheduling: one connection's even share of what no connection has yet."""
        pace = self._pace
        span = next((span for span in job.spans if span.ready_at <= now), None)
        if span is None:
            return None
        job.spans.remove(span)
        left = span.bytes + sum(other.bytes for other in job.spans)
        size = min(pace.max_span, max(pace.min_span, left // pace.connections))
        end = span.end
        if span.bytes > size + pace.min_span // 2:
            end = span.start + size
            job.spans.appendleft(replace(span, start=end))
        return Part(span.arrival, span.start, end, span.failures, span.start)

    def _split(self, job: Job) -> Part | None:
        """The second half of the largest part that another connection still has to fetch."""
        largest = max(job.parts, key=lambda part: part.left, default=None)
        if largest is None or job.spans or largest.left < 2 * self._pace.min_span:
            return None
        middle = largest.position + largest.left // 2
        half = Part(largest.arrival, middle, largest.end, 0, middle)
        largest.end = middle
        return half

    def _fetch(self, job: Job, part: Part) -> None:
        if job.ended.is_set():
            return
        writer = _Writer(job, part, self._pace, self._claim)
        error: StoreUnavailable | None = None
        try:
            with closing(self._store.read(part.arrival.stored, part.start, part.end)) as chunks:
                for chunk in chunks:
                    writer.write(chunk)
                    if job.ended.is_set() or part.left == 0:
                        break
        except StoreUnavailable as unavailable:
            error = unavailable
        writer.end()
        if not job.ended.is_set():
            self._arrived(job, part, error)

    def _claim(self, part: Part, count: int) -> int:
        """How many of `count` bytes that came are the part's own; the rest another has taken over."""
        with self._changed:
            count = min(count, part.left)
            part.position += count
            return count

    def _arrived(self, job: Job, part: Part, error: StoreUnavailable | None) -> None:
        gained = part.position - part.start
        with self._changed:
            part.arrival.missing -= gained
            complete = part.arrival.missing == 0 and part.left == 0
            job.retries_left = min(self._pace.retries, job.retries_left + gained // self._pace.stretch)
        if part.left > 0:
            self._again(job, part, gained, error or _cut_short(part))
        elif complete:
            self._complete(job, part.arrival)

    def _again(self, job: Job, part: Part, gained: int, error: StoreUnavailable) -> None:
        """Put the rest of a part that broke off back, to be fetched after a while; or give up."""
        pace = self._pace
        failures = 1 if gained >= pace.stall_bytes else part.failures + 1
        job.progress.retried()
        with self._changed:
            job.retries_left -= 1
            if failures < pace.attempts and job.retries_left > 0:
                # Jitter, but never none: connections that failed together come back apart.
                delay = min(pace.longest_delay, pace.first_delay * 2 ** (failures - 1))
                ready_at = time.monotonic() + delay * random.uniform(0.5, 1.0)  # noqa: S311
                job.spans.append(Span(part.arrival, part.position, part.end, ready_at, failures))
                # No half of it can be taken over any more.
                job.parts.discard(part)
                self._changed.notify_all()
                return
        self._end(job, error)

    def _complete(self, job: Job, arrival: Arrival) -> None:
        """Every byte of a file is there: verify it as a whole, make it durable."""
        expected, found = self._store.checksum(arrival.stored), arrival.checksum()
        if found == expected:
            arrival.flush()
            with self._changed:
                job.files_left -= 1
                done = job.files_left == 0
            if done:
                self._end(job, None)
            return
        arrival.damaged += 1
        if arrival.damaged >= self._pace.damaged_attempts:
            raise SnapshotCorrupt(
                f"{arrival.stored.name} arrived damaged {arrival.damaged} times: crc32c {found:08x} "
                f"over {arrival.stored.size} bytes, the store holds {expected:08x}. Nothing of it was kept; "
                "try again, and upload it anew if this goes on.",
                retry_after=RETRY_AFTER_SECONDS,
            )
        job.progress.advance(-arrival.stored.size)
        job.progress.retried()
        with self._changed:
            arrival.missing = arrival.stored.size
            job.spans.append(Span(arrival, 0, arrival.stored.size))
            self._changed.notify_all()

    def _end(self, job: Job, error: Exception | None) -> None:
        with self._changed:
            if job.ended.is_set():
                return
            job.error = error
            job.spans.clear()
            self._jobs.remove(job)
            job.ended.set()
            self._changed.notify_all()


class _Writer:
    """Writes one part as it comes, notes its stretches, and wants progress."""

    def __init__(self, job: Job, part: Part, pace: Pace, claim: Callable[[Part, int], int]) -> None:
        self._job = job
        self._part = part
        self._pace = pace
        self._claim = claim
        self._written = self._noted = part.start
        self._sum = 0
        self._watched_at = time.monotonic()
        self._watched_from = part.start

    def write(self, chunk: bytes) -> None:
        """Raises StoreUnavailable where the bytes only drip, OSError where the disk is full."""
        count = self._claim(self._part, len(chunk))
        if count < len(chunk):
            chunk = chunk[:count]
        self._part.arrival.write(chunk, self._written)
        self._sum = google_crc32c.extend(self._sum, chunk)
        self._written += count
        self._job.progress.advance(count)
        if self._written - self._noted >= self._pace.stretch:
            self.end()
        self._watch()

    def end(self) -> None:
        """Note what has arrived since the last stretch."""
        if self._written > self._noted:
            self._job.note(Stretch(self._part.arrival.name, self._noted, self._written, self._sum))
            self._noted, self._sum = self._written, 0

    def _watch(self) -> None:
        now = time.monotonic()
        if now - self._watched_at < self._pace.stall_seconds:
            return
        gained = self._written - self._watched_from
        if gained < self._pace.stall_bytes and self._part.left > 0:
            raise StoreUnavailable(
                f"{self._part.arrival.stored.name} only drips: {gained} bytes in "
                f"{self._pace.stall_seconds:g} s.",
                retry_after=RETRY_AFTER_SECONDS,
            )
        self._watched_at, self._watched_from = now, self._written


def _cut_short(part: Part) -> StoreUnavailable:
    return StoreUnavailable(
        f"{part.arrival.stored.name} broke off at byte {part.position} of {part.arrival.stored.size}.",
        retry_after=RETRY_AFTER_SECONDS,
    )
