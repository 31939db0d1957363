"""The only Engine implementation: a host process behind a unix socket.

Owns the socket's file, the log pipe and the HTTP client. Does not interpret bodies.
"""

import asyncio
import json
import logging
import shutil
import signal
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from inference_service.backends.preload import PROGRAMS
from inference_service.checkpoints.snapshot import Snapshot
from inference_service.engines.base import (
    GRACE_SECONDS,
    About,
    Fingerprint,
    Heartbeat,
    HostSpec,
    Prepared,
    Swapped,
)
from inference_service.engines.error_hints import in_plain_words
from inference_service.engines.host_client import HostClient, HostConnection
from inference_service.engines.host_log import HostLog
from inference_service.engines.launcher import Host, Launcher, kill_group
from inference_service.errors import (
    AdapterRefused,
    EngineDied,
    EngineError,
    EngineKilled,
    EngineStartFailed,
    LauncherGone,
    ServiceError,
    SwapFailed,
)

logger = logging.getLogger(__name__)

# After SIGKILL, only a launcher that hangs causes a wait.
KILLED_SECONDS = 5.0
# Below the 5 s after which vLLM's server closes an idle connection, so that a request is never sent
# into a connection that is being closed.
KEEP_ALIVE_SECONDS = 2.0
HEARTBEAT_PATH = "/control/heartbeat"
_BACKENDS = {program: str(backend) for backend, program in PROGRAMS.items()}


class ProcessEngine:
    """An engine in its own host process (see engines/base.py for the protocol)."""

    def __init__(
        self,
        launcher: Launcher,
        spec: HostSpec,
        directory: Path,
        respecify: Callable[[Snapshot], HostSpec],
    ) -> None:
        """`directory` is private to the service; the engine creates its own directory in it.

        `respecify`: the specification of a host that serves another snapshot in the same way.
        """
        self._launcher = launcher
        self._spec = spec
        self._respecify = respecify
        self._directory = directory
        self._socket = directory / "host.sock"
        self._log = HostLog(spec.model, self._enter)
        self._phases: dict[str, float] = {}
        self._host: Host | None = None
        self._client: HostClient | None = None
        self._replies: set[HostReply] = set()
        self._cut_with: ServiceError | None = None
        self._cannot_prepare = False
        self.about = About()

    @property
    def process_id(self) -> int | None:
        return None if self._host is None else self._host.pid

    @property
    def phases(self) -> Mapping[str, float]:
        return self._phases

    async def start(self) -> None:
        self._enter("start")
        self._log.attach()
        self._host = await self._launch()
        self._client = HostClient(str(self._socket), KEEP_ALIVE_SECONDS)
        await self._answer_or_death(self._host)

    async def forward(self, path: str, body: bytes, request_id: str) -> "HostReply":
        headers = {"content-type": "application/json", "x-request-id": request_id}
        with self._translated():
            response = await self._open_client.request("POST", path, body, headers)
        reply = HostReply(self, response, self._replies.discard)
        self._replies.add(reply)
        if self._cut_with is not None:  # at the same moment
            reply.abort_all(self._cut_with)
        return reply

    async def heartbeat(self) -> Heartbeat:
        status, content = await self._ask("GET", HEARTBEAT_PATH)
        if status != 200:
            raise self._cut_with or self.died()
        return Heartbeat(**json.loads(content))

    async def weight_check(self) -> Fingerprint:
        return _fingerprint(await self._command("GET", "/control/weight-check", None, SwapFailed))

    async def swap(self, snapshot: Snapshot) -> Swapped:
        spec = await asyncio.to_thread(self._respecify, snapshot)
        self._log.model = spec.model
        answer = await self._command("POST", "/control/swap", spec.to_json(), SwapFailed)
        self._spec = spec
        copied, total = answer.get("copied_bytes"), answer.get("total_bytes")
        return Swapped(_fingerprint(answer), answer["seconds"], copied, total, answer.get("copied_from", {}))

    async def sleep(self) -> int | None:
        try:
            answer = await self._command("POST", "/control/sleep", {}, EngineError, absent=_NoRoute)
        except _NoRoute:
            return None
        freed = answer.get("freed_bytes") if isinstance(answer, dict) else None
        if not isinstance(freed, int) or freed < 0:
            raise EngineError(f"the host does not say how many bytes it has freed: {answer}")
        return freed

    async def prepare(self, snapshot: Snapshot) -> Prepared | None:
        if self._cannot_prepare:
            return None
        try:
            answer = await self._command(
                "POST", "/control/prepare", _directory(snapshot), EngineError, absent=_NoRoute
            )
        except _NoRoute:
            self._cannot_prepare = True
            return None
        return Prepared(**answer)

    async def forget(self, snapshot: Snapshot) -> None:
        await self._command("POST", "/control/forget", _directory(snapshot), EngineError)

    async def add_adapter(self, name: str, number: int, adapter: Snapshot) -> None:
        command = {"name": name, "id": number, "directory": str(adapter.path)}
        await self._command("POST", "/control/adapters", command, AdapterRefused)

    async def remove_adapter(self, name: str) -> None:
        await self._command("DELETE", f"/control/adapters/{name}", None, AdapterRefused)

    async def _command(
        self,
        method: str,
        path: str,
        command: dict[str, Any] | None,
        failed: type[EngineError],
        *,
        absent: type[EngineError] | None = None,
    ) -> dict[str, Any]:
        """The host's reply to a control request; raises `failed` with the host's reason.

        `absent`: raised instead if the host does not have the route.
        """
        status, content = await self._ask(method, path, command)
        try:
            answer: dict[str, Any] = json.loads(content)
        except ValueError:
            answer = {"error": content[:500].decode(errors="replace")}
            status = max(status, 500)
        if status == 404 and absent is not None:
            raise absent(path)
        if status != 200:
            raise failed(f"{answer.get('error', answer)}")
        return answer

    async def _ask(self, method: str, path: str, command: dict[str, Any] | None = None) -> tuple[int, bytes]:
        """Status and content of the reply to a control request; raises EngineDied."""
        body = b"" if command is None else json.dumps(command).encode()
        headers = {} if command is None else {"content-type": "application/json"}
        with self._translated():
            response = await self._open_client.request(method, path, body, headers)
            try:
                return response.status, await response.read()
            finally:
                response.close()

    def _enter(self, phase: str) -> None:
        self._phases[phase] = time.monotonic()

    async def wait_dead(self) -> str:
        if self._host is None:
            return "it was never started"
        status = await self._host.wait()
        if self._host.with_launcher:
            return "the launcher ended, and its engines with it"
        return self._death(status)

    def abort_all(self, error: ServiceError) -> None:
        self._cut_with = self._cut_with or error
        for reply in list(self._replies):
            reply.abort_all(error)
        if self._client is not None:
            self._client.close()  # it also wakes tasks that wait for a reply to begin

    async def close(self, grace: float = GRACE_SECONDS) -> None:
        self.abort_all(self.died())
        if self._host is not None:
            await self._end(self._host, grace)
        self._log.close()
        shutil.rmtree(self._directory, ignore_errors=True)

    @property
    def _open_client(self) -> HostClient:
        if self._client is None or self._client.closed:
            raise self._cut_with or EngineDied(
                f"The engine of '{self._spec.model}' is not running. Try again."
            )
        return self._client

    async def _launch(self) -> Host:
        self._directory.mkdir(mode=0o700)
        with _listen(self._socket) as listener:
            try:
                return await self._launcher.launch(self._spec, listener, self._log.writer)
            finally:
                self._log.close_writer()

    async def _answer_or_death(self, host: Host) -> None:
        """Wait for the host's first response.

        The socket has been listening since before the fork, so the request waits in its queue until the
        engine is up, without polling.
        """
        answer = asyncio.ensure_future(self._first_answer())
        death = asyncio.ensure_future(host.wait())
        try:
            await asyncio.wait({answer, death}, return_when=asyncio.FIRST_COMPLETED)
            if not answer.done() or answer.exception() is not None:
                host.kill(signal.SIGKILL)
                raise self._start_failure(host, await death)
        finally:
            answer.cancel()
            death.cancel()

    async def _first_answer(self) -> None:
        status, content = await self._ask("GET", "/health")
        if status != 200:
            raise self.died()
        self.about = _about(content, self._spec)

    def _start_failure(self, host: Host, status: int) -> EngineError:
        if host.with_launcher:
            return LauncherGone(
                f"The engine of '{self._spec.model}' did not start: the launcher ended meanwhile. Try again.",
                retry_after=1,
            )
        reason = self._death(status)
        kind = EngineKilled if status < 0 and self._log.last_error() is None else EngineStartFailed
        return kind(f"The engine of '{self._spec.model}' did not start: {reason}", param="model")

    def _death(self, status: int) -> str:
        self._log.close()
        return in_plain_words(self._log.last_error(), status)

    async def _end(self, host: Host, grace: float) -> None:
        if grace > 0:
            host.kill(signal.SIGTERM)
            try:
                async with asyncio.timeout(grace):
                    await host.wait()
                    return
            except TimeoutError:
                logger.warning("host does not end, killing it", extra={"model": self._spec.model})
        await self._kill(host)

    async def _kill(self, host: Host) -> None:
        host.kill(signal.SIGKILL)
        try:
            async with asyncio.timeout(KILLED_SECONDS):
                await host.wait()
        except TimeoutError:
            # The launcher does not respond: signal the host directly.
            logger.error("host is not reported dead, going on", extra={"model": self._spec.model})
            kill_group(host.pid)

    @contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise self._cut_with or self.died() from error

    def died(self) -> EngineDied:
        return EngineDied(
            f"The engine of '{self._spec.model}' went away while it worked on this request. "
            "Send the request again: a fresh engine is started.",
            retry_after=1,
        )


class HostReply:
    """A host's HTTP response as it arrives (see engines/base.py for the protocol)."""

    def __init__(
        self,
        engine: ProcessEngine,
        response: HostConnection,
        closed: Callable[["HostReply"], None],
    ) -> None:
        self._engine = engine
        self._response = response
        response.translate = self._error
        # No layer for each chunk of a stream.
        self.chunk = response.chunk
        self.read = response.read
        self._closed = closed
        self._cut: ServiceError | None = None
        self._is_closed = False
        # Of the response, whose connection serves another request after the end.
        self.status = response.status
        self.content_type = response.content_type

    def _error(self, error: Exception) -> Exception:
        """What a reader gets instead of the connection's own error."""
        return self._cut or self._engine.died()

    def close(self) -> None:
        self._closed(self)
        if not self._is_closed:
            self._is_closed = True
            self._response.close()

    def abort_all(self, error: ServiceError) -> None:
        """Wake the reader with `error`."""
        self._cut = self._cut or error
        if not self._is_closed:
            self._response.cut()


class _NoRoute(EngineError):
    """The host has no such control route."""


def _directory(snapshot: Snapshot) -> dict[str, Any]:
    return {"directory": str(snapshot.path)}


def _about(body: bytes, spec: HostSpec) -> About:
    """vLLM's server returns an empty body: the reply is the request."""
    answer = json.loads(body) if body else {}
    return About(answer.get("backend", _BACKENDS.get(spec.program)), tuple(answer.get("notes", ())))


def _fingerprint(answer: dict[str, Any]) -> Fingerprint:
    return Fingerprint(tuple((int(token), float(logprob)) for token, logprob in answer["fingerprint"]))


@contextmanager
def _listen(path: Path) -> Iterator[socket.socket]:
    """A unix socket that listens at once and only this user can open."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        listener.bind(str(path))
        path.chmod(0o600)
        listener.listen(2048)
        yield listener
    finally:
        listener.close()
