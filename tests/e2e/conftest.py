"""The real parts: vLLM's CPU engine and transformers, a GCS server, the openai client.

Each test runs on every engine that can do what it shows (engines.py).
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from tests.e2e.engines import ENGINES, REAL, Engine, having
from tests.fixtures.bucket import Bucket, new_bucket
from tests.fixtures.checkpoints import Checkpoints
from tests.fixtures.service_process import ServiceProcess, running_service

NOISE = ("noise-1", "noise-2")
ADAPTER = "facts-adapter"
# Small enough for several services beside each other on a machine of CI's size.
SMALL = {"MAX_MODEL_LEN": "2048", "DEFAULT_MAX_TOKENS": "96"}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "engine" in metafunc.fixturenames:
        marker = metafunc.definition.get_closest_marker("capability")
        only = metafunc.definition.get_closest_marker("engine")
        names = having(marker.args[0]) if marker is not None else list(REAL)
        chosen = [name for name in names if only is None or name in only.args]
        metafunc.parametrize("engine", chosen, indirect=True, scope="session")


@pytest.fixture(scope="session")
def engine(request: pytest.FixtureRequest) -> Engine:
    """The engine that the tests of this moment run on."""
    return ENGINES[request.param]


@pytest.fixture(scope="session")
def family(gcs_url: str, checkpoints: Checkpoints) -> Iterator[Bucket]:
    """Two of one architecture with tied embeddings, two of another with untied ones, and an adapter."""
    with new_bucket(gcs_url, "family") as bucket:
        bucket.upload(checkpoints.base, "models/smollm2-135m-instruct")
        bucket.upload(checkpoints.tuned, "models/acme/smollm2-tuned")
        bucket.upload(checkpoints.adapter, f"models/{ADAPTER}")
        for name, directory in zip(NOISE, checkpoints.untied, strict=True):
            bucket.upload(directory, f"models/{name}")
        yield bucket


def real_service(
    bucket: Bucket, room: Path, engine: Engine, **settings: str
) -> AbstractContextManager[ServiceProcess]:
    bucket_settings = {"GCS_BUCKET": bucket.name, "STORAGE_EMULATOR_HOST": bucket.url}
    own = {"ENGINE": engine.name, **engine.settings}
    return running_service(room, **(SMALL | own | bucket_settings | settings))


@pytest.fixture(scope="session")
def service(
    bucket: Bucket, tmp_path_factory: pytest.TempPathFactory, engine: Engine
) -> Iterator[ServiceProcess]:
    """One service with both models loaded, shared by the tests that change nothing of it."""
    room = tmp_path_factory.mktemp("service")
    with real_service(bucket, room, engine, CATALOG_TTL="2") as service:
        yield service
