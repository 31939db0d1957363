"""OpenAI's routes."""

from typing import Annotated

from fastapi import APIRouter, Depends, Request, Response

from inference_service.api.body import chat_body, completion_body
from inference_service.api.relay import Relay
from inference_service.api.schemas.requests import ChatBody, CompletionBody
from inference_service.api.schemas.responses import ModelCard, ModelList
from inference_service.api.service import Service, ServiceDep
from inference_service.errors import ModelNotServable
from inference_service.storage.bucket.model import DescribedModel, ListedModel

router = APIRouter(prefix="/v1")


@router.post("/chat/completions")
async def chat_completions(
    body: Annotated[ChatBody, Depends(chat_body)], service: ServiceDep, request: Request
) -> Response:
    """A chat completion, streamed as server-sent events if `stream` is true."""
    return Relay(service, body, request)


@router.post("/completions")
async def completions(
    body: Annotated[CompletionBody, Depends(completion_body)],
    service: ServiceDep,
    request: Request,
) -> Response:
    """A text completion, streamed as server-sent events if `stream` is true."""
    return Relay(service, body, request)


@router.get("/models")
async def list_models(service: ServiceDep) -> ModelList:
    """Every model in the bucket that can be served, loaded or not, in its newest revision or an older one."""
    models = await service.catalog.models()
    return ModelList(data=[_card(service, model) for model in models if _is_served(service, model)])


@router.get("/models/{name:path}")
async def retrieve_model(name: str, service: ServiceDep) -> ModelCard:
    """One model; its name may contain slashes."""
    model = (await service.find(name)).model.described
    if model.unservable is not None and not _is_served(service, model):
        raise ModelNotServable(model.name, model.unservable)
    return _card(service, model)


def _is_served(service: Service, model: ListedModel) -> bool:
    return model.unservable is None or service.rollout.serving_revision(model) != model.revision


def _card(service: Service, model: ListedModel) -> ModelCard:
    described = model if isinstance(model, DescribedModel) else None
    return ModelCard(
        id=model.name,
        created=int(model.created.timestamp()),
        kind=model.kind,
        parent=None if described is None else service.catalog.parent(described),
        revision=model.revision,
        serving_revision=service.rollout.serving_revision(model),
        size=model.bytes,
        aliases=() if described is None else described.serving.aliases,
    )
