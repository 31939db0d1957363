"""Engines of the transformers backend, without a process of their own."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.fixtures.tiny import Tiny, make_tiny  # isort: skip  (before transformers: it is to stay offline)
from inference_service.hosts.transformers.generation import attention
from inference_service.hosts.transformers.generation.engine import Engine, EngineOptions
from inference_service.hosts.transformers.generation.weights import Placement
from tests.fixtures.checkpoints import base_checkpoint


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return make_tiny(base_checkpoint(), tmp_path_factory.mktemp("tiny"))


def options(**changed: Any) -> EngineOptions:
    """`int8`, and the fields of EngineOptions."""
    place = Placement("cpu", "float32", int8=changed.pop("int8", False))
    own: dict[str, Any] = {"cache_bytes": 4 << 20, "max_model_len": None, "sequences": 16}
    return EngineOptions(place, **(own | changed))


Start = Callable[..., Engine]


@pytest.fixture
def start() -> Iterator[Start]:
    """Engines that end with the test."""
    attention.install()
    begun: list[Engine] = []

    def start(directory: Path, **changed: Any) -> Engine:
        begun.append(Engine(directory, options(**changed)))
        return begun[-1]

    yield start
    for engine in begun:
        engine.close()
