"""The real parts: vLLM's CPU engine, a GCS server, the openai client."""

from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from tests.fixtures.bucket import Bucket
from tests.fixtures.service_process import ServiceProcess, running_service

# Small enough for several services beside each other on a machine of CI's size.
REAL = {"MAX_MODEL_LEN": "2048", "ENGINE": "vllm", "DEFAULT_MAX_TOKENS": "96"}


def real_service(bucket: Bucket, room: Path, **settings: str) -> AbstractContextManager[ServiceProcess]:
    bucket_settings = {"GCS_BUCKET": bucket.name, "STORAGE_EMULATOR_HOST": bucket.url}
    return running_service(room, **(REAL | bucket_settings | settings))


@pytest.fixture(scope="session")
def service(bucket: Bucket, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServiceProcess]:
    """One service with both models loaded, shared by the tests that change nothing of it."""
    with real_service(bucket, tmp_path_factory.mktemp("service")) as service:
        yield service
