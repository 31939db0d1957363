"""Downloads spans of objects into files, over a few connections that all fetches share.

A free connection serves the fetch with the fewest connections, and a fetch without any gets one from the
others, so two fetches share the bandwidth evenly. The span that a connection takes shrinks towards the end of
the fetch, and when no span is left it takes over half of the largest remainder of another: all connections
finish together, and none waits for a slow one. Every file is verified as a whole once its last byte is there.
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
from inference_service.storage.bucket.store import RETRY_AFTER_SECONDS, Store
from inference_service.storage.snapshots.progress import Progress
from inference_service.storage.snapshots.staging import IncomingFile, Stretch
from inference_service.storage.snapshots.transfer import Job, Part, Span, TransferConfig

LEAVE_SECONDS = 1.0


class Downloader:
    """The connections to one store."""

    def __init__(self, store: Store, config: TransferConfig | None = None) -> None:
        self.config = config or TransferConfig(connections=store.connections)
        self._store = store
        self._jobs: list[Job] = []
        self._threads = 0
        self._changed = threading.Condition()

    def move(self, spans: Iterable[Span], progress: Progress, note: Callable[[Stretch], None]) -> Job:
        """Start a fetch; returns at once. `note` is called for every stretch that has arrived.

        All files of `spans` are verified and durable once the job has ended without an error. Until then,
        call `watch` regularly.
        """
        waiting = deque(spans)
        files = frozenset(span.file for span in waiting)
        job = Job(progress, note, waiting, files, len(files), self.config.retries)
        if not waiting:
            job.ended.set()
            return job
        with self._changed:
            self._make_way(job)
            self._jobs.append(job)
            self._hire()
            self._changed.notify_all()
            without_thread = self._threads == 0
        if without_thread:
            self._end(job, StoreUnavailable("No thread can be started for the fetch."))
        return job

    def watch(self, job: Job) -> None:
        """Break off every part that has made too little progress lately, whatever its connection hangs in."""
        now = time.monotonic()
        with self._changed:
            due = [part for part in job.parts if now - part.watched_at >= self.config.stall_seconds]
            completed = [part.file for part in due if self._stalls(part, now) and self._abandon(job, part)]
            if job in self._jobs:
                self._hire()
        for file in completed:
            try:
                self._complete(job, file)
            except Exception as error:
                self._end(job, error)

    def stop(self, job: Job, error: BaseException) -> None:
        """End a job, unless it has ended; once this returns, no connection starts to write to its files.

        Blocks for at most LEAVE_SECONDS if connections hang. Those are abandoned and replaced.
        """
        self._end(job, error)
        with self._changed:
            self._changed.wait_for(lambda: not job.parts, LEAVE_SECONDS)
            # Threads that write or verify do not wait for the store: the file is closed only after them.
            for part in [part for part in job.parts if not part.writing and not part.accounted]:
                _stop_here(part)
                self._let_go(job, part)
            idle = not job.parts
        if idle:
            for file in job.files:
                file.close()

    def _stalls(self, part: Part, now: float) -> bool:
        gained = part.position - part.watched_from
        part.watched_at, part.watched_from = now, part.position
        # A slow disk, or a file that is being verified, is not a stall of the store.
        return gained < self.config.stall_bytes and not part.writing and not part.accounted

    def _abandon(self, job: Job, part: Part) -> bool:
        """Let others fetch the rest of a part; its thread ends with its connection.

        Returns whether the part's file is complete without it.
        """
        end = _stop_here(part)
        self._let_go(job, part)
        complete = self._account(job, part)
        if part.position < end:
            self._again(job, part, end, _stalled(part, self.config))
        return complete

    def _let_go(self, job: Job, part: Part) -> None:
        """Stop counting a part's thread: another may be started in its place."""
        part.abandoned = True
        job.parts.discard(part)
        self._threads -= 1

    def _hire(self) -> None:
        """Start threads up to the number of connections, or as many as the system allows."""
        while self._threads < self.config.connections:
            thread = threading.Thread(target=self._work, name="fetch", daemon=True)
            try:
                thread.start()
            except RuntimeError:
                return
            self._threads += 1

    def _make_way(self, newcomer: Job) -> None:
        """Shorten the parts of other fetches, so that a new one gets its share of the connections now."""
        busy = [part for job in self._jobs for part in job.parts]
        if len(busy) < self.config.connections:
            return
        share = max(1, self.config.connections // (len(self._jobs) + 1))
        wanted = sum(span.bytes for span in newcomer.spans) // self.config.min_span + 1
        for _ in range(min(share, wanted)):
            job = max(self._jobs, key=lambda job: sum(part.left > 0 for part in job.parts))
            part = max(job.parts, key=lambda part: part.left, default=None)
            if part is None or part.left <= self.config.min_span:
                return
            job.spans.appendleft(Span(part.file, part.position, _stop_here(part)))

    def _work(self) -> None:
        while (taken := self._take()) is not None:
            job, part = taken
            try:
                self._fetch(job, part)
            except Exception as error:
                self._end(job, error)
            finally:
                self._leave(job, part)
            if part.abandoned:
                return

    def _leave(self, job: Job, part: Part) -> None:
        with self._changed:
            job.parts.discard(part)
            last = not job.parts and job.ended.is_set()
            self._changed.notify_all()
        if last:
            # Only the last one closes the files: until then another may still write to them.
            for file in job.files:
                file.close()

    def _take(self) -> tuple[Job, Part] | None:
        """The next part to fetch, waiting for one; None once the downloader is closed."""
        with self._changed:
            while self._jobs:
                now = time.monotonic()
                for job in sorted(self._jobs, key=lambda job: len(job.parts)):
                    part = self._cut(job, now) or self._split(job, now)
                    if part is not None:
                        job.parts.add(part)
                        return job, part
                waits = [wait for job in self._jobs if (wait := job.ready_in(now)) is not None]
                self._changed.wait(min(waits, default=None))
            self._threads -= 1
            return None

    def _cut(self, job: Job, now: float) -> Part | None:
        """Guided self-scheduling: an even share, per connection, of what no connection has taken yet."""
        config = self.config
        span = next((span for span in job.spans if span.ready_at <= now), None)
        if span is None:
            return None
        job.spans.remove(span)
        left = span.bytes + sum(other.bytes for other in job.spans)
        size = min(config.max_span, max(config.min_span, left // config.connections))
        end = span.end
        if span.bytes > size + config.min_span // 2:
            end = span.start + size
            job.spans.appendleft(replace(span, start=end))
        return Part(span.file, span.start, end, span.failures, span.start, now, span.start)

    def _split(self, job: Job, now: float) -> Part | None:
        """The second half of the largest part that another connection still has to fetch."""
        largest = max(job.parts, key=lambda part: part.left, default=None)
        if largest is None or job.spans or largest.left < 2 * self.config.min_span:
            return None
        middle = largest.position + largest.left // 2
        half = Part(largest.file, middle, largest.end, 0, middle, now, middle)
        largest.end = middle
        return half

    def _fetch(self, job: Job, part: Part) -> None:
        if job.ended.is_set():
            return
        writer = _Writer(job, part, self.config.stretch, self._claim)
        error: StoreUnavailable | None = None
        try:
            with closing(self._store.read(part.file.stored, part.start, part.end)) as chunks:
                for chunk in chunks:
                    writer.write(chunk)
                    self._wrote(part)
                    if job.ended.is_set() or part.left == 0:
                        break
        except StoreUnavailable as unavailable:
            error = unavailable
        writer.end()
        self._arrived(job, part, error)

    def _claim(self, part: Part, count: int) -> int:
        """How many of the `count` received bytes belong to the part; another has taken over the rest."""
        with self._changed:
            count = min(count, part.left)
            part.position += count
            part.writing = count > 0
            return count

    def _wrote(self, part: Part) -> None:
        with self._changed:
            part.writing = False

    def _arrived(self, job: Job, part: Part, error: StoreUnavailable | None) -> None:
        with self._changed:
            if part.abandoned or job.ended.is_set():
                return
            complete = self._account(job, part)
            if part.left > 0:
                self._again(job, part, _stop_here(part), error or _cut_short(part))
                return
        if complete:
            self._complete(job, part.file)

    def _account(self, job: Job, part: Part) -> bool:
        """Account for the bytes of a part; returns whether its file is now complete, true only once."""
        part.accounted = True
        part.file.missing -= part.gained
        job.retries_left = min(self.config.retries, job.retries_left + part.gained / self.config.credit)
        complete = part.file.missing == 0 and not part.file.complete
        part.file.complete |= complete
        return complete

    def _again(self, job: Job, part: Part, end: int, error: StoreUnavailable) -> None:
        """Put back the rest of a broken part, to be fetched after a delay; or give up."""
        config = self.config
        failures = 1 if part.gained >= config.stall_bytes else part.failures + 1
        job.progress.retried()
        job.retries_left -= 1
        if failures >= config.attempts or job.retries_left <= 0:
            self._end(job, error)
            return
        # Jitter, so that connections that failed together retry at different times; but never no delay.
        delay = min(config.longest_delay, config.first_delay * 2 ** (failures - 1))
        ready_at = time.monotonic() + delay * random.uniform(0.5, 1.0)  # noqa: S311
        job.spans.append(Span(part.file, part.position, end, ready_at, failures))
        self._changed.notify_all()

    def _complete(self, job: Job, file: IncomingFile) -> None:
        """Verify a complete file as a whole and make it durable."""
        expected, checksums = self._expected(file), file.read_back()
        found = checksums.crc32c
        if found == expected:
            file.flush()
            file.close()
            file.checksums = checksums
            with self._changed:
                job.files_left -= 1
                done = job.files_left == 0
            if done:
                self._end(job, None)
            return
        file.damaged += 1
        if file.damaged >= self.config.damaged_attempts:
            raise SnapshotCorrupt(
                f"{file.stored.name} arrived damaged {file.damaged} times: crc32c {found:08x} "
                f"over {file.stored.size} bytes, the store holds {expected:08x}. Nothing of it was kept; "
                "try again, and upload it again if this persists.",
                retry_after=RETRY_AFTER_SECONDS,
            )
        job.progress.advance(-file.stored.size)
        job.progress.retried()
        with self._changed:
            file.start_over()
            job.spans.append(Span(file, 0, file.stored.size))
            self._changed.notify_all()

    def _expected(self, file: IncomingFile) -> int:
        """What the store says, or that of the bytes as they arrived from a store without checksums."""
        received = None if self._store.has_checksums else file.crc32c_received()
        return self._store.checksum(file.stored) if received is None else received

    def _end(self, job: Job, error: BaseException | None) -> None:
        with self._changed:
            if job.ended.is_set():
                return
            job.error = error
            job.spans.clear()
            self._jobs.remove(job)
            job.ended.set()
            idle = not job.parts
            self._changed.notify_all()
        if idle:
            for file in job.files:
                file.close()


class _Writer:
    """Writes one part as it arrives, and journals its stretches."""

    def __init__(self, job: Job, part: Part, stretch: int, claim: Callable[[Part, int], int]) -> None:
        self._job = job
        self._part = part
        self._stretch = stretch
        self._claim = claim
        self._written = self._noted = part.start
        self._sum = 0

    def write(self, chunk: bytes) -> None:
        """Raises OSError if the disk is full."""
        count = self._claim(self._part, len(chunk))
        if count == 0:
            return
        if count < len(chunk):
            chunk = chunk[:count]
        self._part.file.write(chunk, self._written)
        self._sum = google_crc32c.extend(self._sum, chunk)
        self._written += count
        self._job.progress.advance(count)
        if self._written - self._noted >= self._stretch:
            self.end()

    def end(self) -> None:
        """Journal what has arrived since the last stretch."""
        if self._written > self._noted:
            stretch = Stretch(self._part.file.name, self._noted, self._written, self._sum)
            self._part.file.received(stretch)
            self._job.note(stretch)
            self._noted, self._sum = self._written, 0


def _stop_here(part: Part) -> int:
    """End a part at its position; returns its previous end."""
    end, part.end = part.end, part.position
    return end


def _stalled(part: Part, config: TransferConfig) -> StoreUnavailable:
    return StoreUnavailable(
        f"{part.file.stored.name}: fewer than {config.stall_bytes} bytes came in {config.stall_seconds:g} s.",
        retry_after=RETRY_AFTER_SECONDS,
    )


def _cut_short(part: Part) -> StoreUnavailable:
    return StoreUnavailable(
        f"{part.file.stored.name} broke off at byte {part.position} of {part.file.stored.size}.",
        retry_after=RETRY_AFTER_SECONDS,
    )
