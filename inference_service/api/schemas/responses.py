"""Response bodies that the service itself writes; an engine's answers are relayed as they come."""

from typing import Literal

from pydantic import BaseModel


class ModelCard(BaseModel):
    """One entry of GET /v1/models; `created` in seconds since 1970.

    Beyond OpenAI's fields: `parent` is an adapter's base, `size` in bytes of the files that are served,
    `revision` what `model@revision` names, `serving_revision` the one that answers for the plain name.
    """

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "inference-service"
    kind: str
    parent: str | None
    revision: str
    serving_revision: str
    size: int
    aliases: tuple[str, ...]


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[ModelCard]


class Health(BaseModel):
    """What the service runs on. `dtype`: the weights' of a checkpoint that is stored in bfloat16,
    as most are, unless its serving.json says otherwise.

    `notes`: of loaded models, what their operator should know of how they are run.
    """

    status: Literal["ok"] = "ok"
    device: str
    device_name: str
    device_count: int
    dtype: str
    backend: str
    version: str
    notes: dict[str, list[str]] = {}


class Unloaded(BaseModel):
    model: str
    unloaded: bool


class Placement(BaseModel):
    """Where a model stands in the pool: its engine's state, whether it is pinned."""

    model: str
    revision: str
    state: str
    pinned: bool
