"""What a checkpoint says of itself beside its weights: defaults, ends of answers, lengths, sizes."""

from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig


def generation_config(directory: Path) -> GenerationConfig:
    """generation_config.json, or nothing at all."""
    if (directory / "generation_config.json").exists():
        return GenerationConfig.from_pretrained(directory, local_files_only=True)
    return GenerationConfig()


def sampling_defaults(generation: GenerationConfig) -> dict[str, Any]:
    """What the checkpoint wishes where a request is silent."""
    names = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
    given = generation.to_diff_dict()
    return {name: given[name] for name in names if given.get(name) is not None}


def stop_tokens(tokenizer: Any, generation: GenerationConfig, config: Any) -> frozenset[int]:
    """Tokens that end an answer, whichever file names them."""
    found: set[int] = set()
    for ids in (tokenizer.eos_token_id, generation.eos_token_id, config.get_text_config().eos_token_id):
        found.update([ids] if isinstance(ids, int) else ids or ())
    return frozenset(found)


def context(config: Any) -> int:
    """Tokens that the model's positions are for."""
    text = config.get_text_config()
    names = ("max_position_embeddings", "n_positions", "max_sequence_length", "seq_length")
    found = [getattr(text, name, None) for name in names]
    return next((int(length) for length in found if length), 1 << 20)


def token_bytes(config: Any, dtype: torch.dtype) -> int:
    """Keys and values of one token in all layers."""
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return int(config.num_hidden_layers * 2 * heads * width * torch.finfo(dtype).bits // 8)
