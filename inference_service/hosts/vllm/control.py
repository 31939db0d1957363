"""The control routes of a vLLM host: heartbeat, weight check, swaps, adapters.

The service sends no request while the weights change, so nothing here guards against one. A failed swap
leaves the engine unusable; the service ends it.
"""

import asyncio
import dataclasses
import math
import time
import uuid
from argparse import Namespace
from contextlib import suppress
from pathlib import Path
from typing import Any

from fastapi import APIRouter, HTTPException, Request
from starlette.responses import JSONResponse
from vllm.engine.protocol import EngineClient
from vllm.entrypoints.launchers.api_server.app_state import init_app_state
from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
from vllm.entrypoints.openai.completion.protocol import CompletionRequest
from vllm.lora.request import LoRARequest
from vllm.renderers import renderer_from_config
from vllm.sampling_params import SamplingParams
from vllm.tokenizers import registry as tokenizers
from vllm.utils.argparse_utils import FlexibleArgumentParser
from vllm.v1.engine.input_processor import InputProcessor
from vllm.v1.metrics.loggers import StatLoggerManager

from inference_service.checkpoints.reference import model_of
from inference_service.engines.base import HostSpec
from inference_service.engines.process_title import retitle
from inference_service.hosts.control_replies import reply
from inference_service.hosts.tokenizer_files import tokenize_alike

# The engine core is asked between two of its steps.
PREPARE_POLL_INTERVAL = 0.05
WEIGHT_CHECK_TOKENS = 12
WEIGHT_CHECK_TOP = 20

control = APIRouter(prefix="/control")
_reserved_tokens = CompletionRequest.build_tok_params


def parse_arguments(spec: HostSpec) -> Namespace:
    """The command line, parsed and validated by vLLM itself."""
    args: Namespace = make_arg_parser(FlexibleArgumentParser()).parse_args(list(spec.arguments))
    validate_parsed_serve_args(args)
    return args


async def serve_model(state: Any, engine: EngineClient, args: Namespace, spec: HostSpec) -> None:
    """(Re)build the OpenAI server for the engine's current model, under its name and with its defaults."""
    await init_app_state(engine, state, args, state.supported_tasks)
    _apply_default_max_tokens(state, spec.default_max_tokens)
    models = state.openai_serving_models
    # vLLM identifies adapters by name, here with the revision; clients know the name without it.
    own_name = models.model_name
    models.model_name = lambda lora_request=None: model_of(own_name(lora_request))


def _apply_default_max_tokens(state: Any, default_max_tokens: int) -> None:
    """Apply a default to requests without a limit, capped at what the prompt leaves of the context.

    vLLM does the capping, so that a request never fails because of a limit that its client did not set.
    """
    for serving in (
        state.openai_serving_chat,
        state.openai_serving_completion,
        state.openai_serving_responses,
    ):
        if serving is not None:
            serving.default_sampling_params["max_tokens"] = default_max_tokens
    # A completion without a limit: vLLM first fills in this field's default (OpenAI's old 16 tokens).
    CompletionRequest.model_fields["max_tokens"].default = default_max_tokens

    def build_tok_params(request: Any, model_config: Any) -> Any:
        params = _reserved_tokens(request, model_config)
        if request.max_tokens != default_max_tokens:
            return params
        return dataclasses.replace(params, max_output_tokens=0)

    CompletionRequest.build_tok_params = build_tok_params


def count_steps(engine: Any, state: Any) -> None:
    """Count the engine core's messages: one per step, also while a long prompt yields no token yet."""
    state.steps = 0
    processor = engine.output_processor
    updating = processor.update_scheduler_stats

    def update_scheduler_stats(stats: Any) -> None:
        state.steps += 1
        updating(stats)

    processor.update_scheduler_stats = update_scheduler_stats


@control.get("/heartbeat")
async def heartbeat(request: Request) -> dict[str, int]:
    """Requests that are neither finished nor aborted, and the steps of the engine core so far."""
    state = request.app.state
    if state.engine_client.errored:
        raise HTTPException(503, "the engine core is dead")
    return {
        "running": state.engine_client.output_processor.get_num_unfinished_requests(),
        "steps": state.steps,
    }


@control.get("/weight-check")
async def weight_check(request: Request) -> JSONResponse:
    """The highest logits of a fixed prompt, as the weights compute them now."""
    return await reply(lambda: _weight_check(request.app.state.engine_client))


@control.post("/swap")
async def swap(request: Request) -> JSONResponse:
    """Serve the snapshot of the HostSpec in the body; its weights must have the same shapes."""
    spec = HostSpec.from_json(await request.json())
    return await reply(lambda: _swap(request.app.state, spec))


@control.post("/sleep")
async def sleep(request: Request) -> JSONResponse:
    """Drop weights, KV cache and adapters from the device; a swap wakes the engine."""
    if not request.app.state.engine_client.model_config.enable_sleep_mode:
        raise HTTPException(404, "the engine was started without sleep mode, which vLLM has on GPUs only")
    return await reply(lambda: _sleep(request.app.state))


@control.post("/prepare")
async def prepare(request: Request) -> JSONResponse:
    """Make the weights in `directory` ready for a swap, beside the requests that run."""
    directory = (await request.json())["directory"]
    return await reply(lambda: _prepare(request.app.state.engine_client, directory))


@control.post("/forget")
async def forget(request: Request) -> JSONResponse:
    """Give up what `prepare` holds of `directory`."""
    directory = (await request.json())["directory"]

    async def give_up() -> dict[str, Any]:
        await request.app.state.engine_client.collective_rpc("forget_weights", args=(directory,))
        return {}

    return await reply(give_up)


@control.get("/weight-digests")
async def weight_digests(request: Request) -> JSONResponse:
    """By worker, a digest of each parameter; for tests and benchmarks, since it reads all weights."""

    async def read() -> dict[str, Any]:
        found = await request.app.state.engine_client.collective_rpc("weight_digests")
        return {"digests": found}

    return await reply(read)


@control.post("/adapters")
async def add_adapter(request: Request) -> JSONResponse:
    """Load an adapter: `name` (including its revision), `id` (never used before) and `directory`."""
    command, state = await request.json(), request.app.state

    async def add() -> dict[str, Any]:
        adapter = LoRARequest(command["name"], command["id"], command["directory"])
        await state.engine_client.add_lora(adapter)
        state.openai_serving_models.lora_requests[command["name"]] = adapter
        return {}

    return await reply(add)


@control.delete("/adapters/{name}")
async def remove_adapter(request: Request, name: str) -> JSONResponse:
    """Unload an adapter that no request uses."""
    state = request.app.state

    async def remove() -> dict[str, Any]:
        adapter = state.openai_serving_models.lora_requests.pop(name, None)
        if adapter is not None:
            await state.engine_client.remove_lora(adapter.lora_int_id)
        return {}

    return await reply(remove)


async def _prepare(engine: Any, directory: str) -> dict[str, Any]:
    """Returns when every worker is done with it: all is ready, some was refused, or a swap has begun."""
    await engine.collective_rpc("prepare_weights", args=(directory,))
    while True:
        found = await engine.collective_rpc("weights_prepared", args=(directory,))
        if all(each.get("done", True) for each in found):
            least = min(found, key=lambda each: each.get("ready_bytes", 0))
            return {
                "ready_bytes": least.get("ready_bytes", 0),
                "total_bytes": least.get("total_bytes", 0),
                "refused": least.get("refused"),
            }
        await asyncio.sleep(PREPARE_POLL_INTERVAL)


async def _swap(state: Any, spec: HostSpec) -> dict[str, Any]:
    engine, args = state.engine_client, parse_arguments(spec)
    before = Path(engine.model_config.model)
    started = time.monotonic()
    if state.asleep:
        await engine.wake_up()
    await engine.pause_generation(mode="wait")  # clears the prefix cache of the old weights
    await _remove_adapters(state)
    held = None if state.asleep else str(before)
    swapped = await engine.collective_rpc("swap_weights", args=(spec.model, held, spec.directory))
    state.asleep = False
    await engine.resume_generation()
    weights = time.monotonic()
    retitle(spec.model)
    _take_over(engine, args, rendered_alike=tokenize_alike(before, Path(spec.directory)))
    # The engine core computes the weight check while the server is rebuilt.
    weight_check, _ = await asyncio.gather(_weight_check(engine), serve_model(state, engine, args, spec))
    seconds = {"weights": weights - started, "warm-up": time.monotonic() - weights}
    return {**weight_check, "seconds": seconds, **swapped[0]}


async def _sleep(state: Any) -> dict[str, Any]:
    engine = state.engine_client
    await engine.pause_generation(mode="wait")
    await _remove_adapters(state)
    # Level 2: the weights come back from their files, as those of any swap.
    await engine.sleep(level=2)
    state.asleep = True
    freed = await engine.collective_rpc("freed_by_sleep")
    return {"freed_bytes": min(freed)}


async def _remove_adapters(state: Any) -> None:
    for adapter in list(state.openai_serving_models.lora_requests.values()):
        await state.engine_client.remove_lora(adapter.lora_int_id)


def _take_over(engine: Any, args: Namespace, *, rendered_alike: bool) -> None:
    """Switch the front end to the new model: tokenizer, template, generation config, metric labels."""
    config = engine.vllm_config.model_config
    config.model = config.tokenizer = args.model
    config.hf_config_path = None
    config.served_model_name = args.served_model_name[0]
    config.override_generation_config = args.override_generation_config
    if not rendered_alike:
        _render_anew(engine)
    engine.input_processor = InputProcessor(engine.vllm_config, engine.renderer)
    if engine.logger_manager is not None:
        engine.logger_manager = StatLoggerManager(
            engine.vllm_config, engine_idxs=engine.engine_core.engine_ranks_managed
        )
        engine._logger_ref[0] = engine.logger_manager


def _render_anew(engine: Any) -> None:
    # Cached by path, which changes with each swap.
    for cached in (tokenizers.cached_get_tokenizer, tokenizers.cached_resolve_tokenizer_args):
        cached.cache_clear()
    old, engine.renderer = engine.renderer, renderer_from_config(engine.vllm_config)
    engine.output_processor.tokenizer = engine.renderer.tokenizer
    old.shutdown()


async def warm_up(engine: Any) -> None:
    """Run the weight check once: its kernels, including those of log probabilities, compile on first use.

    Errors, such as damaged weights, are reported when the service asks for the weight check.
    """
    with suppress(ValueError):
        await _weight_check(engine)


async def _weight_check(engine: Any) -> dict[str, Any]:
    """Token ids with their log probabilities, highest first; raises ValueError if one is not finite."""
    config = engine.vllm_config.model_config
    vocabulary, count = config.get_vocab_size(), min(WEIGHT_CHECK_TOKENS, config.max_model_len - 1)
    prompt = {"prompt_token_ids": [(7919 * (number + 1)) % vocabulary for number in range(count)]}
    params = SamplingParams(
        max_tokens=1, temperature=0, logprobs=min(WEIGHT_CHECK_TOP, vocabulary), detokenize=False
    )
    last = None
    async for output in engine.generate(prompt, params, f"weight-check-{uuid.uuid4().hex}"):
        last = output
    if last is None or not last.outputs[0].logprobs:
        raise ValueError("the weight check returned no token")
    found = last.outputs[0].logprobs[0].items()
    top = sorted(((token, each.logprob) for token, each in found), key=lambda pair: (-pair[1], pair[0]))
    if not all(math.isfinite(logprob) for _, logprob in top):
        raise ValueError("the weight check returned logits that are not finite: the weights are damaged")
    return {"fingerprint": top}
