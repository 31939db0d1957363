"""Fixtures that several rooms' tests share."""

import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from xdist.remote import Producer

from tests.fixtures.bucket import Bucket, gcs_server, new_bucket
from tests.fixtures.checkpoints import Checkpoints, checkpoints
from tests.fixtures.distribution import ByEngine, sort_by_unit
from tests.fixtures.fakes import Fakes
from tests.fixtures.once import once
from tests.fixtures.pinned_vllm import PinnedVllm, ask_pinned_vllm
from tests.fixtures.service_process import ServiceProcess, running_service

# Engines of several tests compute at the same time: threads that spin while they wait would hold them up.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
# `make test-fast` has an environment without torch and vLLM.
HAS_TORCH, HAS_VLLM = (importlib.util.find_spec(name) is not None for name in ("torch", "vllm"))
collect_ignore = [] if HAS_TORCH else ["e2e", "hosts/transformers", "hosts/vllm"]


def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> ByEngine | None:
    return ByEngine(config, log) if config.option.dist == "loadscope" else None


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    sort_by_unit(items)


@pytest.fixture(scope="session", name="checkpoints")
def _checkpoints() -> Checkpoints:
    if not HAS_TORCH:
        pytest.skip("PyTorch, which makes the checkpoints, is not installed")
    return checkpoints()


@pytest.fixture(scope="session")
def pinned_vllm(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> PinnedVllm:
    if not HAS_VLLM:
        pytest.skip("vLLM is not installed")
    return PinnedVllm(**once(request, tmp_path_factory, "pinned-vllm", ask_pinned_vllm))


@pytest.fixture(scope="session")
def gcs_url() -> Iterator[str]:
    with gcs_server() as url:
        yield url


@pytest.fixture(scope="session")
def bucket(gcs_url: str, checkpoints: Checkpoints) -> Iterator[Bucket]:
    """A bucket as users have it: two checkpoints, an adapter, one with nothing but pickles."""
    with new_bucket(gcs_url, "fine-tunes") as bucket:
        bucket.upload(checkpoints.base, "models/smollm2-135m-instruct")
        bucket.upload(checkpoints.tuned, "models/acme/smollm2-tuned")
        bucket.put("models/some-adapter/adapter_config.json", b"{}")
        bucket.put("models/some-adapter/adapter_model.safetensors", b"weights")
        bucket.put("models/pickled/config.json", b"{}")
        bucket.put("models/pickled/pytorch_model.bin", b"pickle")
        yield bucket


@pytest.fixture
def words_directory(tmp_path: Path) -> Path:
    """A `file://` bucket for ENGINE=fake: the files are there, nothing reads their insides."""
    for name in ("alpha", "beta", "acme/gamma"):
        model = tmp_path / "bucket" / "models" / name
        model.mkdir(parents=True)
        (model / "config.json").write_text("{}")
        (model / "tokenizer.json").write_text("{}")
        (model / "model.safetensors").write_bytes(name.encode() * 100)
    return tmp_path / "bucket"


@pytest.fixture
def fake_service(tmp_path: Path, words_directory: Path) -> Iterator[ServiceProcess]:
    with running_service(
        tmp_path, GCS_BUCKET=f"file://{words_directory}", ENGINE="fake", FAKE_TOKENS_PER_SECOND="50"
    ) as service:
        yield service


@pytest.fixture
def fakes(tmp_path: Path) -> Fakes:
    return Fakes(tmp_path)
