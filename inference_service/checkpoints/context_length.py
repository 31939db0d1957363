"""The longest request of a model in tokens, from config.json, serving.json and the settings. Pure."""

from collections.abc import Iterator
from typing import Any

from inference_service.checkpoints.serving_config import Serving

# The keys that architectures use; https://github.com/vllm-project/vllm (model_arch_config_convertor.py).
_POSITIONS = (
    *("max_position_embeddings", "n_positions", "max_seq_len", "seq_length", "model_max_length"),
    *("max_target_positions", "max_sequence_length", "max_seq_length", "seq_len"),
)
_MOST = 1 << 40
# For these, the positions already include the scaling; for others, multiply by `factor`.
_STRETCHED_ALREADY = frozenset(
    {"default", "su", "longrope", "llama3", "yarn", "deepseek_yarn", "deepseek_llama_scaling"}
)


def longest_request(config: dict[str, Any], serving: Serving, longest: int | None) -> int | None:
    """Tokens of prompt and completion together; None if the engine must determine it.

    The value in serving.json was checked against this model; MAX_MODEL_LEN applies to all models.
    """
    if serving.max_model_len is not None or longest is None:
        return serving.max_model_len
    return min(longest, positions(config) or longest)


def positions(config: dict[str, Any]) -> int | None:
    """The number of positions, including RoPE scaling; None if config.json does not say."""
    merged = config | (config.get("text_config") or {})
    counts = {name: merged.get(name) for name in _POSITIONS}
    found = {name: count for name, count in counts.items() if type(count) is int and 0 < count <= _MOST}
    if not found:
        return None
    # Command-R's model_max_length wins, its other keys are the training length; otherwise the smallest.
    trained = found.get("model_max_length") or min(found.values())
    stretched = [] if "gemma3" in str(merged.get("model_type")) else list(_factors(merged))
    return int(trained * max([1.0, *stretched]))


def is_stretched(config: dict[str, Any]) -> bool:
    """Whether RoPE scaling extends the positions beyond those of the training."""
    return any(kind != "default" for kind, _ in _ropes(config | (config.get("text_config") or {})))


def _factors(merged: dict[str, Any]) -> Iterator[float]:
    for kind, factor in _ropes(merged):
        if kind not in _STRETCHED_ALREADY and type(factor) in (int, float) and 1 <= factor <= 1024:
            yield float(factor)


def _ropes(merged: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Type and factor of each RoPE in the config; some models have one per layer type."""
    for name in ("rope_parameters", "rope_scaling"):
        given = merged.get(name)
        if isinstance(given, dict):
            nested = [each for each in given.values() if isinstance(each, dict)]
            for each in nested or [given]:
                yield str(each.get("rope_type") or each.get("type") or "default"), each.get("factor")
