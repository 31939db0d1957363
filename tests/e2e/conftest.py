"""The real parts: vLLM's CPU engine and transformers, a GCS server, the openai client.

Each test runs on every engine that can do what it shows (engines.py).
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from tests.e2e.engines import ENGINES, REAL, Engine, having
from tests.fixtures.bucket import Bucket
from tests.fixtures.service_process import ServiceProcess, running_service

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


def real_service(
    bucket: Bucket, room: Path, engine: Engine, **settings: str
) -> AbstractContextManager[ServiceProcess]:
    bucket_settings = {"GCS_BUCKET": bucket.name, "STORAGE_EMULATOR_HOST": bucket.url}
    # Other engines may compute at the same time: threads that spin while they wait would keep them from it.
    own = {"ENGINE": engine.name, "OMP_WAIT_POLICY": "passive", **engine.settings}
    return running_service(room, **(SMALL | own | bucket_settings | settings))


@pytest.fixture(scope="session")
def service(
    bucket: Bucket, tmp_path_factory: pytest.TempPathFactory, engine: Engine
) -> Iterator[ServiceProcess]:
    """One service with both models loaded, shared by the tests that change nothing of it."""
    with real_service(bucket, tmp_path_factory.mktemp("service"), engine) as service:
        yield service
