"""OpenAI's API over a model that transformers runs, on the socket that the service passed in.

For machines without vLLM (Apple's, any CPU) and architectures that vLLM lacks. Starts and stops the server;
generation/ runs the model, openai/ is the API, control.py handles the service's control requests.
"""

import asyncio
import logging
import signal
import socket
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI, Request
from starlette.responses import Response
from transformers.utils import logging as transformers_logging

from inference_service.engines.base import HostSpec
from inference_service.hosts.phases import enter_phase
from inference_service.hosts.transformers.control import control
from inference_service.hosts.transformers.generation import attention
from inference_service.hosts.transformers.generation.engine import Engine
from inference_service.hosts.transformers.generation.malloc import give_back
from inference_service.hosts.transformers.openai.chat import chat
from inference_service.hosts.transformers.openai.completions import complete
from inference_service.hosts.transformers.openai.serving import Served
from inference_service.hosts.transformers.options import parse_options, serve

POLL_INTERVAL = 0.2
QUIET_SECONDS = 5.0
# Longer than the service keeps idle connections.
KEEP_ALIVE_SECONDS = 5

logger = logging.getLogger(__name__)


def run(spec: HostSpec, listener: socket.socket, instead_of: str | None = None) -> None:
    """Serve until SIGTERM. Raises transformers' error if the model cannot be loaded.

    `instead_of`: the backend that should have served the model but does not support it.
    """
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    # Progress bars are for terminals; the service reports the phases.
    transformers_logging.disable_progress_bar()
    # It logs its settings at each start.
    logging.getLogger("ContinuousBatchingLogger").setLevel(logging.WARNING)
    enter_phase("start")
    options = parse_options(spec)
    if options.engine.place.device == "cpu":
        attention.install()
    engine = Engine(Path(spec.directory), options.engine)
    logger.info("serving with %s", engine)
    try:
        notes = [engine.limitation] if engine.limitation is not None else []
        if options.engine.place.int8:
            notes.append("weights are quantized to 8 bits (CPU_INT8)")
        if instead_of is not None:
            notes.append(f"{instead_of} does not run this architecture: transformers serves it, more slowly")
        app = build_app(serve(engine, spec, options), notes)
        app.state.in_place_of_another = instead_of is not None
        asyncio.run(_serve(app, engine, listener))
    finally:
        engine.close()


async def _serve(app: FastAPI, engine: Engine, listener: socket.socket) -> None:
    config = uvicorn.Config(
        app,
        access_log=False,
        log_level="warning",
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=1,
    )
    server = _Unsignalled(config)
    loop = asyncio.get_running_loop()
    terminated = asyncio.Event()
    loop.add_signal_handler(signal.SIGTERM, terminated.set)
    serving = loop.create_task(server.serve(sockets=[listener]))
    ends = [loop.create_task(terminated.wait()), loop.create_task(_death(engine))]
    tidying = loop.create_task(_tidy(engine))
    await asyncio.wait([serving, *ends], return_when=asyncio.FIRST_COMPLETED)
    server.should_exit = True
    await serving
    for task in (*ends, tidying):
        task.cancel()
    if not terminated.is_set() and not engine.runner.is_alive():
        raise RuntimeError("the engine's thread has died")


async def _death(engine: Engine) -> None:
    while engine.runner.is_alive():  # noqa: ASYNC110  (transformers has no event for it)
        await asyncio.sleep(POLL_INTERVAL)


async def _tidy(engine: Engine) -> None:
    """Return the memory that a burst of requests took to the system once the engine is idle."""
    tidied = last = engine.runner.steps
    while True:
        await asyncio.sleep(QUIET_SECONDS)
        quiet = engine.runner.running == 0 and engine.runner.steps == last
        if quiet and last != tidied:
            await asyncio.to_thread(give_back)
            tidied = last
        last = engine.runner.steps


class _Unsignalled(uvicorn.Server):
    def capture_signals(self) -> Any:
        """Leave SIGTERM to _serve."""
        from contextlib import nullcontext

        return nullcontext()


def build_app(served: Served, notes: list[str]) -> FastAPI:
    """`notes`: what the operator should know about how the model is run."""
    app = FastAPI(openapi_url=None)
    app.state.served = served
    app.state.notes = notes
    app.state.in_place_of_another = False
    app.include_router(control)
    app.add_api_route("/health", _health)
    app.add_api_route("/v1/chat/completions", _chat, methods=["POST"])
    app.add_api_route("/v1/completions", _complete, methods=["POST"])
    return app


async def _health(request: Request) -> dict[str, Any]:
    """The service shows this to its operator."""
    return {"backend": "transformers", "notes": request.app.state.notes}


async def _chat(request: Request) -> Response:
    return await chat(request, request.app.state.served)


async def _complete(request: Request) -> Response:
    return await complete(request, request.app.state.served)
