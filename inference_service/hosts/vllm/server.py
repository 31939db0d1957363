"""vLLM's own OpenAI server over one AsyncLLM, on the socket that the service passed in.

vLLM handles everything inside a request's body (templates, tools, structured outputs, log probabilities).
This module builds the server, makes the engine core a fork of the host, and shuts both down; control.py
handles the service's control requests.
"""

import asyncio
import dataclasses
import logging
import multiprocessing
import re
import signal
import socket
from argparse import Namespace

import uvicorn
import uvloop
import vllm.model_executor.models.registry as model_registry
import vllm.v1.engine.utils as engine_utils
from fastapi import FastAPI
from vllm import envs
from vllm.engine.protocol import EngineClient
from vllm.entrypoints.launchers.api_server.entry import build_async_engine_client
from vllm.entrypoints.launchers.app import build_app
from vllm.entrypoints.launchers.launcher import NoSignalServer
from vllm.platforms import current_platform
from vllm.utils.system_utils import decorate_logs

from inference_service.engines.base import HostSpec
from inference_service.hosts.phases import enter_phase
from inference_service.hosts.vllm.control import control, count_steps, parse_arguments, serve_model, warm_up

logger = logging.getLogger(__name__)

# vLLM's errors for a checkpoint without a model class (model_executor/models/registry.py).
_REFUSED = re.compile(r"are not supported for now|has no vLLM implementation|not compatible with vLLM")
# Less than GRACE_SECONDS, after which the service kills the process group.
ENGINE_SHUTDOWN_SECONDS = 3.0
# vLLM's own watchdog polls every 5 s: too slow for requests that wait for the engine.
POLL_INTERVAL = 0.2


def run(spec: HostSpec, listener: socket.socket) -> None:
    """Serve until SIGTERM. Raises vLLM's error if the engine cannot be built."""
    decorate_logs("Host")
    args = parse_arguments(spec)
    _inspect_models_here()
    if current_platform.is_cpu():
        _fork_engine_core()
    try:
        uvloop.run(_serve(args, spec, listener))
    except ValueError as error:
        if spec.fallback is None or not _REFUSED.search(str(error)):
            raise
        _serve_by_transformers(spec, listener, str(error))


def _serve_by_transformers(spec: HostSpec, listener: socket.socket, reason: str) -> None:
    """vLLM rejects an architecture before it builds anything, so transformers can take over this process."""
    from inference_service.hosts.transformers import server as transformers_server

    logger.warning("vLLM does not support this model, using the transformers backend: %s", reason)
    arguments = spec.fallback or ()
    transformers_server.run(dataclasses.replace(spec, arguments=arguments), listener, instead_of="vLLM")


async def _serve(args: Namespace, spec: HostSpec, listener: socket.socket) -> None:
    async with build_async_engine_client(args) as engine:
        app = await _build(args, spec, engine)
        config = uvicorn.Config(
            app,
            access_log=False,
            log_level="warning",
            timeout_keep_alive=envs.VLLM_HTTP_TIMEOUT_KEEP_ALIVE,
            timeout_graceful_shutdown=1,
        )
        server = NoSignalServer(config)
        app.state.server = server  # vLLM's error handlers stop it when the engine is dead
        await _until_terminated(server, engine, listener)


async def _until_terminated(server: uvicorn.Server, engine: EngineClient, listener: socket.socket) -> None:
    """Serve until SIGTERM, or until the engine has died."""
    loop = asyncio.get_running_loop()
    terminated = asyncio.Event()
    loop.add_signal_handler(signal.SIGTERM, terminated.set)
    serving = loop.create_task(server.serve(sockets=[listener]))
    waiting = loop.create_task(terminated.wait())
    dying = loop.create_task(_death(engine))
    await asyncio.wait({serving, waiting, dying}, return_when=asyncio.FIRST_COMPLETED)
    if terminated.is_set():
        # Otherwise it mistakes the engine core's shutdown for a crash and logs an error.
        engine.output_handler.cancel()
        await asyncio.to_thread(engine.shutdown, timeout=ENGINE_SHUTDOWN_SECONDS)
    server.should_exit = True
    await serving


async def _death(engine: EngineClient) -> None:
    while not engine.errored:  # noqa: ASYNC110  (vLLM has no event for it)
        await asyncio.sleep(POLL_INTERVAL)


async def _build(args: Namespace, spec: HostSpec, engine: EngineClient) -> FastAPI:
    enter_phase("server")
    tasks = await engine.get_supported_tasks()
    app: FastAPI = build_app(args, tasks, engine.model_config)
    app.include_router(control)
    app.state.supported_tasks = tasks
    app.state.asleep = False
    await serve_model(app.state, engine, args, spec)
    await warm_up(engine)
    count_steps(engine, app.state)
    # It lists vLLM's routes at every start, in sixty lines.
    logging.getLogger("vllm.entrypoints.launchers.launcher").setLevel(logging.WARNING)
    return app


def _inspect_models_here() -> None:
    """Inspect a model's class in this process: vLLM starts another one, which imports everything again.

    vLLM does so to keep CUDA uninitialised here. The launcher has already imported the class without
    initialising CUDA; if an import does so anyway, vLLM detects it and spawns the engine core.
    """
    if hasattr(model_registry, "_run_in_subprocess"):
        model_registry._run_in_subprocess = lambda inspect: inspect()


def _fork_engine_core() -> None:
    """Fork the engine core: on the CPU vLLM spawns it, which imports everything again.

    On CUDA, vLLM forks by itself unless the parent has initialised CUDA.
    """
    if hasattr(engine_utils, "get_mp_context"):
        engine_utils.get_mp_context = lambda: multiprocessing.get_context("fork")
