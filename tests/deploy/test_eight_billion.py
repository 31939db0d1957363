"""Llama-3.1-8B and Qwen3-8B on Cloud Run's L4: admitted by what the manifests set, from their headers alone.

The weights are holes in files: no byte of them is read. The card and its driver are described, not there.
"""

import json
import os
import struct
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from deploy.cloudrun.manifests import VARIANTS, Variant
from inference_service.backends.cuda import cuda_environment
from inference_service.config import Backend, Settings
from inference_service.machine.device import Device, DeviceKind
from inference_service.pool.budget import Budget
from inference_service.scheduler.events import Load, Request
from inference_service.scheduler.scheduler import Scheduler
from inference_service.scheduler.state import Policy
from inference_service.storage.bucket.directory import DirectoryStore
from inference_service.storage.bucket.documents import Documents
from inference_service.storage.bucket.model import describe, models_in
from inference_service.storage.model import Checkpoint
from inference_service.storage.preflight import Preflight
from inference_service.storage.snapshots import cache as disk_cache
from inference_service.storage.snapshots.cache import open_cache

GIB = 1 << 30
L4 = Device(DeviceKind.CUDA, "NVIDIA L4", 1, int(22.5 * GIB), driver_cuda=(12, 2))
SHARDS = 4
# As their config.json has it on the hub; bytes and tensors are those of their indexes there.
COMMON = {
    "hidden_size": 4096,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "torch_dtype": "bfloat16",
    "tie_word_embeddings": False,
}
LLAMA = COMMON | {
    "architectures": ["LlamaForCausalLM"],
    "intermediate_size": 14336,
    "max_position_embeddings": 131072,
    "num_hidden_layers": 32,
    "vocab_size": 128256,
}
QWEN = COMMON | {
    "architectures": ["Qwen3ForCausalLM"],
    "head_dim": 128,
    "intermediate_size": 12288,
    "max_position_embeddings": 40960,
    "num_hidden_layers": 36,
    "vocab_size": 151936,
}
BYTES = {"llama-3.1-8b": 16_060_522_496, "qwen3-8b": 16_381_470_720}


def tensors(config: dict[str, Any]) -> Iterator[tuple[str, list[int]]]:
    hidden, between, heads = config["hidden_size"], config["intermediate_size"], config["num_attention_heads"]
    head = config.get("head_dim") or hidden // heads
    queries, keys = heads * head, config["num_key_value_heads"] * head
    yield "model.embed_tokens.weight", [config["vocab_size"], hidden]
    yield "lm_head.weight", [config["vocab_size"], hidden]
    yield "model.norm.weight", [hidden]
    for number in range(config["num_hidden_layers"]):
        layer = f"model.layers.{number}"
        yield f"{layer}.self_attn.q_proj.weight", [queries, hidden]
        yield f"{layer}.self_attn.k_proj.weight", [keys, hidden]
        yield f"{layer}.self_attn.v_proj.weight", [keys, hidden]
        yield f"{layer}.self_attn.o_proj.weight", [hidden, queries]
        for name in ("gate_proj", "up_proj"):
            yield f"{layer}.mlp.{name}.weight", [between, hidden]
        yield f"{layer}.mlp.down_proj.weight", [hidden, between]
        for name in ("input_layernorm", "post_attention_layernorm"):
            yield f"{layer}.{name}.weight", [hidden]
        if "Qwen3ForCausalLM" in config["architectures"]:
            for name in ("q_norm", "k_norm"):
                yield f"{layer}.self_attn.{name}.weight", [head]


def put(directory: Path, config: dict[str, Any]) -> None:
    """The checkpoint's real headers, in four shards; the tensors' bytes are holes."""
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "tokenizer.json").write_text("{}")
    everything, weight_map = list(tensors(config)), {}
    for shard in range(SHARDS):
        name = f"model-{shard + 1:05}-of-{SHARDS:05}.safetensors"
        header, offset = {}, 0
        for tensor, shape in everything[shard::SHARDS]:
            end = offset + 2 * shape[0] * (shape[1] if len(shape) == 2 else 1)
            header[tensor] = {"dtype": "BF16", "shape": shape, "data_offsets": [offset, end]}
            weight_map[tensor], offset = name, end
        content = json.dumps(header).encode()
        with (directory / name).open("wb") as file:
            file.write(struct.pack("<Q", len(content)) + content)
            file.truncate(file.tell() + offset)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> DirectoryStore:
    root = tmp_path_factory.mktemp("bucket")
    put(root / "models" / "llama-3.1-8b", LLAMA)
    put(root / "models" / "qwen3-8b", QWEN)
    return DirectoryStore(root)


def model_in(store: DirectoryStore, name: str) -> Checkpoint:
    model = models_in(store.list("models/"), "models/")[name]
    contents = {each.filename: b"".join(store.read(each)) for each in model.documents}
    return Checkpoint(describe(model, contents))


@pytest.fixture
def instance(monkeypatch: pytest.MonkeyPatch, variant: Variant, tmp_path: Path) -> Settings:
    """An instance of Cloud Run: its memory, and the file system that the cache lies on."""
    memory = variant.memory_gib * GIB
    # ext4 keeps some of a disk for itself; files beside it are memory.
    size = memory if variant.disk_gib is None else int(0.98 * variant.disk_gib * GIB)
    block = 4096
    monkeypatch.setattr(disk_cache, "memory_bytes", lambda: memory)
    monkeypatch.setattr(disk_cache, "_is_memory", lambda directory: variant.disk_gib is None)
    blocks = SimpleNamespace(f_blocks=size // block, f_bavail=size // block, f_frsize=block)
    monkeypatch.setattr(os, "statvfs", lambda path: blocks)
    return variant.settings.model_copy(update={"local_model_cache": tmp_path / "cache"})


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: variant.file)
@pytest.mark.parametrize("name", BYTES)
async def test_an_eight_billion_model_is_admitted(
    variant: Variant,
    instance: Settings,
    store: DirectoryStore,
    name: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    model = model_in(store, name)
    _, disk = open_cache(instance.local_model_cache, instance.disk_cache_gib)
    preflight = Preflight(Documents(store), instance, L4, Backend.VLLM, disk.check_fits)
    await preflight.examine(model)
    profile = preflight.memory_profile(model)
    assert profile is not None
    assert profile.weights_bytes == BYTES[name]

    slots, utilization = instance.slots, instance.gpu_memory_utilization
    budget = Budget(L4, Backend.VLLM, utilization, slots, instance.max_adapters)
    footprint = budget.footprint(profile)
    scheduler = Scheduler(Policy(slots, instance.concurrency, instance.queued, memory=budget.total))
    assert scheduler.handle(Request(1, name, footprint.total), 0.0) == [Load(name)]

    tokens = footprint.kv_cache // profile.token_bytes
    with capsys.disabled():
        print(f"\n{variant.file}: {name} on {L4.name}: {footprint}, {tokens} tokens of KV cache")
    assert profile.context == instance.max_model_len
    assert tokens >= 2 * profile.context, "two requests of full length at once"


def test_its_driver_gets_forward_compatibility(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    compat = tmp_path / "compat"
    compat.mkdir()
    (compat / "libcuda.so.1").touch()
    monkeypatch.setenv("VLLM_CUDA_COMPATIBILITY_PATH", str(compat))
    monkeypatch.delenv("VLLM_ENABLE_CUDA_COMPATIBILITY", raising=False)
    monkeypatch.setattr("inference_service.backends.cuda._wheel_cuda", lambda: (13, 0))
    assert cuda_environment(L4)["LD_LIBRARY_PATH"].split(os.pathsep)[0] == str(compat)
