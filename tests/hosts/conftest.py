"""Models of a few thousand weights, made of random numbers in a second, on the demo model's tokenizer."""

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoTokenizer, GPTNeoConfig, GPTNeoForCausalLM, LlamaConfig, LlamaForCausalLM

from inference_service.hosts.generation import attention
from inference_service.hosts.generation.engine import Engine, EngineOptions
from inference_service.hosts.generation.weights import Placement
from tests.fixtures.checkpoints import Checkpoints

CONTEXT = 512
VOCABULARY = 49_152


@dataclass(frozen=True)
class Tiny:
    """`other` has the shapes of `llama`, `adapters` are for it; `neo` is none that shares a batch."""

    llama: Path
    other: Path
    neo: Path
    adapters: tuple[Path, Path]


@pytest.fixture(scope="session")
def tiny(checkpoints: Checkpoints, tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    room = tmp_path_factory.mktemp("tiny")
    tokenizer = AutoTokenizer.from_pretrained(checkpoints.base)
    for number, name in enumerate(("llama", "other")):
        torch.manual_seed(number)
        LlamaForCausalLM(_llama()).save_pretrained(room / name)
    neo = GPTNeoConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        num_layers=2,
        num_heads=2,
        max_position_embeddings=CONTEXT,
        attention_types=[[["global", "local"], 1]],
        initializer_range=0.3,
        bos_token_id=1,
        eos_token_id=2,
    )
    GPTNeoForCausalLM(neo).save_pretrained(room / "neo")
    for name in ("llama", "other", "neo"):
        tokenizer.save_pretrained(room / name)
    return Tiny(room / "llama", room / "other", room / "neo", (_adapter(room, 1), _adapter(room, 2)))


def _llama() -> LlamaConfig:
    return LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT,
        initializer_range=0.3,
        bos_token_id=1,
        eos_token_id=2,
    )


def _adapter(room: Path, seed: int) -> Path:
    torch.manual_seed(seed)
    model = LlamaForCausalLM.from_pretrained(room / "llama")
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"], init_lora_weights=False)
    target = room / f"adapter-{seed}"
    get_peft_model(model, config).save_pretrained(target)
    return target


def options(**changed: Any) -> EngineOptions:
    """`int8`, and the fields of EngineOptions."""
    place = Placement("cpu", "float32", int8=changed.pop("int8", False))
    own: dict[str, Any] = {"cache_bytes": 4 << 20, "max_model_len": None, "sequences": 16}
    return EngineOptions(place, **(own | changed))


Start = Callable[..., Engine]


@pytest.fixture
def start() -> Iterator[Start]:
    """Engines that end with the test."""
    attention.install()
    begun: list[Engine] = []

    def start(directory: Path, **changed: Any) -> Engine:
        begun.append(Engine(directory, options(**changed)))
        return begun[-1]

    yield start
    for engine in begun:
        engine.close()
