"""A bucket of 3,000 models, listed in small pages from a real GCS server."""

import asyncio
from collections.abc import Iterator

import pytest

from inference_service.storage.bucket.catalog import Catalog
from inference_service.storage.bucket.gcs import GcsStore
from inference_service.storage.bucket.store import StoredObject
from tests.fixtures.bucket import gcs_server

MODELS = 3_000
FILES = {
    "config.json": b"{}",
    "tokenizer.json": b"{}",
    "model.safetensors": b"weights",
}
PAGE = 100
BUCKET = "large"


@pytest.fixture(scope="module")
def large_bucket(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, str]]:
    """URL and name of a bucket with MODELS checkpoints; a server of its own keeps others quick."""
    seed = tmp_path_factory.mktemp("seed")
    for number in range(MODELS):
        directory = seed / BUCKET / "models" / f"team-{number % 30}" / f"model-{number:05}"
        directory.mkdir(parents=True)
        for name, content in FILES.items():
            (directory / name).write_bytes(content)
    with gcs_server(seed) as url:
        yield url, BUCKET


async def test_every_model_is_listed_and_once_however_many_ask(
    large_bucket: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    url, name = large_bucket
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", url)
    store = CountingStore(name, page_size=PAGE)
    catalog = Catalog(store, "models/")
    finding = asyncio.create_task(catalog.find("team-7/model-00007"))
    answers = await asyncio.gather(*(catalog.models() for _ in range(20)))
    assert {len(models) for models in answers} == {MODELS}
    assert len({model.name for model in await catalog.models()}) == MODELS
    assert (await finding).name == "team-7-model-00007"
    assert store.listings == 1


async def test_a_listing_holds_nobody_up(
    large_bucket: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """While thousands of models are listed, the event loop goes on turning."""
    url, name = large_bucket
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", url)
    listing = asyncio.create_task(Catalog(GcsStore(name, page_size=PAGE), "models/").models())
    turns = 0
    while not listing.done():
        await asyncio.sleep(0.005)
        turns += 1
    assert len(await listing) == MODELS
    assert turns > 10


class CountingStore(GcsStore):
    listings = 0

    def list(self, prefix: str) -> list[StoredObject]:
        self.listings += 1
        return super().list(prefix)
