"""Stores: a local directory, and a bucket in a real GCS server."""

import os
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from inference_service.errors import BucketNotFound, ObjectReplaced, StoreError
from inference_service.storage.bucket.directory import DirectoryStore
from inference_service.storage.bucket.gcs import GcsStore
from inference_service.storage.bucket.model import models_in
from inference_service.storage.registry import open_store
from tests.fixtures.bucket import Bucket, new_bucket
from tests.fixtures.caches import open_snapshots
from tests.fixtures.ports import free_port


@pytest.fixture
def small_bucket(gcs_url: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bucket]:
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", gcs_url)
    with new_bucket(gcs_url, f"bucket-{uuid.uuid4().hex}") as bucket:
        yield bucket


def test_a_bucket_is_listed_with_generations_and_checksums(small_bucket: Bucket) -> None:
    small_bucket.put("models/m/config.json", b"{}")
    small_bucket.put("other/x", b"x")
    (found,) = GcsStore(small_bucket.name).list("models/")
    assert (found.name, found.size) == ("models/m/config.json", 2)
    assert found.crc32c == 0x297BD0AA
    first = found.generation
    small_bucket.put("models/m/config.json", b"[]")
    (found,) = GcsStore(small_bucket.name).list("models/")
    assert found.generation != first


def test_reading_is_pinned_to_the_listed_generation(small_bucket: Bucket) -> None:
    store = GcsStore(small_bucket.name)
    small_bucket.put("models/m/config.json", b"old")
    (old,) = store.list("models/")
    assert b"".join(store.read(old)) == b"old"
    small_bucket.put("models/m/config.json", b"new")
    with pytest.raises(StoreError, match=r"models/m/config.json was replaced"):
        b"".join(store.read(old))


async def test_a_snapshot_out_of_a_bucket(small_bucket: Bucket, tmp_path: Path) -> None:
    weights = bytes(range(256)) * 40_000
    small_bucket.put("models/m/config.json", b"{}")
    small_bucket.put("models/m/model.safetensors", weights)
    small_bucket.put("models/m/empty.json", b"")
    store = GcsStore(small_bucket.name)
    model = models_in(store.list("models/"), "models/")["m"]
    snapshot = await open_snapshots(store, tmp_path).snapshot(model)
    assert (snapshot.path / "model.safetensors").read_bytes() == weights
    assert (snapshot.path / "empty.json").read_bytes() == b""


def test_a_bucket_that_does_not_exist(small_bucket: Bucket) -> None:
    with pytest.raises(BucketNotFound, match="gs://nobody-has-this"):
        GcsStore("nobody-has-this").list("models/")


def test_a_store_that_cannot_be_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", f"http://127.0.0.1:{free_port()}")
    monkeypatch.setattr("inference_service.storage.bucket.gcs.LIST_RETRY_SECONDS", 0.5)
    with pytest.raises(StoreError) as caught:
        GcsStore("bucket").list("models/")
    assert caught.value.status == 503
    assert caught.value.retry_after


def test_a_directory(tmp_path: Path) -> None:
    (tmp_path / "models" / "m").mkdir(parents=True)
    (tmp_path / "models" / "m" / "config.json").write_text("{}")
    (tmp_path / "models" / "m" / "dangling").symlink_to("nowhere")
    (tmp_path / "models" / "m" / "itself").symlink_to("itself")
    (tmp_path / "models" / "m" / "not-a-directory").symlink_to("config.json/x")
    (tmp_path / "models" / "loop").symlink_to(".")
    os.mkfifo(tmp_path / "models" / "m" / "tokenizer.json")
    store = open_store(f"file://{tmp_path}")
    (found,) = store.list("models/")
    assert found.name == "models/m/config.json"
    assert b"".join(store.read(found)) == b"{}"


def test_a_link_to_a_models_directory_is_followed(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "config.json").write_text("{}")
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "m").symlink_to(tmp_path / "elsewhere")
    (found,) = DirectoryStore(tmp_path).list("models/")
    assert found.name == "models/m/config.json"


def test_a_directory_that_does_not_exist(tmp_path: Path) -> None:
    with pytest.raises(BucketNotFound, match="GCS_BUCKET"):
        DirectoryStore(tmp_path / "no").list("models/")


def test_links_that_lead_in_circles(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / "models" / name).mkdir(parents=True)
        (tmp_path / "models" / name / "config.json").write_text("{}")
    for name, other in (("a", "b"), ("b", "a")):
        for number in (1, 2):
            (tmp_path / "models" / name / f"to{number}").symlink_to(tmp_path / "models" / other)
    names = [found.name for found in DirectoryStore(tmp_path).list("models/")]
    assert {"models/a/config.json", "models/b/config.json"} <= set(names)
    assert len(names) < 20


def test_a_pipe_in_the_place_of_a_file_is_not_waited_for(tmp_path: Path) -> None:
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "config.json").write_text("{}")
    (found,) = DirectoryStore(tmp_path).list("models/")
    (tmp_path / "models" / "config.json").unlink()
    os.mkfifo(tmp_path / "models" / "config.json")
    with pytest.raises(ObjectReplaced):
        b"".join(DirectoryStore(tmp_path).read(found))
