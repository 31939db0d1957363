"""A model as a request means it: described by the bucket, and placed on an engine."""

from dataclasses import dataclass, replace
from datetime import datetime
from functools import cached_property
from typing import Generic, Self, TypeVar

from inference_service.checkpoints.reference import Reference
from inference_service.checkpoints.serving_config import Serving
from inference_service.errors import ModelNotServable
from inference_service.storage.bucket.model import DescribedModel, ModelKind
from inference_service.storage.bucket.store import StoredObject


@dataclass(frozen=True)
class _Found:
    """What the bucket says of one revision of the model."""

    described: DescribedModel

    @property
    def name(self) -> str:
        return self.described.name

    @property
    def kind(self) -> ModelKind:
        return self.described.kind

    @property
    def revision(self) -> str:
        return self.described.revision

    @property
    def objects(self) -> tuple[StoredObject, ...]:
        """The files that serving needs."""
        return self.described.objects

    @property
    def bytes(self) -> int:
        return self.described.bytes

    @property
    def created(self) -> datetime:
        return self.described.created

    @property
    def serving(self) -> Serving:
        return self.described.serving

    @cached_property
    def reference(self) -> str:
        """Identifies an engine, or an adapter on one."""
        return str(Reference(self.name, self.revision))


@dataclass(frozen=True)
class Unservable(_Found):
    """A model that cannot be served as it is in the bucket."""

    @property
    def reason(self) -> str:
        return self.described.unservable or "it cannot be served."


@dataclass(frozen=True)
class Checkpoint(_Found):
    """A checkpoint and its engine. `adapter_rank`: the highest of the adapters that this takes; 0: none."""

    adapter_rank: int = 0

    @cached_property
    def reference(self) -> str:
        return str(Reference(self.name, self.revision, self.adapter_rank))

    @property
    def engine_model(self) -> "Checkpoint":
        """The model whose engine serves it: its own."""
        return self

    def with_rank(self, adapter_rank: int) -> Self:
        """The same with an engine that takes adapters of that rank."""
        return replace(self, adapter_rank=adapter_rank)


@dataclass(frozen=True)
class Adapter(_Found):
    """A LoRA adapter and the checkpoint whose engine it is served on."""

    base: Checkpoint | Unservable

    @property
    def rank(self) -> int:
        return self.described.rank

    @property
    def engine_model(self) -> Checkpoint:
        """The model whose engine serves it: its base. Raises ModelNotServable."""
        if isinstance(self.base, Unservable):
            of_base = ModelNotServable(self.base.name, self.base.reason)
            raise ModelNotServable(self.name, f"of its base: {of_base.message}")
        return self.base

    def on(self, base: Checkpoint | Unservable) -> Self:
        """The same on another engine."""
        return replace(self, base=base)


# What an engine can be asked for, and what the bucket may hold under a name.
Model = Checkpoint | Adapter
AnyModel = Checkpoint | Adapter | Unservable

_M_co = TypeVar("_M_co", bound=AnyModel, covariant=True)


@dataclass(frozen=True)
class Requested(Generic[_M_co]):
    """What a client or the operator has asked for; `exact`: this revision and no other."""

    model: _M_co
    exact: bool = False

    @property
    def name(self) -> str:
        """The name that finds it again."""
        name, revision = self.model.name, self.model.revision
        return str(Reference(name, revision)) if self.exact else name
