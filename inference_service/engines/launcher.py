"""The service's side of the launcher: starts it, requests hosts from it, receives their exits.

The launcher's own program is `launcher_process.py`. This module owns the control socket and the lifeline: the
pipe that closes when the service ends, in whatever way, and thereby ends every host.
"""

import asyncio
import contextlib
import itertools
import logging
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterable
from typing import Any

from inference_service.engines.base import HostSpec
from inference_service.engines.channel import Channel
from inference_service.engines.host_log import HostLog
from inference_service.errors import EngineError, EngineStartFailed, LauncherGone

logger = logging.getLogger(__name__)


class Host:
    """A host process as the service sees it."""

    def __init__(self, launcher: "Launcher", pid: int) -> None:
        self._launcher = launcher
        self._exited: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self.pid = pid
        # Whether it ended because the launcher died.
        self.with_launcher = False

    @property
    def alive(self) -> bool:
        return not self._exited.done()

    async def wait(self) -> int:
        """The exit status once no process of the host's group is left; negative for a signal."""
        return await asyncio.shield(self._exited)

    def exited(self, status: int, *, with_launcher: bool = False) -> None:
        self.with_launcher = with_launcher
        self._exited.set_result(status)

    def kill(self, number: signal.Signals) -> None:
        """Signal the host's whole process group; does nothing once it is gone."""
        if self.alive:
            self._launcher.kill(self.pid, number)


class Launcher:
    """One launcher process. Start it before any thread or event loop; attach it to the loop later."""

    def __init__(
        self, backend: str, device: str, environment: dict[str, str], cold: str | None = None
    ) -> None:
        """`cold`: why each host must import the backend itself; None if hosts are forks of the launcher."""
        self._backend = backend
        self._device = device
        self._environment = environment
        self._cold = cold
        self._preloaded: dict[str, None] = {}
        self._orders = itertools.count()
        self._launching: dict[int, asyncio.Future[Host]] = {}
        self._hosts: dict[int, Host] = {}
        self._failure: str | None = None
        self._imported = False
        self._control: Channel
        self._lifeline: int
        self._process: subprocess.Popen[bytes]
        self._log: HostLog
        self._start()

    @property
    def process_id(self) -> int:
        return self._process.pid

    def attach(self) -> None:
        """Read the launcher's messages and its log in the running event loop."""
        self._control.setblocking(False)
        asyncio.get_running_loop().add_reader(self._control, self._receive)
        self._log.attach()

    async def launch(self, spec: HostSpec, listener: socket.socket, log: int) -> Host:
        """Fork a host that owns `listener` and writes to `log`.

        Waits while the launcher is importing; restarts a launcher that died. Raises EngineStartFailed if it
        cannot import its backend.
        """
        if self._process.poll() is not None:
            self._receive()  # what it reported before it ended
        if self._failure is not None:
            self._restart()
        order = next(self._orders)
        launched: asyncio.Future[Host] = asyncio.get_running_loop().create_future()
        self._launching[order] = launched
        message = {"launch": order, "spec": spec.to_json()}
        try:
            self._control.send(message, [listener.fileno(), log])
        except BlockingIOError as error:
            del self._launching[order]
            raise EngineStartFailed("The launcher does not respond; its queue is full.") from error
        except ConnectionError:
            # It has just died: `_receive` notices and fails every pending launch.
            logger.warning("the launcher died before it received the request")
        try:
            return await launched
        except asyncio.CancelledError:
            # Also if the host was launched at the same moment: no other code knows of it.
            if launched.done() and not launched.cancelled() and launched.exception() is None:
                launched.result().kill(signal.SIGKILL)
            raise

    def preload(self, modules: Iterable[str]) -> None:
        """Import what the next hosts will need; each module only once."""
        for module in modules:
            if module not in self._preloaded:
                self._preloaded[module] = None
                self._order_preload(module)

    def _order_preload(self, module: str) -> None:
        if self._failure is None:
            # If the launcher does not receive the request, the host imports the module itself.
            with contextlib.suppress(BlockingIOError, ConnectionError):
                self._control.send({"preload": module})

    def kill(self, pid: int, number: signal.Signals) -> None:
        if self._failure is not None:
            return
        try:
            self._control.send({"kill": pid, "signal": number})
        except BlockingIOError:
            kill_group(pid, number)
        except ConnectionError:
            logger.warning("the launcher died before it received the request")

    def close(self) -> None:
        """End the launcher and with it all remaining hosts; idempotent."""
        self._detach()
        if self._lifeline < 0:
            return
        os.close(self._lifeline)
        self._lifeline = -1
        self._process.kill()
        self._process.wait()
        self._log.close()

    def _start(self) -> None:
        self._control, theirs = Channel.pair()
        watched, self._lifeline = os.pipe()
        self._log = HostLog("launcher")
        command = [sys.executable, "-m", "inference_service.engines.launcher_process"]
        arguments = [theirs.fileno(), watched, self._backend, self._device, os.getpid(), self._cold or ""]
        self._process = subprocess.Popen(
            [*command, *map(str, arguments)],
            env=_inherited() | self._environment,
            pass_fds=(theirs.fileno(), watched),
            stdin=subprocess.DEVNULL,
            stdout=self._log.writer,
            stderr=self._log.writer,
            start_new_session=True,
        )
        theirs.close()
        os.close(watched)
        self._log.close_writer()

    def _restart(self) -> None:
        logger.warning("the launcher is gone, starting another")
        self.close()
        self._failure = None
        self._imported = False
        self._start()
        self.attach()
        for module in self._preloaded:
            self._order_preload(module)

    def _detach(self) -> None:
        if self._control.fileno() < 0:
            return
        with contextlib.suppress(RuntimeError):  # no loop: the service ends before it has started
            asyncio.get_running_loop().remove_reader(self._control)
        self._control.close()

    def _receive(self) -> None:
        """Read all messages that have arrived, up to the end of the launcher."""
        while self._failure is None:
            try:
                messages = self._control.receive()
            except BlockingIOError:
                return
            except ConnectionResetError:
                # It ended with requests unread. The socket reports that first, and only once; its last
                # messages can still be read.
                continue
            if messages is None:
                messages = [{"failed": "the launcher's process ended"}]
            for message in messages:
                self._take(message)

    def _take(self, message: dict[str, Any]) -> None:
        match message:
            case {"imported": seconds, "cold": cold}:
                self._imported = True
                logger.info("launcher is ready", extra={"import_seconds": seconds})
                if cold is not None:
                    self._engines_are_slower(str(cold))
            case {"cold": reason}:
                self._engines_are_slower(str(reason))
            case {"launched": order, "pid": pid}:
                self._launched(order, pid)
            case {"refused": order, "reason": reason}:
                self._refused(order, str(reason))
            case {"exited": pid, "status": status}:
                self._exited(pid, status)
            case {"failed": reason}:
                self._fail(str(reason))

    def _engines_are_slower(self, reason: str) -> None:
        level = logging.WARNING if self._cold is None else logging.INFO
        logger.log(level, "hosts are not forked from the launcher, so engines start more slowly: %s", reason)

    def _launched(self, order: int, pid: int) -> None:
        host = Host(self, pid)
        launched = self._launching.pop(order)
        if launched.done():  # cancelled: no engine needs this host any more
            self.kill(pid, signal.SIGKILL)
            return
        self._hosts[pid] = host
        launched.set_result(host)

    def _refused(self, order: int, reason: str) -> None:
        launched = self._launching.pop(order)
        if not launched.done():
            error = EngineStartFailed(f"No process could be started for the engine: {reason}")
            launched.set_exception(error)

    def _exited(self, pid: int, status: int) -> None:
        host = self._hosts.pop(pid, None)
        if host is not None:
            host.exited(status)

    def _fail(self, reason: str) -> None:
        """The launcher is gone: fail pending launches, and consider its hosts ended."""
        self._failure = reason
        self._detach()
        for launched in self._launching.values():
            if not launched.done():
                launched.set_exception(self._no_engine(reason))
        self._launching.clear()
        for pid, host in self._hosts.items():
            kill_group(pid)
            host.exited(-signal.SIGKILL, with_launcher=True)
        self._hosts.clear()
        if self._imported:
            # It worked until now: restart it so that the next load need not wait for its imports.
            asyncio.get_running_loop().call_soon(self._restart_after_death)

    def _restart_after_death(self) -> None:
        if self._failure is not None and self._lifeline >= 0:
            self._restart()

    def _no_engine(self, reason: str) -> EngineError:
        if self._imported:
            return LauncherGone(f"No engine could be started: {reason}. Try again.", retry_after=1)
        return EngineStartFailed(f"No engine can be started: {reason}")


def _inherited() -> dict[str, str]:
    """The service's environment without its secrets, which engines do not need."""
    return {name: value for name, value in os.environ.items() if name.upper() != "ADMIN_API_KEY"}


def kill_group(pid: int, number: signal.Signals = signal.SIGKILL) -> None:
    """Signal a host's group without the launcher, provided that it has not reaped the host."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, number)
