"""`inference-service` and `python -m inference_service`: settings -> socket -> launcher -> server.

The socket listens before anything heavy is imported, and the launcher starts before any thread or event
loop exists. The other commands, `models` and `pull`, are in cli.py.
"""

import argparse
import asyncio
import contextlib
import gc
import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING, NoReturn

from inference_service import __version__
from inference_service.backends.base import (
    BackendMissing,
    check_load_format,
    choose_backend,
)
from inference_service.config import Backend, BadSettings, Settings, load_settings
from inference_service.machine.device import Device, find_device

if TYPE_CHECKING:
    import uvicorn

    from inference_service.api.service import Service

logger = logging.getLogger("inference_service")

BACKLOG = 2048
KEEP_ALIVE_SECONDS = 30
LAST_CONNECTIONS_SECONDS = 1
# After DRAIN_TIMEOUT, for engines to end and connections to close; then the process exits in any case.
# Cloud Run kills it 10 s after the signal, DRAIN_TIMEOUT is 7 s by default.
LAST_SECONDS = 1.35


def main() -> None:
    """Run the given command, or serve."""
    parser = argparse.ArgumentParser(prog="inference-service", description="Serve the models in a bucket.")
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    commands.add_parser("serve", help="serve them over HTTP (the default)")
    models = commands.add_parser("models", help="list the models in the bucket")
    models.add_argument("--json", action="store_true", help="one JSON object per line")
    pull = commands.add_parser("pull", help="fetch a model into LOCAL_MODEL_CACHE")
    pull.add_argument("model", help="its name, as `models` shows it; name@revision for one revision")
    given = parser.parse_args()
    if given.command in (None, "serve"):
        serve()
    else:
        _command(given)


def _command(given: argparse.Namespace) -> None:
    """Exit code 1 and one line for an error, 2 for a bad setting."""
    # A shell starts background jobs with Ctrl-C ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        settings = load_settings()
    except BadSettings as error:
        _exit(2, error)
    # Imported only now: `--help` and a bad setting need no Google client.
    from inference_service import cli
    from inference_service.errors import ServiceError

    try:
        if given.command == "models":
            cli.list_models(settings, sys.stdout, as_json=given.json)
        else:
            cli.pull(settings, given.model, sys.stdout)
        sys.stdout.flush()
    except BrokenPipeError:
        os._exit(0)  # the reader of the output is gone
    except (ServiceError, OSError) as error:
        _exit(1, error)
    except KeyboardInterrupt:
        _exit(130, "interrupted; what has arrived is kept, and the next pull resumes there")
    # Not sys.exit: a hanging connection must not delay the exit.
    os._exit(0)


def _exit(code: int, error: object) -> NoReturn:
    sys.stderr.write(f"inference-service: {error}\n")
    sys.stderr.flush()
    os._exit(code)


def serve() -> None:
    """Serve until SIGTERM or Ctrl-C; exit code 2 and one line for a bad setting."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: sys.exit(0))
    try:
        settings = load_settings()
        device = find_device()
        backend = choose_backend(settings.engine, device, int8=settings.quantizes)
        check_load_format(settings.load_format, device, backend)
        _make_cache(settings)
        listener = _listen(settings)
    except (BadSettings, BackendMissing, OSError) as error:
        sys.stderr.write(f"inference-service: {error}\n")
        sys.exit(2)
    _serve(settings, device, backend, listener)
    # Not sys.exit: the interpreter would wait for threads, and a fetch that hangs never ends.
    logging.shutdown()
    os._exit(0)


def _make_cache(settings: Settings) -> None:
    cache = settings.local_model_cache
    try:
        cache.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(f"LOCAL_MODEL_CACHE={cache} cannot be created: {error.strerror or error}") from error


def _listen(settings: Settings) -> socket.socket:
    address = (settings.listen_address, settings.port)
    family = socket.AF_INET6 if ":" in settings.listen_address else socket.AF_INET
    try:
        return socket.create_server(address, family=family, backlog=BACKLOG)
    except (OSError, TypeError, UnicodeError) as error:
        raise OSError(
            f"PORT={settings.port} on LISTEN_ADDRESS={settings.listen_address} cannot be bound: "
            f"{getattr(error, 'strerror', None) or error}"
        ) from error


def _serve(settings: Settings, device: Device, backend: Backend, listener: socket.socket) -> None:
    # Imported only now: the port is open, and the launcher imports vLLM at the same time.
    from inference_service.backends.cuda import why_too_old
    from inference_service.backends.environment import launcher_environment
    from inference_service.backends.without_effect import without_effect
    from inference_service.engines.fork_safety import why_spawned
    from inference_service.engines.launcher import Launcher
    from inference_service.logs import configure_logs

    configure_logs(settings.log_format, settings.log_level)
    for setting, why in without_effect(settings, device, backend):
        logger.warning("%s has no effect: %s", setting, why)
    too_old = why_too_old(device)
    if too_old is not None:
        logger.warning("engines may not start on this GPU: %s", too_old)
    environment = launcher_environment(backend, device, settings.local_model_cache)
    cold = why_spawned(settings.warm_launcher, device)
    launcher = Launcher(backend.value, device.kind.value, environment, cold)
    try:
        import uvicorn

        from inference_service.app import build_app

        app = build_app(settings, device, backend, launcher)
        # What exists by now stays: full collections need not scan it again, 26 ms each time.
        gc.collect()
        gc.freeze()
        config = uvicorn.Config(
            app,
            log_config=None,
            access_log=False,
            server_header=False,
            # /admin trusts the socket's peer, not what a header says about it.
            proxy_headers=False,
            ws="none",
            timeout_keep_alive=KEEP_ALIVE_SECONDS,
            timeout_graceful_shutdown=LAST_CONNECTIONS_SECONDS,
        )
        address = "http://{}:{}".format(*listener.getsockname()[:2])
        fields = {"bucket": settings.gcs_bucket, "device": device.kind, "backend": backend}
        logger.info("listening on %s", address, extra=fields)
        with asyncio.Runner(loop_factory=config.get_loop_factory()) as runner:
            runner.run(_until_signal(_server(config), app.state.service, listener))
    finally:
        launcher.close()


def _server(config: "uvicorn.Config") -> "uvicorn.Server":
    import uvicorn

    class Server(uvicorn.Server):
        @contextlib.contextmanager
        def capture_signals(self) -> Iterator[None]:
            """Signals are ours: uvicorn would close the port first and exit with the signal."""
            yield

    return Server(config)


async def _until_signal(server: "uvicorn.Server", service: "Service", listener: socket.socket) -> None:
    """Serve; at the first signal drain, then end. Further signals change nothing."""
    signalled = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, signalled.set)
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    waiting = asyncio.create_task(signalled.wait())
    await asyncio.wait({serving, waiting}, return_when=asyncio.FIRST_COMPLETED)
    waiting.cancel()
    if not serving.done():
        logger.info("shutting down")
        _exit_after(service.settings.drain_timeout + LAST_SECONDS)
        await service.drain()
        server.should_exit = True
        await service.pool.close()
    await serving
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().remove_signal_handler(number)
        signal.signal(number, signal.SIG_IGN)


def _exit_after(seconds: float) -> None:
    """In case anything hangs: the hosts end with this process, which alone holds their lifeline."""
    last_resort = threading.Timer(seconds, os._exit, (0,))
    last_resort.daemon = True
    last_resort.start()


if __name__ == "__main__":
    main()
