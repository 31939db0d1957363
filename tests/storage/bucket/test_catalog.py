"""Names and what a listing of the prefix means."""

import asyncio
import json
import threading
import time
from collections import defaultdict
from dataclasses import replace
from datetime import UTC, datetime

import google_crc32c
import pytest

from inference_service.errors import ModelNotFound, StoreError
from inference_service.storage.bucket.catalog import Catalog
from inference_service.storage.bucket.model import DescribedModel, ModelKind, canonical_name, models_in
from inference_service.storage.bucket.store import Bytes, StoredObject


def stored(name: str, generation: str = "1") -> StoredObject:
    return StoredObject(f"models/{name}", 10, generation, 7, datetime(2026, 1, 2, tzinfo=UTC))


CHECKPOINT = ["config.json", "tokenizer.json", "model.safetensors"]


def checkpoint(directory: str, **changes: str) -> list[StoredObject]:
    return [stored(f"{directory}/{name}", **changes) for name in CHECKPOINT]


class ListedStore:
    has_checksums = True
    connections = 4

    def __init__(self, *objects: StoredObject) -> None:
        self.objects = list(objects)
        self.contents: dict[str, bytes] = defaultdict(lambda: b"{}".ljust(10))
        self.listings = self.documents_read = 0
        self.error: StoreError | None = None
        self.seconds = 0.0
        self.gate: threading.Event | None = None
        self.waiting = threading.Event()
        # Of the next listings; then `objects` as they are at their end.
        self.answers: list[list[StoredObject]] = []

    def list(self, prefix: str) -> list[StoredObject]:
        self.listings += 1
        if self.gate is not None:
            self.waiting.set()
            self.gate.wait(10)
        time.sleep(self.seconds)
        if self.error:
            raise self.error
        return self.answers.pop(0) if self.answers else self.objects

    def read(self, stored: StoredObject, start: int = 0, end: int | None = None) -> Bytes:
        self.documents_read += 1
        yield self.contents[stored.name]

    def checksum(self, stored: StoredObject) -> int:
        return int(google_crc32c.value(self.contents[stored.name]))


@pytest.mark.parametrize(
    ("written", "name"), [("org/model", "org-model"), ("org-model", "org-model"), ("a/b/c/", "a-b-c")]
)
def test_canonical_name(written: str, name: str) -> None:
    assert canonical_name(written) == name


def test_directories_are_models_nested_ones_too() -> None:
    found = models_in([*checkpoint("plain"), *checkpoint("org/nested"), stored("notes.txt")], "models/")
    assert list(found) == ["org-nested", "plain"]
    assert found["plain"].bytes == 30


def test_a_subdirectory_of_other_files_is_no_model_and_not_part_of_one() -> None:
    found = models_in([*checkpoint("m"), stored("m/runs/events.json")], "models/")
    assert list(found) == ["m"]
    assert len(found["m"].objects) == 3


def test_only_what_serving_needs_is_fetched() -> None:
    others = ["pytorch_model.bin", "modeling_x.py", "optimizer.pt", "README.md", "trainer_state.json"]
    files = [*checkpoint("m"), *(stored(f"m/{name}") for name in others)]
    names = [kept.name.rpartition("/")[2] for kept in models_in(files, "models/")["m"].objects]
    assert names == sorted(CHECKPOINT)


def test_an_empty_prefix() -> None:
    assert list(models_in(checkpoint("m"), "")) == ["models-m"]


def test_the_revision_is_every_files_generation_and_checksum() -> None:
    def revision(files: list[StoredObject]) -> str:
        return models_in(files, "models/")["m"].revision

    first = revision(checkpoint("m"))
    assert revision(checkpoint("m")) == first
    assert revision(checkpoint("m", generation="2")) != first
    assert revision([*checkpoint("m"), stored("m/chat_template.jinja")]) != first


async def why_unservable(catalog: Catalog) -> str:
    reason = (await catalog.find("m")).unservable
    assert reason is not None
    return reason


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        (["config.json", "pytorch_model.bin"], "pickles (pytorch_model.bin)"),
        (["config.json"], "no *.safetensors"),
        (["model.safetensors", "tokenizer.json"], "config.json is missing"),
        (["config.json", "model.safetensors"], "tokenizer.json is missing"),
        (["adapter_config.json", "adapter_model.safetensors"], "adapter"),
    ],
)
async def test_what_cannot_be_served_says_why(files: list[str], reason: str) -> None:
    catalog = Catalog(ListedStore(*(stored(f"m/{name}") for name in files)), "models/")
    assert reason in await why_unservable(catalog)


def test_adapters_are_known_as_such() -> None:
    found = models_in([stored("a/adapter_config.json"), stored("a/adapter_model.safetensors")], "models/")
    assert found["a"].kind is ModelKind.ADAPTER
    half = models_in([stored("a/adapter_model.safetensors")], "models/")
    assert half["a"].kind is ModelKind.ADAPTER
    merged = models_in([*checkpoint("m"), stored("m/adapter_config.json")], "models/")
    assert merged["m"].kind is ModelKind.CHECKPOINT, "its own weights are what counts"


@pytest.mark.parametrize(
    ("files", "missing"),
    [
        (["config.json", "tokenizer.json", "model-00001-of-00003.safetensors"], "model-00002-of-00003"),
        (["config.json", "tokenizer.json", "model-00002-of-00002.safetensors"], "model-00001-of-00002"),
        (["config.json", "model.safetensors"], "tokenizer.json"),
    ],
)
def test_an_upload_under_way_says_what_is_missing(files: list[str], missing: str) -> None:
    unservable = models_in([stored(f"m/{name}") for name in files], "models/")["m"].unservable
    assert unservable is not None
    assert missing in unservable


def test_a_sharded_model_is_complete_with_its_last_shard() -> None:
    shards = [f"model-{number:05}-of-00002.safetensors" for number in (1, 2)]
    files = ["config.json", "tokenizer.json", "model.safetensors.index.json", *shards]
    assert models_in([stored(f"m/{name}") for name in files], "models/")["m"].unservable is None


@pytest.mark.parametrize(
    "stray",
    [
        "m/../../etc/passwd.json",
        "m/..",
        "m//config.json",
        "m/./x",
        "m/a\\b.json",
        "m/a\nb.json",
        "m/\x00",
        "m/\udcff.json",
    ],
)
def test_an_object_that_would_leave_its_directory_makes_the_model_unservable(stray: str) -> None:
    found = models_in([*checkpoint("m"), *checkpoint("other"), stored(stray)], "models/")
    assert list(found) == ["m", "other"]
    assert "would leave its directory" in (found["m"].unservable or "")
    assert found["other"].unservable is None
    assert stray not in [kept.name for kept in found["m"].objects]


@pytest.mark.parametrize("directory", ["my model", "-m", ".hidden", "m@1", "ünï", "m" * 201])
def test_a_name_outside_the_grammar_says_so(directory: str) -> None:
    (found,) = models_in(checkpoint(directory), "models/").values()
    assert "its name may contain" in (found.unservable or "")


def test_two_directories_of_one_name_are_reported() -> None:
    found = models_in([*checkpoint("org/m"), *checkpoint("org-m")], "models/")
    assert "org-m and org/m" in (found["org-m"].unservable or "")


async def test_a_revision_can_be_named() -> None:
    catalog = Catalog(ListedStore(*checkpoint("org/m")), "models/")
    revision = (await catalog.find("org-m")).revision
    assert (await catalog.find(f"org/m@{revision}")).name == "org-m"
    with pytest.raises(ModelNotFound, match=revision):
        await catalog.find("org/m@000000000000")


async def test_one_listing_however_many_ask() -> None:
    store = ListedStore(*checkpoint("m"))
    catalog = Catalog(store, "models/")
    await asyncio.gather(*(catalog.find("m") for _ in range(50)))
    await catalog.models()
    assert store.listings == 1


async def test_wrong_names_do_not_list_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("inference_service.storage.bucket.catalog.MISS_LISTING_SECONDS", 0.3)
    store = ListedStore(*checkpoint("m"))
    catalog = Catalog(store, "models/")
    with pytest.raises(ModelNotFound):
        await catalog.find("wrong")
    assert store.listings == 1
    ended = catalog._ended_at
    wrong = [catalog.find(f"wrong-{number}") for number in range(50)]
    assert {type(each) for each in await asyncio.gather(*wrong, return_exceptions=True)} == {ModelNotFound}
    assert store.listings == 2
    assert time.monotonic() - ended > 0.29


async def test_what_was_uploaded_before_the_request_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """However short a time ago another name was looked for."""
    monkeypatch.setattr("inference_service.storage.bucket.catalog.MISS_LISTING_SECONDS", 0.3)
    store = ListedStore(*checkpoint("m"))
    catalog = Catalog(store, "models/")
    with pytest.raises(ModelNotFound):
        await catalog.find("org/new")
    store.objects += checkpoint("org/new")
    put(store, "m/serving.json", b'{"aliases": ["gpt-4o"]}')
    found = await asyncio.gather(catalog.find("org/new"), catalog.find("gpt-4o"))
    assert [each.name for each in found] == ["org-new", "m"]
    assert store.listings == 2


async def test_a_listing_that_began_before_the_upload_does_not_count() -> None:
    store = ListedStore(*checkpoint("m"))
    catalog = Catalog(store, "models/", ttl=0)
    await catalog.models()
    old, store.gate = store.objects, threading.Event()
    await catalog.find("m")  # lists behind
    await asyncio.to_thread(store.waiting.wait, 10)
    store.answers = [old]
    store.objects = old + checkpoint("new")
    asked = asyncio.create_task(catalog.find("new"))
    await asyncio.sleep(0.1)
    store.gate.set()
    assert (await asked).name == "new"
    assert store.listings >= 3


async def test_a_listing_under_way_is_old_too_once_that_is_known() -> None:
    store = ListedStore(*checkpoint("m"))
    catalog = Catalog(store, "models/", ttl=0)
    old = await catalog.find("m")
    store.gate, store.answers = threading.Event(), [store.objects]
    catalog._refresh()
    await asyncio.to_thread(store.waiting.wait, 10)
    put(store, "m/config.json", b'{"new": 1}')
    catalog.forget()
    asked = asyncio.create_task(catalog.find("m"))
    await asyncio.sleep(0.1)
    store.gate.set()
    assert (await asked).revision != old.revision


async def test_an_alias_is_found_in_the_listing_that_is_under_way() -> None:
    """A request just after the first one waits for no second listing."""
    store = ListedStore(*checkpoint("m"))
    put(store, "m/serving.json", b'{"aliases": ["gpt-4o"]}')
    catalog = Catalog(store, "models/")
    store.gate = threading.Event()
    first = asyncio.create_task(catalog.find("m"))
    await asyncio.sleep(0.05)
    second = asyncio.create_task(catalog.find("gpt-4o"))
    await asyncio.sleep(0.05)
    store.gate.set()
    assert {(await first).name, (await second).name} == {"m"}
    assert store.listings == 1


async def test_a_listing_that_fails_is_tried_again_by_the_next() -> None:
    store = ListedStore(*checkpoint("m"))
    store.error = StoreError("gone")
    catalog = Catalog(store, "models/")
    with pytest.raises(StoreError):
        await catalog.models()
    store.error = None
    assert len(await catalog.models()) == 1


async def test_the_old_listing_is_served_when_the_store_is_away() -> None:
    store = ListedStore(*checkpoint("m"))
    catalog = Catalog(store, "models/", ttl=0)
    await catalog.models()
    store.error = StoreError("gone")
    assert (await catalog.find("m")).name == "m"
    assert [model.name for model in await catalog.models()] == ["m"]
    assert store.listings == 2


async def test_a_known_model_does_not_wait_for_a_slow_bucket() -> None:
    store = ListedStore(*checkpoint("m"))
    catalog = Catalog(store, "models/", ttl=0)
    await catalog.models()
    slow = threading.Event()
    store.gate = slow
    assert (await asyncio.wait_for(catalog.find("m"), 1)).name == "m"
    slow.set()


async def test_a_client_that_leaves_does_not_end_the_listing_of_others() -> None:
    catalog = Catalog(ListedStore(*checkpoint("m")), "models/")
    impatient = asyncio.create_task(catalog.find("m"))
    patient = asyncio.create_task(catalog.find("m"))
    await asyncio.sleep(0)
    impatient.cancel()
    assert (await patient).name == "m"


def put(store: ListedStore, name: str, content: bytes) -> None:
    """An object with content of its own."""
    store.contents[f"models/{name}"] = content
    store.objects = [each for each in store.objects if each.name != f"models/{name}"]
    store.objects.append(replace(stored(name), size=len(content), generation=str(hash(content))))


async def test_an_alias_is_a_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("inference_service.storage.bucket.catalog.MISS_LISTING_SECONDS", 0)
    store = ListedStore(*checkpoint("org/m"))
    put(store, "org/m/serving.json", b'{"aliases": ["gpt-4o", "team/best"]}')
    catalog = Catalog(store, "models/")
    for name in ("gpt-4o", "team/best", "team-best", "org/m"):
        assert (await catalog.find(name)).name == "org-m"
    with pytest.raises(ModelNotFound):
        await catalog.find("gpt-5")


async def test_an_alias_that_two_claim_is_nobodys_and_a_name_wins_over_an_alias(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("inference_service.storage.bucket.catalog.MISS_LISTING_SECONDS", 0)
    store = ListedStore(*checkpoint("a"), *checkpoint("b"), *checkpoint("c"))
    put(store, "a/serving.json", b'{"aliases": ["best", "c"]}')
    put(store, "b/serving.json", b'{"aliases": ["best"]}')
    catalog = Catalog(store, "models/")
    assert (await catalog.find("c")).name == "c"
    with pytest.raises(ModelNotFound):
        await catalog.find("best")


async def test_a_bad_serving_json_names_the_key() -> None:
    store = ListedStore(*checkpoint("m"))
    put(store, "m/serving.json", b'{"tempature": 1}')
    assert "unknown key 'tempature'" in await why_unservable(Catalog(store, "models/"))


async def test_a_new_serving_json_is_a_new_revision_and_is_read() -> None:
    store = ListedStore(*checkpoint("m"))
    put(store, "m/serving.json", b'{"max_model_len": 100}')
    catalog = Catalog(store, "models/", ttl=0)
    old = await catalog.find("m")
    put(store, "m/serving.json", b'{"max_model_len": 200}')
    catalog.forget()
    new = await catalog.find("m")
    assert (old.serving.max_model_len, new.serving.max_model_len) == (100, 200)
    assert old.revision != new.revision


async def test_a_shard_that_only_the_index_names() -> None:
    store = ListedStore(*checkpoint("m"))
    index = {"weight_map": {"a": "model.safetensors", "b": "other.safetensors"}}
    put(store, "m/model.safetensors.index.json", json.dumps(index).encode())
    reason = await why_unservable(Catalog(store, "models/"))
    assert "other.safetensors, listed in model.safetensors.index.json, is missing" in reason
    store.objects += [stored("m/other.safetensors")]
    assert (await Catalog(store, "models/").find("m")).unservable is None


@pytest.mark.parametrize("index", [b"{}", b"[]", b"{", b'{"weight_map": {"a": 1}}'])
async def test_an_index_that_is_none(index: bytes) -> None:
    store = ListedStore(*checkpoint("m"))
    put(store, "m/model.safetensors.index.json", index)
    assert "model.safetensors.index.json" in await why_unservable(Catalog(store, "models/"))


async def test_an_adapter_says_its_base() -> None:
    store = ListedStore(stored("lora/adapter_model.safetensors"))
    put(store, "lora/adapter_config.json", b'{"base_model_name_or_path": "org/base"}')
    (adapter,) = await Catalog(store, "models/").described()
    assert isinstance(adapter, DescribedModel)
    assert (adapter.kind, adapter.base_name) == (ModelKind.ADAPTER, "org/base")


@pytest.mark.parametrize(
    ("name", "size"), [("serving.json", 1 << 20), ("config.json", 1 << 30), ("tokenizer.json", 1 << 30)]
)
def test_a_file_too_large_to_be_what_its_name_says(name: str, size: int) -> None:
    objects = [each for each in checkpoint("m") if each.filename != name]
    found = models_in([*objects, replace(stored(f"m/{name}"), size=size)], "models/")["m"]
    assert f"{name} has {size} bytes" in (found.unservable or "")


async def test_documents_are_read_once() -> None:
    store = ListedStore(*checkpoint("m"))
    put(store, "m/serving.json", b"{}")
    catalog = Catalog(store, "models/", ttl=0)
    for _ in range(5):
        await catalog.described()
    assert store.documents_read == 1


def test_an_object_named_like_a_file_of_the_snapshots_own_is_not_served() -> None:
    found = models_in([*checkpoint("m"), stored("m/.manifest.json"), stored("m/.journal")], "models/")
    assert sorted(each.filename for each in found["m"].objects) == sorted(CHECKPOINT)


async def test_an_index_with_a_name_that_nobody_can_print() -> None:
    store = ListedStore(*checkpoint("m"))
    put(store, "m/model.safetensors.index.json", b'{"weight_map": {"a": "\\ud800\\u001b[31m"}}')
    reason = await why_unservable(Catalog(store, "models/"))
    assert reason.isprintable()
    reason.encode()


async def test_an_upload_that_is_finished_is_served_by_the_next_request(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    store = ListedStore(*(each for each in checkpoint("m") if "tokenizer" not in each.name))
    catalog = Catalog(store, "models/")
    assert "tokenizer.json is missing" in await why_unservable(catalog)
    store.objects = checkpoint("m")
    monkeypatch.setattr("inference_service.storage.bucket.catalog.MISS_LISTING_SECONDS", 0)
    await catalog.look_again()
    assert (await catalog.find("m")).unservable is None


async def test_a_model_that_cannot_be_served_lists_now_and_then_only() -> None:
    """Its older revision may serve, to clients that are not to wait."""
    store = ListedStore(*(each for each in checkpoint("m") if "tokenizer" not in each.name))
    catalog = Catalog(store, "models/")
    began = time.monotonic()
    for _ in range(20):
        assert (await catalog.find("m")).unservable is not None
    assert store.listings == 1
    assert time.monotonic() - began < 0.9


async def test_a_bucket_that_fails_slowly_is_not_asked_again_at_once() -> None:
    store = ListedStore(*checkpoint("m"))
    catalog = Catalog(store, "models/", ttl=30)
    await catalog.models()
    catalog._ttl = 0.3
    await asyncio.sleep(0.3)
    store.error, store.seconds = StoreError("gone"), 0.4
    for _ in range(4):
        assert len(await catalog.models()) == 1
        await catalog.find("m")
    assert store.listings <= 3


async def test_an_alias_in_vain_is_told() -> None:
    store = ListedStore(*checkpoint("a"), *checkpoint("b"))
    put(store, "a/serving.json", b'{"aliases": ["best", "a"]}')
    put(store, "b/serving.json", b'{"aliases": ["best", "a"]}')
    catalog = Catalog(store, "models/")
    with pytest.raises(ModelNotFound, match="an alias that a and b claim"):
        await catalog.find("best")
    assert catalog.conflicts == {"best": ("a", "b"), "a": ("a", "b")}
    assert (await catalog.find("a")).name == "a"


async def test_an_empty_revision_is_none() -> None:
    with pytest.raises(ModelNotFound):
        await Catalog(ListedStore(*checkpoint("m")), "models/").find("m@")


def test_a_model_of_many_shards_is_listed_quickly() -> None:
    shards = [f"model-{number:05}-of-09000.safetensors" for number in range(1, 9001)]
    started = time.monotonic()
    found = models_in([stored(f"m/{name}") for name in [*shards, *CHECKPOINT[:2]]], "models/")
    assert found["m"].unservable is None
    assert time.monotonic() - started < 5
