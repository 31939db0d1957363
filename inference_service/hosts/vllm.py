"""vLLM's own OpenAI server over one AsyncLLM, on the socket that the service handed down.

Everything inside a request's body (templates, tools, structured outputs, log probabilities) is vLLM's.
This module adds the control routes and the defaults, and makes the engine core a fork of the host.
"""

import asyncio
import dataclasses
import logging
import multiprocessing
import signal
import socket
from argparse import Namespace
from typing import Any

import uvicorn
import uvloop
import vllm.v1.engine.utils as engine_utils
from fastapi import APIRouter, FastAPI, HTTPException, Request
from vllm import envs
from vllm.engine.protocol import EngineClient
from vllm.entrypoints.launchers.api_server.app_state import init_app_state
from vllm.entrypoints.launchers.api_server.entry import build_async_engine_client
from vllm.entrypoints.launchers.app import build_app
from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
from vllm.entrypoints.launchers.launcher import NoSignalServer
from vllm.entrypoints.openai.completion.protocol import CompletionRequest
from vllm.platforms import current_platform
from vllm.utils.argparse_utils import FlexibleArgumentParser
from vllm.utils.system_utils import decorate_logs

from inference_service.engines.base import HostSpec

# Less than the service waits before it kills the group.
ENGINE_SHUTDOWN_SECONDS = 3.0
# vLLM's own watchdog looks every five seconds: too late for those who wait for the engine.
LOOK_SECONDS = 0.2

control = APIRouter(prefix="/control")


def run(spec: HostSpec, listener: socket.socket) -> None:
    """Serve until SIGTERM. Raises whatever vLLM raises when the engine cannot be built."""
    decorate_logs("Host")
    args = make_arg_parser(FlexibleArgumentParser()).parse_args(list(spec.arguments))
    validate_parsed_serve_args(args)
    if current_platform.is_cpu():
        _fork_engine_core()
    uvloop.run(_serve(args, spec, listener))


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
        app.state.server = server  # vLLM's error handlers end it when the engine is dead
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
        # Otherwise it takes the engine core's orderly end for its death and logs an error.
        engine.output_handler.cancel()
        await asyncio.to_thread(engine.shutdown, timeout=ENGINE_SHUTDOWN_SECONDS)
    server.should_exit = True
    await serving


async def _death(engine: EngineClient) -> None:
    while not engine.errored:  # noqa: ASYNC110  (vLLM has no event for it)
        await asyncio.sleep(LOOK_SECONDS)


async def _build(args: Namespace, spec: HostSpec, engine: EngineClient) -> FastAPI:
    tasks = await engine.get_supported_tasks()
    app: FastAPI = build_app(args, tasks, engine.model_config)
    app.include_router(control)
    await init_app_state(engine, app.state, args, tasks)
    _apply_default_max_tokens(app.state, spec.default_max_tokens)
    _count_steps(engine, app.state)
    # Sixty lines that list vLLM's routes at every start.
    logging.getLogger("vllm.entrypoints.launchers.launcher").setLevel(logging.WARNING)
    return app


def _apply_default_max_tokens(state: Any, default_max_tokens: int) -> None:
    """Where a request names no limit: a default that gives way to a long prompt.

    vLLM takes the smaller of this and what the context has left, so a silent request never fails for
    a limit that its client did not set.
    """
    for serving in (
        state.openai_serving_chat,
        state.openai_serving_completion,
        state.openai_serving_responses,
    ):
        if serving is not None:
            serving.default_sampling_params["max_tokens"] = default_max_tokens
    # A silent completion: vLLM fills in this field's default (OpenAI's old 16 tokens) before it looks.
    CompletionRequest.model_fields["max_tokens"].default = default_max_tokens
    reserving = CompletionRequest.build_tok_params

    def build_tok_params(request: Any, model_config: Any) -> Any:
        params = reserving(request, model_config)
        if request.max_tokens != default_max_tokens:
            return params
        return dataclasses.replace(params, max_output_tokens=0)

    CompletionRequest.build_tok_params = build_tok_params


def _fork_engine_core() -> None:
    """Fork the engine core: on the CPU vLLM spawns it, which imports everything a second time.

    On CUDA forking is vLLM's own choice as long as the parent has not touched CUDA.
    """
    if hasattr(engine_utils, "get_mp_context"):
        engine_utils.get_mp_context = lambda: multiprocessing.get_context("fork")


def _count_steps(engine: Any, state: Any) -> None:
    """Count what the engine core sends, once a step, also while a long prompt yields no token yet."""
    state.steps = 0
    processor = engine.output_processor
    updating = processor.update_scheduler_stats

    def update_scheduler_stats(stats: Any) -> None:
        state.steps += 1
        updating(stats)

    processor.update_scheduler_stats = update_scheduler_stats


@control.get("/pulse")
async def pulse(request: Request) -> dict[str, int]:
    """Requests that are neither finished nor aborted, and the steps of the engine core so far."""
    state = request.app.state
    if state.engine_client.errored:
        raise HTTPException(503, "the engine core is dead")
    return {
        "running": state.engine_client.output_processor.get_num_unfinished_requests(),
        "steps": state.steps,
    }
