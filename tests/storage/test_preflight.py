"""Preflight: what cannot be served is refused with the reason before a byte of weights is downloaded."""

import asyncio
import json
import shutil
import struct
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from inference_service.config import Backend, Settings
from inference_service.errors import DiskFull, ModelNotServable, StoreUnavailable
from inference_service.machine.device import Device, DeviceKind
from inference_service.storage.bucket.directory import DirectoryStore
from inference_service.storage.bucket.documents import Documents
from inference_service.storage.bucket.model import ListedModel, describe, models_in
from inference_service.storage.bucket.store import Bytes, StoredObject
from inference_service.storage.model import Adapter, Checkpoint
from inference_service.storage.preflight import Preflight
from tests.fixtures.installed import needs_vllm

GIB = 1 << 30
CONFIG = {"architectures": ["LlamaForCausalLM"], "dtype": "bfloat16"}


class WatchedStore(DirectoryStore):
    bytes_read = 0
    reads = 0

    def read(self, stored: StoredObject, start: int = 0, end: int | None = None) -> Bytes:
        self.reads += 1
        for chunk in super().read(stored, start, end):
            self.bytes_read += len(chunk)
            yield chunk


@pytest.fixture
def source(tmp_path: Path) -> Path:
    put(tmp_path / "models" / "m")
    return tmp_path


def put(directory: Path, config: Any = CONFIG, elements: int = 1000, **documents: Any) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(config if isinstance(config, str) else json.dumps(config))
    (directory / "tokenizer.json").write_text("{}")
    for name, content in documents.items():
        (directory / f"{name}.json").write_text(json.dumps(content))
    for number in (1, 2):
        safetensors(directory / f"model-{number:05}-of-00002.safetensors", {f"w{number}": elements})


def safetensors(path: Path, tensors: dict[str, int]) -> None:
    """Real headers; the tensors' bytes are a hole in the file."""
    offset, header = 0, {}
    for name, elements in tensors.items():
        header[name] = {"dtype": "BF16", "shape": [elements], "data_offsets": [offset, offset + 2 * elements]}
        offset += 2 * elements
    content = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(content)) + content)
        file.truncate(file.tell() + offset)


def model_in(store: DirectoryStore) -> Checkpoint:
    model = models_in(store.list("models/"), "models/")["m"]
    contents = {each.filename: b"".join(store.read(each)) for each in model.documents}
    return Checkpoint(describe(model, contents))


def preflight(
    store: DirectoryStore,
    memory: int = 8 * GIB,
    backend: Backend = Backend.VLLM,
    check_disk: Callable[[str, int], None] = lambda model, count: None,
    **settings: Any,
) -> Preflight:
    device = Device(DeviceKind.CUDA, "Test GPU", 1, memory)
    return Preflight(Documents(store), Settings(**settings), device, backend, check_disk)


def full(model: str, count: int) -> None:
    raise DiskFull(f"no room for {model}")


async def refusal(source: Path, **options: Any) -> str:
    store = DirectoryStore(source)
    with pytest.raises(ModelNotServable) as caught:
        await preflight(store, **options).examine(model_in(store))
    return caught.value.message


async def test_a_model_that_can_be_served_costs_a_few_kilobytes_once(source: Path) -> None:
    put(source / "models" / "m", elements=50_000_000)
    store = WatchedStore(source)
    model = model_in(store)
    store.bytes_read = store.reads = 0
    examined = preflight(store)
    await asyncio.gather(*(examined.examine(model) for _ in range(20)))
    assert store.bytes_read < 200_000
    reads = store.reads
    await examined.examine(model)
    assert store.reads == reads, "what was found is kept"


async def test_weights_that_do_not_fit_are_refused_with_the_numbers(source: Path) -> None:
    put(source / "models" / "m", elements=2_000_000_000)
    words = await refusal(source, memory=8 * GIB, gpu_memory_utilization=0.5)
    assert "its weights take 7.5 GiB as bfloat16, but the engine may use only 4.0 GiB" in words
    assert "1 x 8.0 GiB of Test GPU, GPU_MEMORY_UTILIZATION=0.5" in words


async def test_the_wish_for_more_gpus_and_the_type_count(source: Path) -> None:
    put(source / "models" / "m", elements=2_000_000_000, serving={"tensor_parallel_size": 2})
    store = DirectoryStore(source)
    await preflight(store, gpu_memory_utilization=0.5).examine(model_in(store))
    put(source / "models" / "m", elements=2_000_000_000, serving={"dtype": "float32"})
    assert "14.9 GiB as float32" in await refusal(source)


async def test_a_model_for_which_the_disk_is_too_small(source: Path) -> None:
    store = DirectoryStore(source)
    with pytest.raises(DiskFull, match="no room for m"):
        await preflight(store, check_disk=full).examine(model_in(store))


async def test_code_is_never_run(source: Path) -> None:
    put(source / "models" / "m", config=CONFIG | {"auto_map": {"AutoModel": "modeling.Mine"}})
    assert "auto_map" in await refusal(source)


@needs_vllm
async def test_an_architecture_that_nobody_knows(source: Path) -> None:
    put(source / "models" / "m", config={"architectures": ["NobodysForCausalLM"]})
    assert "NobodysForCausalLM, which the vllm backend does not support" in await refusal(source)
    put(source / "models" / "m", config={})
    assert "names no architecture" in await refusal(source)


@needs_vllm
@pytest.mark.parametrize(
    ("serving", "words"),
    [
        ({"tool_call_parser": "nobodys"}, "tool_call_parser: 'nobodys' is not one of"),
        ({"reasoning_parser": "nobodys"}, "reasoning_parser: 'nobodys' is not one of"),
        ({"quantization": "nobodys"}, "quantization: 'nobodys' is not one of"),
    ],
)
async def test_names_that_vllm_does_not_know(source: Path, serving: Any, words: str) -> None:
    put(source / "models" / "m", serving=serving)
    assert words in await refusal(source)


@pytest.mark.parametrize("config", ["[]", "{", '"x"', "[" * 50_000])
async def test_a_config_that_is_none(source: Path, config: str) -> None:
    put(source / "models" / "m", config=config)
    assert "config.json is not" in await refusal(source)


@pytest.mark.parametrize(
    "config", [{"architectures": "LlamaForCausalLM"}, {"architectures": [1, {}]}, CONFIG | {"text_config": 7}]
)
async def test_a_config_of_wrong_types_is_no_crash(source: Path, config: Any) -> None:
    put(source / "models" / "m", config=config)
    assert await refusal(source)


async def test_a_weights_file_that_was_cut_off_is_named(source: Path) -> None:
    file = source / "models" / "m" / "model-00002-of-00002.safetensors"
    with file.open("r+b") as cut:
        cut.truncate(file.stat().st_size - 10)
    words = await refusal(source)
    assert "model-00002-of-00002.safetensors is incomplete or damaged: it was cut off: 10 bytes" in words


async def test_a_long_header_takes_a_second_read(source: Path) -> None:
    (source / "models" / "m" / "model-00001-of-00002.safetensors").unlink()
    (source / "models" / "m" / "model-00002-of-00002.safetensors").unlink()
    safetensors(
        source / "models/m/model.safetensors", {f"layer.{number}.weight": 8 for number in range(5000)}
    )
    store = DirectoryStore(source)
    await preflight(store).examine(model_in(store))


async def test_a_new_revision_is_examined_anew(source: Path) -> None:
    store = DirectoryStore(source)
    examined = preflight(store)
    await examined.examine(model_in(store))
    put(source / "models" / "m", config=CONFIG | {"auto_map": {"AutoModel": "modeling.Mine"}})
    with pytest.raises(ModelNotServable):
        await examined.examine(model_in(store))
    put(source / "models" / "m")
    await examined.examine(model_in(store))


async def test_the_fake_engine_serves_anything(source: Path) -> None:
    (source / "models" / "m" / "model-00001-of-00002.safetensors").write_bytes(b"no weights")
    store = DirectoryStore(source)
    await preflight(store, backend=Backend.FAKE).examine(model_in(store))


async def test_two_revisions_at_once_get_a_verdict_each(source: Path) -> None:
    store = DirectoryStore(source)
    good = model_in(store)
    await asyncio.sleep(0.01)
    put(source / "models" / "m", config=CONFIG | {"auto_map": {"AutoModel": "modeling.Mine"}})
    bad = model_in(store)
    put(source / "good" / "m")
    (source / "good/m/config.json").write_text(json.dumps(CONFIG))
    described = replace(
        good.described,
        objects=tuple(
            replace(each, name=each.name.replace("models/", "good/"), generation=now.generation)
            for each, now in zip(good.objects, DirectoryStore(source).list("good/"), strict=True)
        ),
    )
    good = Checkpoint(described)
    examined = preflight(store)
    for _ in range(20):
        examined._found.clear()
        answers = await asyncio.gather(examined.examine(bad), examined.examine(good), return_exceptions=True)
        assert isinstance(answers[0], ModelNotServable)
        assert answers[1] is None


@needs_vllm
async def test_what_lies_on_the_disk_is_judged_without_the_bucket(source: Path, tmp_path: Path) -> None:
    store = DirectoryStore(source)
    model = model_in(store)
    kept = tmp_path / "kept"
    shutil.copytree(source / "models" / "m", kept)
    shutil.rmtree(source / "models" / "m")

    async def where(model: ListedModel) -> Path:
        return kept

    device = Device(DeviceKind.CUDA, "Test GPU", 1, 8 * GIB)
    await Preflight(Documents(store), Settings(), device, Backend.VLLM, full, where).examine(model)
    (kept / "config.json").write_text("{}")
    with pytest.raises(ModelNotServable, match="names no architecture"):
        await Preflight(Documents(store), Settings(), device, Backend.VLLM, full, where).examine(model)


async def test_a_context_longer_than_the_model_has_positions(source: Path) -> None:
    config = CONFIG | {"max_position_embeddings": 8192}
    put(source / "models" / "m", config=config, serving={"max_model_len": 10_000})
    assert "max_model_len: 10000 is more than the 8192 positions" in await refusal(source)
    stretched = config | {"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}
    put(source / "models" / "m", config=stretched, serving={"max_model_len": 10_000})
    store = DirectoryStore(source)
    await preflight(store).examine(model_in(store))
    put(source / "models" / "m", config=CONFIG | {"n_positions": 1024}, serving={"max_model_len": 2048})
    assert "max_model_len: 2048 is more than the 1024 positions" in await refusal(source)


async def test_a_kv_cache_that_does_not_fit_beside_the_weights(source: Path) -> None:
    put(source / "models" / "m", serving={"kv_cache_gib": 1000})
    assert "plus 1000.0 GiB of KV cache (serving.json: kv_cache_gib)" in await refusal(source)


async def test_a_document_that_hangs_is_not_waited_for(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("inference_service.storage.bucket.documents.READ_SECONDS", 0.1)
    gate = threading.Event()

    class Hanging(DirectoryStore):
        def read(self, stored: StoredObject, start: int = 0, end: int | None = None) -> Bytes:
            gate.wait(20)
            yield b""

    model = model_in(DirectoryStore(source))
    with pytest.raises(StoreUnavailable, match="did not arrive within"):
        await preflight(Hanging(source)).examine(model)
    gate.set()


async def test_an_adapters_base_is_read_where_it_lies(tmp_path: Path) -> None:
    """The revision that serves may be on the disk only."""
    put(tmp_path / "models" / "m")
    kept = tmp_path / "kept"
    shutil.copytree(tmp_path / "models" / "m", kept)
    store = DirectoryStore(tmp_path)
    base = model_in(store)
    shutil.rmtree(tmp_path / "models" / "m")
    put(tmp_path / "models" / "m", elements=2000)
    (tmp_path / "models" / "t").mkdir()
    (tmp_path / "models" / "t" / "adapter_config.json").write_text('{"r": 8, "base_model_name_or_path": "m"}')
    safetensors(
        tmp_path / "models" / "t" / "adapter_model.safetensors", {"base_model.model.x.lora_A.weight": 8}
    )
    adapter = models_in(store.list("models/"), "models/")["t"]

    async def where(model: ListedModel) -> Path | None:
        return kept if model.name == "m" else None

    device = Device(DeviceKind.CUDA, "Test GPU", 1, 8 * GIB)
    found = Preflight(Documents(store), Settings(), device, Backend.VLLM, lambda model, count: None, where)
    with pytest.raises(ModelNotServable, match="is not a LoRA weight"):
        await found.examine(Adapter(replace(describe(adapter, {}), rank=8), base))
