"""A bucket that is slow, full of surprises or away, as a client of the service meets it."""

import os
import threading
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from tests.fixtures.bucket import Bucket, new_bucket
from tests.fixtures.fault_proxy import Fault, FaultProxy, Kind, fault_proxy
from tests.fixtures.ports import free_port
from tests.fixtures.service_process import ServiceProcess, running_service

MIB = 1 << 20
CHAT = {"model": "m", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 3}


@pytest.fixture
def bucket(gcs_url: str) -> Iterator[Bucket]:
    with new_bucket(gcs_url, f"service-{uuid.uuid4().hex}") as bucket:
        put(bucket, "m")
        yield bucket


@pytest.fixture
def proxy(gcs_url: str) -> Iterator[FaultProxy]:
    with fault_proxy(gcs_url) as proxy:
        yield proxy


def put(bucket: Bucket, name: str, size: int = 8 * MIB) -> None:
    bucket.put(f"models/{name}/config.json", b"{}")
    bucket.put(f"models/{name}/tokenizer.json", b"{}")
    bucket.put(f"models/{name}/model.safetensors", os.urandom(size))


def service_over(
    bucket: Bucket, room: Path, url: str | None = None, **settings: str
) -> AbstractContextManager[ServiceProcess]:
    chosen = {"GCS_BUCKET": bucket.name, "STORAGE_EMULATOR_HOST": url or bucket.url, "ENGINE": "fake"}
    return running_service(room, **(chosen | settings))


def test_the_listing_knows_kind_size_revision_and_aliases(bucket: Bucket, tmp_path: Path) -> None:
    bucket.put("models/m/serving.json", b'{"aliases": ["gpt-4o"]}')
    with service_over(bucket, tmp_path) as service:
        card = service.http.get("/v1/models/gpt-4o").raise_for_status().json()
        assert (card["id"], card["kind"], card["parent"], card["aliases"]) == (
            "m",
            "checkpoint",
            None,
            ["gpt-4o"],
        )
        assert card["size"] == 8 * MIB + 4
        answer = service.http.post("/v1/chat/completions", json=CHAT | {"model": "gpt-4o"})
        assert answer.raise_for_status().json()["model"] == "m"
        exact = service.http.post("/v1/chat/completions", json=CHAT | {"model": f"m@{card['revision']}"})
        assert exact.status_code == 200


def test_a_fetch_shows_its_progress(bucket: Bucket, proxy: FaultProxy, tmp_path: Path) -> None:
    proxy.faults = [Fault(Kind.STALL, after=2 * MIB, seconds=4, match="safetensors")]
    with service_over(bucket, tmp_path, proxy.url) as service, ThreadPoolExecutor(1) as pool:
        asked = pool.submit(service.http.post, "/v1/chat/completions", json=CHAT)
        service.wait_until(lambda: bool(service.stats()["syncs"]), 20)
        service.wait_until(lambda: service.stats()["syncs"][0]["bytes"] > MIB, 20)
        (sync,) = service.stats()["syncs"]
        assert sync["model"] == "m"
        assert sync["total_bytes"] == 8 * MIB + 4
        assert 0 < sync["percent"] < 100
        assert {"bytes_per_second", "eta_seconds", "retries", "revision"} <= set(sync)
        assert asked.result().status_code == 200
        assert service.stats()["syncs"] == []
        assert service.stats()["disk"]["used_bytes"] >= 8 * MIB
        log = service.log.read_text()
        assert "fetching" in log
        assert "fetched" in log
    assert proxy.faults[0].fired >= 1


def test_a_disk_that_is_too_small_is_507_and_not_retried(bucket: Bucket, tmp_path: Path) -> None:
    with service_over(bucket, tmp_path, DISK_CACHE_GIB="0.001") as service:
        answer = service.http.post("/v1/chat/completions", json=CHAT)
        assert answer.status_code == 507
        assert answer.headers["x-should-retry"] == "false"
        error = answer.json()["error"]
        assert error["code"] == "disk_full"
        assert "DISK_CACHE_GIB" in error["message"]


def test_an_object_replaced_during_the_fetch_is_served_as_the_new_revision(
    bucket: Bucket, proxy: FaultProxy, tmp_path: Path
) -> None:
    fault = Fault(Kind.REPLACE_GENERATION, match="safetensors", act=lambda: put(bucket, "m"))
    proxy.faults = [fault]
    with service_over(bucket, tmp_path, proxy.url) as service:
        before = service.http.get("/v1/models/m").json()["revision"]
        assert service.http.post("/v1/chat/completions", json=CHAT).status_code == 200
        assert fault.fired == 1
        (engine,) = service.stats()["engines"]
        assert engine["revision"] == service.http.get("/v1/models/m").json()["revision"] != before


def test_a_bucket_that_is_away(bucket: Bucket, tmp_path: Path) -> None:
    with service_over(bucket, tmp_path, f"http://127.0.0.1:{free_port()}") as service:
        answer = service.http.get("/v1/models")
        assert answer.status_code == 503
        assert int(answer.headers["retry-after"]) > 0
        assert answer.json()["error"]["code"] == "store_unavailable"


def test_a_bucket_that_does_not_exist(bucket: Bucket, tmp_path: Path) -> None:
    with service_over(bucket, tmp_path, GCS_BUCKET="nobody-has-this") as service:
        answer = service.http.post("/v1/chat/completions", json=CHAT)
        assert (answer.status_code, answer.json()["error"]["code"]) == (500, "bucket_not_found")


def test_a_missing_permission_is_named(bucket: Bucket, proxy: FaultProxy, tmp_path: Path) -> None:
    proxy.faults = [Fault(Kind.FORBID_OBJECT, times=1000)]
    with service_over(bucket, tmp_path, proxy.url) as service:
        answer = service.http.post("/v1/chat/completions", json=CHAT)
        assert (answer.status_code, answer.json()["error"]["code"]) == (500, "store_forbidden")
        assert "storage.objects.get" in answer.json()["error"]["message"]


def test_the_service_answers_while_it_fetches(bucket: Bucket, proxy: FaultProxy, tmp_path: Path) -> None:
    put(bucket, "large", 64 * MIB)
    proxy.faults = [Fault(Kind.STALL, after=MIB, seconds=3, times=3, match="large/model")]
    with service_over(bucket, tmp_path, proxy.url) as service, ThreadPoolExecutor(1) as pool:
        service.http.post("/v1/chat/completions", json=CHAT).raise_for_status()
        loading = pool.submit(service.http.post, "/v1/chat/completions", json=CHAT | {"model": "large"})
        reply = 0
        while not loading.done():
            service.http.post("/v1/chat/completions", json=CHAT).raise_for_status()
            reply += 1
        assert loading.result().status_code == 200
        assert reply > 3


def test_what_is_loaded_is_served_while_a_new_revision_is_uploaded(bucket: Bucket, tmp_path: Path) -> None:
    with service_over(bucket, tmp_path, CATALOG_TTL="0") as service:
        old = service.http.get("/v1/models/m").json()["revision"]
        assert service.http.post("/v1/chat/completions", json=CHAT).status_code == 200
        bucket.put("models/m/model-00001-of-00002.safetensors", b"the other one is on its way")
        service.wait_until(lambda: "m" in service.stats()["unservable"] or not listed(service), 20)
        assert service.http.post("/v1/chat/completions", json=CHAT).status_code == 200
        assert service.engine("m")["revision"] == old
        service.http.post("/admin/unload/m").raise_for_status()
        answer = service.http.post("/v1/chat/completions", json=CHAT)
        assert (answer.status_code, answer.headers["x-model-revision"]) == (200, old), "it is on the disk"
        card = service.http.get("/v1/models/m").json()
        assert card["serving_revision"] == old != card["revision"]
        assert "model-00002-of-00002.safetensors is missing" in service.stats()["unservable"]["m"]


def listed(service: ServiceProcess) -> list[str]:
    return [card["id"] for card in service.http.get("/v1/models").json()["data"]]


def test_two_revisions_of_a_model_are_told_apart(bucket: Bucket, tmp_path: Path) -> None:
    with service_over(bucket, tmp_path, CATALOG_TTL="0", MAX_CACHED_MODELS="3") as service:
        assert service.http.post("/v1/chat/completions", json=CHAT).status_code == 200
        old = service.engine("m")["revision"]
        bucket.put("models/m/config.json", b'{"new": true}')
        service.wait_until(lambda: service.http.get("/v1/models/m").json()["revision"] != old, 20)
        new = service.http.get("/v1/models/m").json()["revision"]
        for revision in (new, old, new):
            answer = service.http.post("/v1/chat/completions", json=CHAT | {"model": f"m@{revision}"})
            assert (answer.status_code, answer.headers["x-model-revision"]) == (200, revision)
        answer = service.http.post("/v1/chat/completions", json=CHAT | {"model": "m@000000000000"})
        assert answer.status_code == 404


def test_preload_and_pin_in_serving_json(bucket: Bucket, tmp_path: Path) -> None:
    put(bucket, "other", MIB)
    bucket.put("models/m/serving.json", b'{"preload": true, "pinned": true}')
    with service_over(bucket, tmp_path, MAX_CACHED_MODELS="1", REQUEST_TIMEOUT="3") as service:
        service.wait_ready("m", 60)
        assert service.engine("m")["pinned"]
        answer = service.http.post("/v1/chat/completions", json=CHAT | {"model": "other"})
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "no_room")
        assert "every engine is pinned (MAX_CACHED_MODELS=1). Pinned: m" in answer.json()["error"]["message"]
        assert [engine["model"] for engine in service.stats()["engines"]] == ["m"]


def test_a_storm_on_a_cold_model_is_one_fetch(bucket: Bucket, proxy: FaultProxy, tmp_path: Path) -> None:
    with service_over(bucket, tmp_path, proxy.url) as service, ThreadPoolExecutor(16) as pool:
        barrier = threading.Barrier(16)

        def ask(_: int) -> int:
            barrier.wait()
            return service.http.post("/v1/chat/completions", json=CHAT).status_code

        assert set(pool.map(ask, range(16))) == {200}
    assert proxy.media_bytes == 8 * MIB + 4 + 2
