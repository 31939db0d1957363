"""The launcher and its hosts as processes: forks, deaths, and nobody left behind.

With the fake backend: the same launcher, socket and host process as vLLM's, without its imports.
"""

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from inference_service.engines.base import HostSpec
from inference_service.engines.launcher import Launcher
from inference_service.engines.process_engine import HostReply, ProcessEngine
from inference_service.errors import EngineDied, EngineStartFailed


def spec(program: str = "inference_service.hosts.fake", rate: str = "100") -> HostSpec:
    return HostSpec("m", program, "/nowhere", (rate,), {"SEEN_IN_HOST": "yes"}, 16, 0.7)


@pytest.fixture
async def launcher() -> AsyncIterator[Launcher]:
    launcher = Launcher("fake", "cpu", {})
    launcher.attach()
    yield launcher
    launcher.close()


def engine(launcher: Launcher, room: Path, given: HostSpec | None = None) -> ProcessEngine:
    order = given or spec()
    return ProcessEngine(launcher, order, room / "engine", lambda snapshot: order)


async def until(true: object, seconds: float = 5) -> None:
    deadline = time.monotonic() + seconds
    while not true():  # type: ignore[operator]
        assert time.monotonic() < deadline
        await asyncio.sleep(0.01)


async def test_a_host_answers_and_ends(launcher: Launcher, tmp_path: Path) -> None:
    host = engine(launcher, tmp_path)
    await host.start()
    pid = host.process_id
    assert pid is not None
    assert os.getpgid(pid) == pid, "a process group of its own"
    reply = await host.forward("/v1/completions", b'{"prompt": "x", "max_tokens": 3}', "id")
    assert (reply.status, reply.content_type) == (200, "application/json")
    assert b"the quick brown" in await reply.read()
    await host.close()
    assert not psutil.pid_exists(pid)
    assert not (tmp_path / "engine").exists()
    with pytest.raises(EngineDied):
        await host.forward("/v1/completions", b"{}", "id")


async def test_closing_a_reply_aborts_the_generation(launcher: Launcher, tmp_path: Path) -> None:
    host = engine(launcher, tmp_path)
    await host.start()
    body = b'{"prompt": "x", "max_tokens": 10000, "stream": true}'
    reply = await host.forward("/v1/completions", body, "id")
    await reply.chunk()
    assert (await host.heartbeat()).running == 1
    reply.close()
    for _ in range(100):
        if (await host.heartbeat()).running == 0:
            break
        await asyncio.sleep(0.01)
    assert (await host.heartbeat()).running == 0
    await host.close()


async def read_to_end(reply: HostReply) -> None:
    while await reply.chunk():
        pass


async def test_a_host_killed_in_the_middle_of_a_reply(launcher: Launcher, tmp_path: Path) -> None:
    host = engine(launcher, tmp_path)
    await host.start()
    body = b'{"prompt": "x", "max_tokens": 10000, "stream": true}'
    reply = await host.forward("/v1/completions", body, "id")
    await reply.chunk()
    assert host.process_id is not None
    os.kill(host.process_id, signal.SIGKILL)
    with pytest.raises(EngineDied, match="went away"):
        await read_to_end(reply)
    reply.close()
    assert "SIGKILL" in await host.wait_dead()
    await host.close()


async def test_a_host_that_cannot_start_says_its_last_error(launcher: Launcher, tmp_path: Path) -> None:
    host = engine(launcher, tmp_path, spec(rate="no number"))
    with pytest.raises(EngineStartFailed, match="could not convert string to float: 'no number'"):
        await host.start()
    await host.close()
    good = engine(launcher, tmp_path)
    await good.start()
    await good.close()


async def test_a_program_that_does_not_exist(launcher: Launcher, tmp_path: Path) -> None:
    host = engine(launcher, tmp_path, spec("inference_service.hosts.nobody"))
    with pytest.raises(EngineStartFailed, match="No module named"):
        await host.start()
    await host.close()


async def test_a_host_that_ignores_sigterm_is_killed(launcher: Launcher, tmp_path: Path) -> None:
    host = engine(launcher, tmp_path)
    await host.start()
    pid = host.process_id
    assert pid is not None
    os.kill(pid, signal.SIGSTOP)
    await host.close(grace=0.3)
    assert not psutil.pid_exists(pid)


async def test_a_cancelled_start_leaves_no_process(launcher: Launcher, tmp_path: Path) -> None:
    for steps in range(8):
        host = engine(launcher, tmp_path)
        starting = asyncio.create_task(host.start())
        for _ in range(steps):
            await asyncio.sleep(0.004)
        starting.cancel()
        await asyncio.gather(starting, return_exceptions=True)
        await host.close()
    await until(lambda: psutil.Process(launcher.process_id).children() == [])


async def test_a_dead_launcher_takes_its_hosts_along_and_is_replaced(
    launcher: Launcher, tmp_path: Path
) -> None:
    first = engine(launcher, tmp_path)
    await first.start()
    pid, old = first.process_id, launcher.process_id
    assert pid is not None
    os.kill(old, signal.SIGKILL)
    await asyncio.wait_for(first.wait_dead(), 5)
    await until(lambda: not psutil.pid_exists(pid) or psutil.Process(pid).status() == "zombie")
    await first.close()
    second = engine(launcher, tmp_path)
    await second.start()
    assert launcher.process_id != old
    await second.close()


async def test_a_dead_launcher_ends_replies_under_way(launcher: Launcher, tmp_path: Path) -> None:
    """Closing the engine wakes who reads: it does not wait for the request's timeout."""
    host = engine(launcher, tmp_path)
    await host.start()
    reply = await host.forward(
        "/v1/completions", b'{"prompt": "x", "max_tokens": 9999, "stream": true}', "id"
    )
    await reply.chunk()

    reading = asyncio.create_task(read_to_end(reply))
    await asyncio.sleep(0.05)
    os.kill(launcher.process_id, signal.SIGKILL)
    await asyncio.wait_for(host.wait_dead(), 5)
    await host.close()
    with pytest.raises(EngineDied):
        await asyncio.wait_for(reading, 10)
    reply.close()


async def test_a_launch_cancelled_in_the_moment_it_is_done_leaves_no_host(
    launcher: Launcher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    host = engine(launcher, tmp_path)
    starting = asyncio.create_task(host.start())
    launched = Launcher._launched

    def launched_and_cancelled(self: Launcher, order: int, pid: int) -> None:
        launched(self, order, pid)
        starting.cancel()

    monkeypatch.setattr(Launcher, "_launched", launched_and_cancelled)
    with pytest.raises(asyncio.CancelledError):
        await starting
    await host.close()
    await until(lambda: psutil.Process(launcher.process_id).children() == [])


async def test_a_host_that_a_real_time_signal_ends(launcher: Launcher, tmp_path: Path) -> None:
    host = engine(launcher, tmp_path)
    await host.start()
    assert host.process_id is not None
    os.kill(host.process_id, 40)
    assert "signal 40" in await host.wait_dead()
    await host.close()


async def test_what_a_host_leaves_behind_is_killed_and_reaped(launcher: Launcher, tmp_path: Path) -> None:
    """A process of the group outlives its leader, as an engine core does after the host's SIGKILL."""
    host = engine(launcher, tmp_path, spec("tests.engines.forking_host"))
    await host.start()
    pid = host.process_id
    assert pid is not None
    (child,) = psutil.Process(pid).children()
    os.kill(pid, signal.SIGKILL)
    await asyncio.wait_for(host.wait_dead(), 5)
    assert not child.is_running(), "when the death is told, nothing of the group is left"
    await host.close()


async def test_the_launcher_has_one_thread_and_no_gpu(launcher: Launcher, tmp_path: Path) -> None:
    host = engine(launcher, tmp_path)
    await host.start()
    process = psutil.Process(launcher.process_id)
    assert process.num_threads() == 1
    assert not [f for f in Path(f"/proc/{process.pid}/fd").iterdir() if "nvidia" in str(f.readlink())]
    await host.close()


async def test_a_backend_that_cannot_be_imported(tmp_path: Path) -> None:
    launcher = Launcher("vllm", "cpu", {"PYTHONPATH": str(_broken_vllm(tmp_path))})
    launcher.attach()
    host = engine(launcher, tmp_path)
    with pytest.raises(EngineStartFailed, match="half an installation"):
        await host.start()
    await host.close()
    launcher.close()


def _broken_vllm(room: Path) -> Path:
    package = room / "broken" / "vllm"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise ImportError('half an installation')")
    return package.parent


PARENT = """
import asyncio, os, sys
from pathlib import Path
from inference_service.engines.launcher import Launcher
from tests.engines.test_launcher import engine

async def main():
    launcher = Launcher("fake", "cpu", {})
    launcher.attach()
    host = engine(launcher, Path(sys.argv[1]))
    await host.start()
    print(launcher.process_id, host.process_id, flush=True)
    await asyncio.sleep(600)

asyncio.run(main())
"""


def test_sigkill_of_the_service_ends_launcher_and_hosts(tmp_path: Path) -> None:
    service = subprocess.Popen(
        [sys.executable, "-c", PARENT, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    assert service.stdout is not None
    with service, service.stdout:
        family = [psutil.Process(int(pid)) for pid in service.stdout.readline().split()]
        assert len(family) == 2
        service.kill()
        service.wait()
    _, left = psutil.wait_procs(family, timeout=15)
    assert left == []


async def test_a_close_that_is_cancelled_can_be_begun_anew(launcher: Launcher, tmp_path: Path) -> None:
    for turns in range(12):
        host = engine(launcher, tmp_path)
        await host.start()
        reply = await host.forward(
            "/v1/completions", b'{"prompt": "x", "max_tokens": 9999, "stream": true}', "id"
        )
        closing = asyncio.create_task(host.close())
        for _ in range(turns):
            await asyncio.sleep(0)
        closing.cancel()
        await asyncio.gather(closing, return_exceptions=True)
        await asyncio.wait_for(host.close(grace=0.3), 5)
        reply.close()
        await until(lambda: psutil.Process(launcher.process_id).children() == [])


RECORD = """
import os
with open({file!r}, "a") as file:
    file.write(repr(os.environ.get("CUDA_VISIBLE_DEVICES")) + "\\n")
"""


def recording_module(room: Path, module: str) -> Path:
    """Put a module into `room` that notes which GPUs its import sees; where to."""
    file = room / f"{module}.seen"
    path = room / (f"{module}.py" if module != "vllm" else "vllm/__init__.py")
    path.parent.mkdir(exist_ok=True)
    path.write_text(RECORD.format(file=str(file)))
    return file


def show_gpus(monkeypatch: pytest.MonkeyPatch, visible: str | None) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)


async def seen_by_host(launcher: Launcher, room: Path) -> tuple[str, list[str]]:
    """Which GPUs a host sees, and its title."""
    order = replace(spec("tests.engines.seeing_host"), directory=str(room))
    host = engine(launcher, room, order)
    await host.start()
    assert host.process_id is not None
    command = [part for part in psutil.Process(host.process_id).cmdline() if part]
    await host.close()
    return (room / "seen").read_text().strip(), command


@pytest.mark.parametrize("visible", [None, "0", "2,3", "GPU-8932f937"])
async def test_a_preload_sees_no_gpu_and_a_forked_host_sees_the_services(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, visible: str | None
) -> None:
    show_gpus(monkeypatch, visible)
    seen = recording_module(tmp_path, "preloaded_later")
    launcher = Launcher("fake", "cuda", {"PYTHONPATH": str(tmp_path)})
    launcher.attach()
    try:
        launcher.preload(["preloaded_later"])
        by_host, command = await seen_by_host(launcher, tmp_path)
        assert command == ["inference-service: m (forked)"]
        assert by_host == repr(visible)
        assert seen.read_text() == "''\n"
    finally:
        launcher.close()


async def test_the_backends_import_sees_no_gpu_and_a_spawned_host_sees_the_services(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    show_gpus(monkeypatch, "1,2")
    seen = recording_module(tmp_path, "vllm")
    for name in ("v1", "v1/engine"):
        (tmp_path / "vllm" / name).mkdir()
        (tmp_path / "vllm" / name / "__init__.py").touch()
    (tmp_path / "vllm/v1/engine/core.py").touch()
    launcher = Launcher("vllm", "cuda", {"PYTHONPATH": str(tmp_path)})
    launcher.attach()
    try:
        by_host, command = await seen_by_host(launcher, tmp_path)
        assert command == ["inference-service: m (spawned)"], "this vLLM lacks what a fork needs"
        assert by_host == repr("1,2")
        assert seen.read_text() == "''\n"
    finally:
        launcher.close()


async def test_where_there_is_no_gpu_nothing_is_hidden(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    show_gpus(monkeypatch, "0")
    seen = recording_module(tmp_path, "preloaded_later")
    launcher = Launcher("fake", "cpu", {"PYTHONPATH": str(tmp_path)})
    launcher.attach()
    try:
        launcher.preload(["preloaded_later"])
        await seen_by_host(launcher, tmp_path)
        assert seen.read_text() == "'0'\n"
    finally:
        launcher.close()


async def test_a_preload_that_forbids_a_fork_makes_the_next_hosts_import_by_themselves(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    thread = "import threading\nthreading.Thread(target=threading.Event().wait, daemon=True).start()\n"
    (tmp_path / "starts_a_thread.py").write_text(thread)
    launcher = Launcher("fake", "cuda", {"PYTHONPATH": str(tmp_path)})
    launcher.attach()
    try:
        _, command = await seen_by_host(launcher, tmp_path)
        assert command == ["inference-service: m (forked)"]
        launcher.preload(["starts_a_thread"])
        _, command = await seen_by_host(launcher, tmp_path)
        assert command == ["inference-service: m (spawned)"]
        assert "it has 2 threads, and a fork keeps one since starts_a_thread was imported" in caplog.text
    finally:
        launcher.close()


@pytest.mark.parametrize("name", ["ADMIN_API_KEY", "admin_api_key"])
async def test_hosts_do_not_get_the_operators_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setenv(name, "a-secret")
    launcher = Launcher("fake", "cpu", {})
    launcher.attach()
    try:
        host = engine(launcher, tmp_path)
        await host.start()
        for pid in (launcher.process_id, host.process_id):
            assert name not in psutil.Process(pid).environ()
        await host.close()
    finally:
        launcher.close()


async def test_a_cold_launcher_starts_hosts_that_import_everything_themselves(tmp_path: Path) -> None:
    launcher = Launcher("fake", "cpu", {}, "for this test")
    launcher.attach()
    try:
        host = engine(launcher, tmp_path)
        await host.start()
        pid = host.process_id
        assert pid is not None
        assert psutil.Process(pid).cmdline()[0] == "inference-service: m (spawned)"
        assert os.getpgid(pid) == pid
        assert psutil.Process(pid).environ()["SEEN_IN_HOST"] == "yes"
        reply = await host.forward("/v1/completions", b'{"prompt": "x", "max_tokens": 3}', "id")
        assert b"the quick brown" in await reply.read()
        await host.close()
        assert not psutil.pid_exists(pid)
    finally:
        launcher.close()


async def test_a_cold_host_that_fails_says_why(tmp_path: Path) -> None:
    launcher = Launcher("fake", "cpu", {}, "for this test")
    launcher.attach()
    try:
        host = engine(launcher, tmp_path, spec("nobody_has_it"))
        with pytest.raises(EngineStartFailed, match="nobody_has_it"):
            await host.start()
        await host.close()
    finally:
        launcher.close()


async def test_a_launcher_that_dies_is_started_again_at_once(launcher: Launcher, tmp_path: Path) -> None:
    host = engine(launcher, tmp_path)
    await host.start()
    first = launcher.process_id
    os.kill(first, signal.SIGKILL)
    await asyncio.wait_for(host.wait_dead(), 5)
    await until(lambda: launcher.process_id != first)
    await host.close()
    await host_answers(launcher, tmp_path)


async def host_answers(launcher: Launcher, room: Path) -> None:
    host = engine(launcher, room)
    await host.start()
    reply = await host.forward("/v1/completions", b'{"prompt": "x", "max_tokens": 3}', "id")
    assert b"the quick brown" in await reply.read()
    await host.close()


async def test_a_module_that_cannot_be_preloaded_harms_nobody(launcher: Launcher, tmp_path: Path) -> None:
    launcher.preload(["nobody.has.it", "json.tool"])
    await host_answers(launcher, tmp_path)


async def test_hosts_are_reaped_where_zombies_cannot_be_looked_at(tmp_path: Path) -> None:
    """As on macOS, whose Python 3.11 has no os.waitid."""
    (tmp_path / "sitecustomize.py").write_text("import os\ndel os.waitid\n")
    launcher = Launcher("fake", "cpu", {"PYTHONPATH": str(tmp_path)})
    launcher.attach()
    try:
        host = engine(launcher, tmp_path)
        await host.start()
        pid = host.process_id
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        assert "SIGKILL" in await asyncio.wait_for(host.wait_dead(), 5)
        await host.close()
        assert not psutil.pid_exists(pid)
    finally:
        launcher.close()
