"""What a checkpoint declares besides its weights: sampling defaults, stop tokens, lengths, sizes."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig

# The widest ranges that make sense; those of a request are narrower.
_RANGES: dict[str, tuple[float, float]] = {
    "temperature": (0, 1000),
    "top_p": (0, 1),
    "top_k": (-1, 2**31 - 1),
    "min_p": (0, 1),
    "repetition_penalty": (0.01, 1000),
}


class BadCheckpointError(Exception):
    """A file of the checkpoint holds an invalid value. The message names the file and the field."""


@dataclass(frozen=True)
class Bounds:
    """Limits of a prompt: `tokens`, each less than `vocabulary`; `characters` of text."""

    vocabulary: int
    tokens: int
    characters: int


def generation_config(directory: Path) -> GenerationConfig:
    """generation_config.json, or an empty configuration if there is none."""
    if (directory / "generation_config.json").exists():
        return GenerationConfig.from_pretrained(directory, local_files_only=True)
    return GenerationConfig()


def sampling_defaults(generation: GenerationConfig) -> dict[str, Any]:
    """The checkpoint's defaults for parameters that a request omits. Raises BadCheckpointError."""
    given = generation.to_diff_dict()
    found = {name: given[name] for name in _RANGES if given.get(name) is not None}
    for name, value in found.items():
        least, most = _RANGES[name]
        if type(value) not in (int, float) or not least <= value <= most:
            raise BadCheckpointError(
                f"generation_config.json: {name} is {value!r}, it must be a number from {least} to {most}"
            )
    return found


def stop_tokens(tokenizer: Any, generation: GenerationConfig, config: Any, vocabulary: int) -> frozenset[int]:
    """Tokens that end an answer, collected from all files. Raises BadCheckpointError."""
    named = {
        "tokenizer_config.json": tokenizer.eos_token_id,
        "generation_config.json": generation.eos_token_id,
        "config.json": config.get_text_config().eos_token_id,
    }
    found: set[int] = set()
    for file, given in named.items():
        ids = given if isinstance(given, list) else [] if given is None else [given]
        if any(type(token) is not int for token in ids):
            raise BadCheckpointError(f"{file}: eos_token_id is {given!r}, it must be a token id")
        found.update(ids)
    return frozenset(token for token in found if 0 <= token < vocabulary)


def longest_token(tokenizer: Any) -> int:
    """Characters of the longest token."""
    return max(map(len, tokenizer.get_vocab()), default=1)


def context(config: Any) -> int:
    """Context length of the model, in tokens."""
    text = config.get_text_config()
    names = ("max_position_embeddings", "n_positions", "max_sequence_length", "seq_length")
    found = [getattr(text, name, None) for name in names]
    return next((int(length) for length in found if length), 1 << 20)


def token_bytes(config: Any, dtype: torch.dtype) -> int:
    """Bytes of the keys and values of one token in all layers."""
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return int(config.num_hidden_layers * 2 * heads * width * torch.finfo(dtype).bits // 8)
