"""Models of random weights, made where they are measured: sizes and speeds are real, the text is noise.

Two seeds of a kind are two fine-tunes of one architecture. Nothing is downloaded, the tokenizer included.
"""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    PretrainedConfig,
    PreTrainedTokenizerFast,
    Qwen3Config,
)

RANK = 16
SHARD = "5GB"


@dataclass(frozen=True)
class Size:
    """`large` is what weights are moved of, `medium` what everything else runs on."""

    vocabulary: int
    large: dict[str, int]
    medium: dict[str, int]
    llama: dict[str, int]


FULL = Size(
    49_152,
    {"hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36, "num_attention_heads": 32},
    {"hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 16, "num_attention_heads": 16},
    {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32},
)
SMALL = Size(
    4_096,
    {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 6, "num_attention_heads": 4},
    {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 4},
    {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 4},
)


@dataclass(frozen=True)
class Models:
    """The names of the models in `bucket`.

    `large` are two fine-tunes, `tied` two with tied embeddings; `projections` differs from `base` in q_proj
    and v_proj, `adapters` are of `base`, `other` is of another architecture.
    """

    bucket: Path
    large: tuple[str, str] = ("large-1", "large-2")
    tied: tuple[str, str] = ("tied-1", "tied-2")
    base: str = "base"
    projections: str = "projections"
    adapters: tuple[str, str] = ("adapter-1", "adapter-2")
    other: str = "other"


def make(bucket: Path, size: Size) -> Models:
    """Make all of them; on the GPU if there is one."""
    models = Models(bucket)
    tokenizer = _tokenizer(size.vocabulary)
    for seed, name in enumerate(models.large, 1):
        _checkpoint(_path(models, name), tokenizer, _qwen(size, size.large), seed)
    for seed, name in enumerate(models.tied, 1):
        _checkpoint(_path(models, name), tokenizer, _qwen(size, size.medium, tied=True), seed)
    base = _qwen(size, size.medium)
    _checkpoint(_path(models, models.base), tokenizer, base, 1)
    _projections(_path(models, models.base), _path(models, models.projections))
    llama = LlamaConfig(**size.llama, num_key_value_heads=4, **_common(size), tie_word_embeddings=False)
    _checkpoint(_path(models, models.other), tokenizer, llama, 1)
    for seed, name in enumerate(models.adapters, 1):
        _adapter(_path(models, name), models.base, base, seed)
    return models


def _path(models: Models, name: str) -> Path:
    return models.bucket / "models" / name


def _common(size: Size) -> dict[str, int]:
    tokens = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
    return {"vocab_size": size.vocabulary, "max_position_embeddings": 8192, **tokens}


def _qwen(size: Size, shape: dict[str, int], *, tied: bool = False) -> PretrainedConfig:
    heads = {"num_key_value_heads": shape["num_attention_heads"] // 2, "head_dim": 128}
    return Qwen3Config(**shape, **heads, **_common(size), tie_word_embeddings=tied)


def _checkpoint(target: Path, tokenizer: Any, config: PretrainedConfig, seed: int) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.to_empty(device=device)
    generator = torch.Generator(device).manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.data.fill_(1)
        else:
            spread = 0.05 if "embed" in name or "lm_head" in name else 0.03
            parameter.data.normal_(0, spread, generator=generator)
    model.tie_weights()
    model.save_pretrained(target, max_shard_size=SHARD)
    tokenizer.save_pretrained(target)


def _projections(base: Path, target: Path) -> None:
    shutil.copytree(base, target)
    for file in target.glob("*.safetensors"):
        tensors = load_file(file)
        for name in tensors:
            if "q_proj" in name or "v_proj" in name:
                tensors[name] = tensors[name].roll(1, 0)
        save_file(tensors, file, {"format": "pt"})


def _adapter(target: Path, base: str, config: PretrainedConfig, seed: int) -> None:
    outputs = {
        "q_proj": config.num_attention_heads * config.head_dim,
        "v_proj": config.num_key_value_heads * config.head_dim,
    }
    generator, tensors = torch.Generator().manual_seed(seed), {}
    for layer in range(config.num_hidden_layers):
        for name, output in outputs.items():
            prefix = f"base_model.model.model.layers.{layer}.self_attn.{name}"
            for part, shape in (("A", (RANK, config.hidden_size)), ("B", (output, RANK))):
                weights = torch.randn(shape, generator=generator)
                tensors[f"{prefix}.lora_{part}.weight"] = 0.2 * weights
    target.mkdir(parents=True)
    save_file(tensors, target / "adapter_model.safetensors")
    about = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": RANK,
        "lora_alpha": RANK,
        "bias": "none",
        "target_modules": list(outputs),
    }
    (target / "adapter_config.json").write_text(json.dumps(about))


def _tokenizer(vocabulary: int) -> PreTrainedTokenizerFast:
    """Bytes, and for every other id a word of its own, so that any two answers are told apart."""
    tokens = ["<pad>", "<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokens += [f"Ġw{number}" for number in range(vocabulary - len(tokens))]
    tokenizer = Tokenizer(BPE({token: number for number, token in enumerate(tokens)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)
    fast.chat_template = (
        "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
    )
    return fast
