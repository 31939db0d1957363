"""Models with equal swap keys can replace each other in a running engine.

Pure. The key covers what cannot change while an engine runs. Weights, template, generation config and
sampling defaults are not part of it; a swap replaces them.
"""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from inference_service.checkpoints.safetensors import Tensor
from inference_service.checkpoints.serving_config import Serving

# The engine core keeps the tokenizer for structured outputs.
VOCABULARY = frozenset(
    {"tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "merges.txt", "tekken.json"}
)
# Keys that only matter for naming, training or display, and keys covered by other parts of the swap key.
_IGNORED = frozenset(
    {
        *("_name_or_path", "name_or_path", "transformers_version", "use_cache", "dtype", "torch_dtype"),
        *("initializer_range", "attention_dropout", "hidden_dropout", "pretraining_tp", "pad_token_id"),
        *("output_attentions", "output_hidden_states", "return_dict", "unsloth_version", "unsloth_fixed"),
        *("rope_theta", "rope_scaling", "rope_parameters"),
    }
)
_SERVED_ALIKE = (
    *("max_model_len", "dtype", "tool_call_parser", "reasoning_parser", "max_num_seqs", "kv_cache_gib"),
    *("tensor_parallel_size", "enable_prefix_caching"),
)
# Words in config.json keys of models with more than attention and dense layers: vLLM transforms such weights
# at load time, and loading other weights does not undo that.
_NOT_DENSE = ("expert", "vision", "audio", "mamba", "ssm", "linear_attn", "conv_kernel", "quantization")
_FLOATS = frozenset({"F32", "F16", "BF16"})


def swap_key(
    config: dict[str, Any],
    tensors: Mapping[str, Tensor],
    serving: Serving,
    vocabulary: Mapping[str, int],
) -> str | None:
    """None for a model that is always loaded into a new engine: anything but an unquantized dense model.

    `vocabulary`: crc32c of the tokenizer files by name.
    """
    if serving.quantization is not None or not _is_dense(config, tensors):
        return None
    parts = {
        "config": {key: value for key, value in config.items() if key not in _IGNORED and value is not None},
        "rope": _rope(config),
        "dtype": config.get("dtype") or config.get("torch_dtype"),
        "tensors": {name: [tensor.dtype, *tensor.shape] for name, tensor in tensors.items()},
        "serving": {key: getattr(serving, key) for key in _SERVED_ALIKE},
        "max_tokens": serving.sampling_defaults.max_tokens,
        "vocabulary": dict(vocabulary),
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def _rope(config: dict[str, Any]) -> dict[str, Any]:
    """Rotary embeddings in the format of transformers 5, also for configs written by transformers 4."""
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": config.get("rope_theta")}
    for key in ("rope_scaling", "rope_parameters"):
        found = config.get(key)
        rope |= found if isinstance(found, dict) else {}
    rope["rope_type"] = rope.pop("type", rope["rope_type"])
    return rope


def _is_dense(config: dict[str, Any], tensors: Mapping[str, Tensor]) -> bool:
    words = [key for key, value in config.items() if value not in (None, 0, False, [], {})]
    if any(word in key.lower() for key in words for word in _NOT_DENSE):
        return False
    layers = config.get("layer_types") or []
    if not isinstance(layers, list):
        return False
    attention = all("attention" in str(layer) and "linear" not in str(layer) for layer in layers)
    return attention and all(tensor.dtype in _FLOATS for tensor in tensors.values())
