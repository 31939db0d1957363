"""Whether two snapshots tokenize identically, so that a tokenizer built from one serves the other."""

from pathlib import Path

NAMES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("chat_template.jinja", "vocab.json", "merges.txt", "tokenizer.model", "config.json"),
)


def tokenize_alike(one: Path, other: Path) -> bool:
    """Compare the files that define the tokenizer, its chat template and its special tokens."""
    return all(_content(one / name) == _content(other / name) for name in NAMES)


def _content(file: Path) -> bytes | None:
    return file.read_bytes() if file.exists() else None
