"""The launcher's program: a fork server (zygote). It imports the backend once, then forks each host.

multiprocessing.forkserver is not enough: its children lead no process groups, outlive a killed service and
leave orphans (vLLM's own processes) unreaped. It also hides errors of its preloads, and cannot start a host
in another way if a fork would not be safe.

Runs as `python -m inference_service.engines.launcher_process CONTROL_FD LIFELINE_FD BACKEND DEVICE PARENT
COLD` in a single thread, because a fork keeps only the thread that called it. It imports the backend but
never initializes CUDA, which does not survive a fork: the GPUs are hidden during the imports. If a fork would
not be safe (fork_safety.py), or COLD gives a reason not to fork, a host imports everything itself
(spawned_host.py).

Messages (see channel.py):
    service -> launcher   {"launch": id, "spec": {...}}  with two descriptors: listener, log
                          {"kill": pid, "signal": n}     the host's whole process group
                          {"preload": module}            the next hosts will need it
    launcher -> service   {"imported": seconds, "cold": reason or null} | {"failed": reason}
                          {"launched": id, "pid": n} | {"refused": id, "reason": text}
                          {"cold": reason}               hosts are no longer forked: a preload forbids it
                          {"exited": pid, "status": n}   once no process of its group is left
"""

import contextlib
import ctypes
import gc
import importlib
import json
import os
import selectors
import signal
import socket
import sys
import tempfile
import time
import traceback
import warnings
from contextlib import AbstractContextManager, nullcontext
from types import FrameType
from typing import Any, NoReturn

from inference_service.backends.preload import PRELOAD, PRELOAD_VLLM
from inference_service.config import Backend
from inference_service.engines.base import HostSpec
from inference_service.engines.channel import Channel
from inference_service.engines.fork_safety import gpus_hidden, why_cold
from inference_service.engines.lifeline import end_group_with_service
from inference_service.engines.process_title import FORKED, title_host

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36


def main() -> None:
    control = Channel(socket.socket(fileno=int(sys.argv[1])))
    lifeline, backend, device, parent = int(sys.argv[2]), sys.argv[3], sys.argv[4], int(sys.argv[5])
    cold = sys.argv[6] or None
    _die_with(parent)
    _adopt_orphans()
    started = time.monotonic()
    # Python 3.12 and later also warns of native pools' threads, which are harmless (fork_safety.py).
    warnings.filterwarnings("ignore", ".*multi-threaded, use of fork", DeprecationWarning)
    gc.disable()  # imported objects stay: garbage collection would take an eighth of the time
    try:
        if cold is None:
            with _nothing_visible(device):
                preload(backend, device)
                cold = why_cold(backend)
    except Exception as error:
        traceback.print_exc()
        control.send({"failed": f"{type(error).__name__}: {error}"})
        sys.exit(1)
    imported = round(time.monotonic() - started, 2)
    control.send({"imported": imported, "cold": cold})
    # Pages that the collector never touches again stay shared with all hosts.
    gc.collect()
    gc.freeze()
    gc.enable()
    _Launcher(control, lifeline, backend, device, cold=cold is not None).serve()


def preload(backend: str, device: str) -> None:
    """Import what hosts of `backend` need; raises what the first import raises."""
    first, *others = PRELOAD[Backend(backend)]
    importlib.import_module(first)
    for name in (*others, *(PRELOAD_VLLM.get(device, ()) if backend == "vllm" else ())):
        _preload(name)


def _nothing_visible(device: str) -> AbstractContextManager[None]:
    return gpus_hidden() if device == "cuda" else nullcontext()


def _preload(name: str) -> None:
    try:
        importlib.import_module(name)
    except (Exception, SystemExit) as error:  # a host reports itself what it lacks
        _say(f"WARNING: {name} was not preloaded: {type(error).__name__}: {error}")


class _Launcher:
    def __init__(self, control: Channel, lifeline: int, backend: str, device: str, *, cold: bool) -> None:
        self._control = control
        self._lifeline = lifeline
        self._backend = backend
        self._device = device
        self._cold = cold
        self._hosts: set[int] = set()
        self._ending: dict[int, int] = {}
        self._wakeup_read, self._wakeup_write = os.pipe()
        os.set_blocking(self._wakeup_write, False)

    def serve(self) -> None:
        """Handle requests and report exited hosts until the service closes its end."""
        signal.set_wakeup_fd(self._wakeup_write)
        signal.signal(signal.SIGCHLD, _wake)
        with selectors.DefaultSelector() as selector:
            selector.register(self._control, selectors.EVENT_READ, self._obey)
            selector.register(self._wakeup_read, selectors.EVENT_READ, self._reap)
            while True:
                for key, _ in selector.select():
                    key.data()

    def _obey(self) -> None:
        try:
            messages = self._control.receive()
        except ConnectionResetError:
            messages = None
        if messages is None:
            self._end()
        for message in messages:
            self._carry_out(message)

    def _carry_out(self, message: dict[str, Any]) -> None:
        if "launch" in message:
            descriptors = self._control.descriptors(2)
            try:
                self._launch(message["launch"], message["spec"], *descriptors)
            finally:
                for descriptor in descriptors:
                    os.close(descriptor)
        elif "kill" in message:
            self._kill(message["kill"], message["signal"])
        elif not self._cold:
            self._preload(message["preload"])

    def _preload(self, module: str) -> None:
        """Import a module, which may make forking unsafe."""
        with _nothing_visible(self._device):
            _preload(module)
            cold = why_cold(self._backend)
        if cold is not None:
            self._cold = True
            self._control.send({"cold": f"{cold} since {module} was imported"})

    def _launch(self, order: int, spec: dict[str, Any], listener: int, log: int) -> None:
        try:
            pid = os.fork()
        except OSError as error:  # out of processes or memory: no reason to end the other hosts
            self._control.send({"refused": order, "reason": str(error)})
            return
        if pid == 0:
            self._become_host(HostSpec.from_json(spec), listener, log)
        self._hosts.add(pid)
        # Here too, not only in the child: a kill may be requested before the child has run.
        _lead_group(pid)
        self._control.send({"launched": order, "pid": pid})

    def _become_host(self, spec: HostSpec, listener: int, log: int) -> NoReturn:
        try:
            signal.set_wakeup_fd(-1)
            for number in (signal.SIGCHLD, signal.SIGTERM, signal.SIGINT):
                signal.signal(number, signal.SIG_DFL)
            _lead_group(0)
            os.dup2(log, 1)
            os.dup2(log, 2)
            self._control.close_in_fork()
            for descriptor in (self._wakeup_read, self._wakeup_write, log):
                os.close(descriptor)
            os.environ.update(spec.environment)
            if self._cold:
                _become_spawned_host(spec, listener, self._lifeline)
            title_host(spec.model, FORKED)
            end_group_with_service(self._lifeline)
            tempfile.tempdir = None  # the host's own TMPDIR, not the one cached by the imports
            program = importlib.import_module(spec.program)
            program.run(spec, socket.socket(fileno=listener))
        except BaseException as error:
            _report_failure(error)
            os._exit(1)
        sys.stdout.flush()
        os._exit(0)

    def _kill(self, pid: int, number: int) -> None:
        # Only hosts that were not reaped: until then, their group's id cannot be reused.
        if pid in self._hosts:
            _kill_group(pid, number)

    def _reap(self) -> None:
        """Reap all ended children: hosts, and orphans of hosts, which this process adopts."""
        os.read(self._wakeup_read, 4096)
        if not hasattr(os, "waitid"):
            self._reap_leaders()
        while hasattr(os, "waitid") and (pid := _next_zombie()) is not None:
            if pid in self._hosts:
                # Before the leader is reaped: until then, the group's id cannot be reused.
                _kill_group(pid, signal.SIGKILL)
                self._hosts.discard(pid)
                self._ending[pid] = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            else:
                os.waitpid(pid, 0)
        for pid in [pid for pid in self._ending if not _group_exists(pid)]:
            exited = {"exited": pid, "status": self._ending.pop(pid)}
            self._control.send(exited)

    def _reap_leaders(self) -> None:
        """For macOS: a zombie cannot be examined before it is reaped, and process 1 adopts orphans."""
        for pid in list(self._hosts):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                self._hosts.discard(pid)
                _kill_group(pid, signal.SIGKILL)
                self._ending[pid] = os.waitstatus_to_exitcode(status)

    def _end(self) -> NoReturn:
        for pid in self._hosts:
            _kill_group(pid, signal.SIGKILL)
        sys.exit(0)


def _wake(number: int, frame: FrameType | None) -> None:
    """The wake-up descriptor is written only if a Python-level handler exists."""


def _next_zombie() -> int | None:
    try:
        found = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        return None
    return None if found is None else found.si_pid


def _group_exists(pid: int) -> bool:
    try:
        os.killpg(pid, 0)
    except (ProcessLookupError, PermissionError):  # macOS raises it if all processes of a group are zombies
        return False
    return True


def _lead_group(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.setpgid(pid, 0)


def _kill_group(pid: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, number)


def _die_with(parent: int) -> None:
    """Have the kernel end this process when the service ends, even during an import."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # the service was gone before this call
        sys.exit(1)


def _adopt_orphans() -> None:
    """Adopt the orphans of dead hosts, in order to reap them.

    Otherwise process 1 adopts them, which in a container is the service and reaps nothing.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1)


def _become_spawned_host(spec: HostSpec, listener: int, lifeline: int) -> NoReturn:
    for descriptor in (listener, lifeline):
        os.set_inheritable(descriptor, True)
    order = json.dumps(spec.to_json())
    command = [sys.executable, "-m", "inference_service.engines.spawned_host"]
    os.execv(sys.executable, [*command, order, str(listener), str(lifeline)])  # noqa: S606


def _say(line: str) -> None:
    sys.stderr.write(f"{line}\n")
    sys.stderr.flush()


def _report_failure(error: BaseException) -> None:
    traceback.print_exc()
    _say(f"{type(error).__name__}: {error}")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
