"""What adapter_config.json may say, and whether an adapter belongs to a base."""

import math
from typing import Any

import pytest

from inference_service.checkpoints.adapter_config import (
    adapter_config,
    engine_rank,
    why_malformed,
    why_not_of,
)
from inference_service.checkpoints.safetensors import Tensor
from inference_service.checkpoints.serving_config import Serving
from inference_service.checkpoints.swap_key import swap_key

PLAIN: dict[str, Any] = {"peft_type": "LORA", "r": 8, "base_model_name_or_path": "org/base"}


def tensor(*shape: int, dtype: str = "BF16") -> Tensor:
    return Tensor(dtype, shape, 0, 2 * math.prod(shape))


def test_a_plain_adapter() -> None:
    found = adapter_config(PLAIN | {"rank_pattern": {"q_proj": 32}, "use_rslora": True})
    assert (found.rank, found.base, found.problem) == (32, "org/base", None)


@pytest.mark.parametrize(
    "content",
    [
        {"r": -1},
        {"r": 0},
        {"r": True},
        {"r": 10**9},
        {"r": float("nan")},
        {"rank_pattern": [1]},
        {"rank_pattern": {"q": "8"}},
        {"use_dora": True},
        {"bias": "lora_only"},
        {"init_lora_weights": "pissa"},
        {"peft_type": ["LORA"]},
        {"modules_to_save": ["lm_head"]},
    ],
)
def test_what_cannot_be_served(content: dict[str, Any]) -> None:
    problem = adapter_config(PLAIN | content).problem
    assert problem is not None
    assert problem.startswith("adapter_config.json:")


@pytest.mark.parametrize(
    ("rank", "limit", "expected"),
    [(0, None, 0), (4, None, 16), (17, None, 32), (512, None, 512), (0, 64, 64), (8, 64, 64)],
)
def test_the_rank_of_an_engine(rank: int, limit: int | None, expected: int) -> None:
    assert engine_rank(rank, limit) == expected


BASE = {"model.layers.0.self_attn.q_proj.weight": tensor(576, 640)}
A = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
B = "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"


def test_an_adapter_of_its_base() -> None:
    assert why_not_of("base", {A: tensor(8, 640), B: tensor(576, 8)}, BASE) is None


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ({A: tensor(8, 576), B: tensor(576, 8)}, "another base"),
        ({A: tensor(8, 640), B: tensor(640, 8)}, "another base"),
        ({A.replace("layers.0", "layers.9"): tensor(8, 640)}, "does not have"),
        ({A.replace("lora_A", "lora_magnitude_vector"): tensor(8, 640)}, "DoRA"),
        ({"model.weight": tensor(8, 640)}, "is not a LoRA weight"),
        ({}, "no tensor"),
    ],
)
def test_an_adapter_of_something_else(tensors: dict[str, Tensor], words: str) -> None:
    assert words in str(why_not_of("base", tensors, BASE))


@pytest.mark.parametrize(
    ("config", "tensors", "words"),
    [
        ({"r": 8}, {A: tensor(8, 640), B: tensor(576, 8)}, None),
        ({"r": 8, "rank_pattern": {"x": 16}}, {A: tensor(8, 640), B: tensor(576, 8)}, None),
        ({"r": 4}, {A: tensor(8, 640), B: tensor(576, 8)}, "says 4"),
        ({"r": 16}, {A: tensor(8, 640), B: tensor(576, 8)}, "says 16"),
        ({"r": 4, "rank_pattern": {"x": 6}}, {A: tensor(8, 640), B: tensor(576, 8)}, "says 6"),
        ({"r": 8}, {A: tensor(8, 640), B: tensor(576, 4)}, "rank 4"),
        ({"r": 8}, {A: tensor(8, 640)}, "lora_B"),
        ({"r": 8}, {B: tensor(576, 8)}, "lora_A"),
    ],
)
def test_tensors_are_those_that_the_config_tells_of(
    config: dict[str, Any], tensors: dict[str, Tensor], words: str | None
) -> None:
    found = why_malformed(adapter_config(config), tensors)
    assert found is None if words is None else words in str(found)


CONFIG = {"architectures": ["LlamaForCausalLM"], "hidden_size": 64}


def key(config: dict[str, Any] | None = None, **more: Any) -> str | None:
    given: dict[str, Any] = {
        "tensors": BASE,
        "serving": Serving(),
        "vocabulary": {"tokenizer.json": 1},
    } | more
    return swap_key(CONFIG | (config or {}), **given)


def test_names_and_versions_are_no_part_of_the_swap_key() -> None:
    assert key() == key({"_name_or_path": "x", "transformers_version": "9"}) is not None


def test_whatever_cannot_change_in_a_live_engine_is() -> None:
    keys = [
        key(),
        key({"hidden_size": 128}),
        key({"eos_token_id": 7}),
        key(tensors={"model.layers.0.self_attn.q_proj.weight": tensor(576, 641)}),
        key(tensors={"model.layers.0.self_attn.q_proj.weight": tensor(576, 640, dtype="F32")}),
        key(serving=Serving(max_model_len=10)),
        key(vocabulary={"tokenizer.json": 2}),
    ]
    assert len(set(keys)) == len(keys)


@pytest.mark.parametrize(
    "config",
    [
        {"quantization_config": {"bits": 4}},
        {"num_experts": 8},
        {"num_local_experts": 8},
        {"vision_config": {"x": 1}},
        {"layer_types": ["full_attention", "linear_attention"]},
        {"layer_types": ["mamba"]},
    ],
)
def test_what_is_not_dense_and_plain_is_loaded_afresh(config: dict[str, Any]) -> None:
    assert key(config) is None
    assert key(serving=Serving(quantization="fp8")) is None
    assert key(tensors={"w": tensor(2, 2, dtype="I8")}) is None


def test_a_config_of_an_older_transformers_is_the_same() -> None:
    old = {"torch_dtype": "bfloat16", "rope_theta": 10000.0, "rope_scaling": None, "pad_token_id": 0}
    new = {"dtype": "bfloat16", "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}
    assert key(old) == key(new)
    assert key(old) != key(old | {"rope_theta": 500000.0})
    assert key({"layer_types": 5}) is None
