"""LoRA adapters: parses adapter_config.json and checks that an adapter fits its base.

Pure. Adapters that vLLM's peft_helper.py would reject at load time are rejected here, before anything is
downloaded, with a message for the client.
"""

from dataclasses import dataclass
from typing import Any

from inference_service.checkpoints.safetensors import Tensor

# The ranks that vLLM's kernels support (vllm.config.lora.MaxLoRARanks).
RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
# High enough that a base is not restarted for the next adapter of a common rank.
LEAST_RANK = 16
_PREFIX = "base_model.model."
_PLAIN_INITS = frozenset({"gaussian", "eva", "orthogonal", "mica", "lora_ga"})
# Key of adapter_config.json -> the feature that it requests; each must be empty or false.
_UNSUPPORTED = {
    "use_dora": "DoRA",
    "lora_bias": "LoRA bias",
    "modules_to_save": "fully trained layers besides the LoRA",
    "alora_invocation_tokens": "activated LoRA",
    "layer_replication": "layer replication",
    "use_bdlora": "block-diagonal LoRA",
    "use_qalora": "QALoRA",
    "trainable_token_indices": "trained token embeddings",
    "target_parameters": "LoRA on bare parameters",
}


@dataclass(frozen=True)
class AdapterConfig:
    """An adapter's highest rank, the base that it names, and why it cannot be served, if so."""

    rank: int
    base: str | None
    problem: str | None = None
    # None if ranks differ between modules.
    rank_of_all: int | None = None


def adapter_config(content: dict[str, Any]) -> AdapterConfig:
    """Parses the JSON object of adapter_config.json."""
    named = content.get("base_model_name_or_path")
    base = named if isinstance(named, str) and named else None
    pattern = content.get("rank_pattern") or {}
    ranks = [content.get("r", 8), *(pattern.values() if isinstance(pattern, dict) else [None])]
    if not all(type(rank) is int and rank > 0 for rank in ranks):
        return AdapterConfig(0, base, "adapter_config.json: r and rank_pattern must be positive integers.")
    problem = _why_unsupported(content) or _why_too_high(max(ranks))
    return AdapterConfig(max(ranks), base, problem, ranks[0] if len(ranks) == 1 else None)


def _why_unsupported(content: dict[str, Any]) -> str | None:
    kind, bias = content.get("peft_type", "LORA"), content.get("bias", "none")
    if kind != "LORA":
        return f"adapter_config.json: peft_type is {_shown(kind)}; only LoRA adapters are supported."
    if bias != "none":
        return f"adapter_config.json: bias is {_shown(bias)}; train the adapter with bias='none'."
    for key, what in _UNSUPPORTED.items():
        if content.get(key):
            return (
                f"adapter_config.json: {key} asks for {what}, which the engine does not support. "
                "Merge the adapter into its base."
            )
    init = content.get("init_lora_weights", True)
    if isinstance(init, str) and init.lower() not in _PLAIN_INITS:
        return (
            f"adapter_config.json: init_lora_weights is {_shown(init)}, which changes the base's weights. "
            "Merge the adapter into its base, or convert it to a plain LoRA with PEFT."
        )
    return None


def _why_too_high(rank: int) -> str | None:
    if rank <= RANKS[-1]:
        return None
    return f"adapter_config.json: rank {rank} exceeds the maximum of {RANKS[-1]}."


def engine_rank(rank: int, limit: int | None) -> int:
    """The rank that an engine is started with to take adapters of up to `rank`; 0 for no adapters.

    `limit`: max_lora_rank from the base's serving.json; if set, it is used as is.
    """
    if rank == 0 or limit is not None:
        return limit or 0
    return next(size for size in RANKS if size >= max(rank, LEAST_RANK))


def why_malformed(config: AdapterConfig, tensors: dict[str, Tensor]) -> str | None:
    """Why the tensors do not match the adapter's config; None if they do.

    The engine would scale by the rank in the config, or fail on a missing matrix.
    """
    for name, tensor in sorted(tensors.items()):
        module, lora, rest = name.rpartition(".lora_")
        if not lora or len(tensor.shape) != 2 or rest[:1] not in ("A", "B"):
            continue  # the comparison with the base reports it
        rank = tensor.shape[0 if rest[0] == "A" else 1]
        if rank > config.rank or (config.rank_of_all is not None and rank != config.rank_of_all):
            return f"its {_shown(name)} has rank {rank}, but adapter_config.json says {config.rank}."
        other = f"{module}.lora_{'B' if rest[0] == 'A' else 'A'}{rest[1:]}"
        if other not in tensors:
            return f"it has {_shown(name)} but not the matching {_shown(other)}."
    return None


def why_not_of(base: str, tensors: dict[str, Tensor], base_tensors: dict[str, Tensor]) -> str | None:
    """Why an adapter with `tensors` does not fit a base with `base_tensors`; None if it does."""
    for name, tensor in sorted(tensors.items()):
        module, _, kind = name.removeprefix(_PREFIX).rpartition(".lora_")
        if "magnitude" in name:
            return (
                f"it is a DoRA adapter ({_shown(name)}), which the engine does not support. "
                "Merge the adapter into its base."
            )
        if not module or len(tensor.shape) != 2:
            return f"its tensor {_shown(name)} is not a LoRA weight."
        weight = base_tensors.get(f"{module}.weight")
        if weight is None:
            return f"it modifies {_shown(module)}, which its base '{base}' does not have."
        # A: rank x inputs, B: outputs x rank, of a weight with outputs x inputs.
        side, dimension = ("inputs", 1) if kind.startswith("A") else ("outputs", 0)
        if len(weight.shape) != 2 or tensor.shape[dimension] != weight.shape[dimension]:
            return (
                f"it was trained on another base: its {_shown(name)} has {tensor.shape[dimension]} {side}, "
                f"but '{base}' has shape {list(weight.shape)} there."
            )
    return None if tensors else "it has no tensors."


def _shown(value: object) -> str:
    plain = str(value)
    plain = plain if plain.isprintable() else ascii(plain)
    return plain if len(plain) <= 100 else f"{plain[:100]}…"
