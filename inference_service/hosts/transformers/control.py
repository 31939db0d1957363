"""The control routes of a transformers host: heartbeat, weight check, swaps, adapters.

The same routes as in hosts/vllm/control.py. After a failed swap the engine must not serve any more.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

from fastapi import APIRouter, HTTPException, Request
from starlette.responses import JSONResponse

from inference_service.engines.base import HostSpec
from inference_service.engines.process_title import retitle
from inference_service.hosts.control_replies import reply
from inference_service.hosts.transformers.openai.serving import Served
from inference_service.hosts.transformers.options import parse_options, serve

control = APIRouter(prefix="/control")


@control.get("/heartbeat")
async def heartbeat(request: Request) -> dict[str, int]:
    """Requests that are neither finished nor cancelled, and the steps of the model so far."""
    runner = _served(request).engine.runner
    if not runner.is_alive():
        raise HTTPException(503, "the engine's thread is dead")
    return {"running": runner.running, "steps": runner.steps}


@control.get("/weight-check")
async def weight_check(request: Request) -> JSONResponse:
    """The highest logits of a fixed prompt, as the weights compute them now."""

    async def check() -> dict[str, Any]:
        return {"fingerprint": await _served(request).engine.weight_check()}

    return await reply(check)


@control.post("/swap")
async def swap(request: Request) -> JSONResponse:
    """Serve the snapshot of the HostSpec in the body; its weights must have the same shapes."""
    spec = HostSpec.from_json(await request.json())
    if request.app.state.in_place_of_another and spec.fallback is not None:
        spec = replace(spec, arguments=spec.fallback)

    async def change() -> dict[str, Any]:
        engine, options = _served(request).engine, parse_options(spec)
        seconds = await engine.swap(Path(spec.directory), options.engine)
        request.app.state.served = serve(engine, spec, options)
        retitle(spec.model)
        return {"fingerprint": await engine.weight_check(), "seconds": seconds}

    return await reply(change)


@control.post("/adapters")
async def add_adapter(request: Request) -> JSONResponse:
    """Load an adapter: `name` (including its revision), `id` (never used before) and `directory`."""
    command = await request.json()

    async def add() -> dict[str, Any]:
        engine = _served(request).engine
        await engine.add_adapter(command["name"], command["id"], Path(command["directory"]))
        return {}

    return await reply(add)


@control.delete("/adapters/{name}")
async def remove_adapter(request: Request, name: str) -> JSONResponse:
    """Unload an adapter that no request uses."""

    async def remove() -> dict[str, Any]:
        await _served(request).engine.remove_adapter(name)
        return {}

    return await reply(remove)


def _served(request: Request) -> Served:
    served: Served = request.app.state.served
    return served
