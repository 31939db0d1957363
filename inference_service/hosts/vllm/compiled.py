"""Compiled artefacts that all fine-tunes of one architecture share.

vLLM keys them by the whole model config, the directory of the weights and the sampling defaults included, and
by the name of the process, so each fine-tune would compile the same graph again: 42 s for 1B on an H200.
"""

import copy
from collections.abc import Callable
from typing import Any

import torch
from vllm import envs
from vllm.config import ModelConfig
from vllm.platforms import current_platform

# What differs between fine-tunes and is not part of the graph, with a value for all.
_OF_ONE_MODEL: dict[str, Any] = {
    "model": "",
    "model_weights": "",
    "revision": None,
    "code_revision": None,
    "generation_config": "auto",
    "override_generation_config": {},
}
# The same in config.json.
_OF_ONE_CONFIG = (
    *("_name_or_path", "transformers_version", "use_cache", "initializer_range", "pretraining_tp"),
    *("attention_dropout", "hidden_dropout", "output_attentions", "output_hidden_states", "return_dict"),
    *("pad_token_id", "unsloth_version", "unsloth_fixed"),
)


def share_artefacts() -> None:
    """Key compiled artefacts by the architecture. Call once in each process that compiles, before it does."""
    ModelConfig.compute_hash = _of_architecture(ModelConfig.compute_hash)
    envs.compile_factors = _of_any_process(envs.compile_factors)
    if current_platform.is_cpu():
        torch.compiler.load_compiled_function = _loadable(torch.compiler.load_compiled_function)


def _of_architecture(compute_hash: Callable[[Any], str]) -> Callable[[Any], str]:
    def compute(config: Any) -> str:
        common = copy.copy(config)
        values = _OF_ONE_MODEL | {
            name: _common(getattr(config, name)) for name in ("hf_config", "hf_text_config")
        }
        for name, value in values.items():
            object.__setattr__(common, name, value)
        return compute_hash(common)

    return compute


def _of_any_process(factors: Callable[[], dict[str, Any]]) -> Callable[[], dict[str, Any]]:
    def compile_factors() -> dict[str, Any]:
        return {name: value for name, value in factors().items() if name != "VLLM_PROCESS_NAME_PREFIX"}

    return compile_factors


def _common(config: Any) -> Any:
    """The transformers config without what differs between fine-tunes."""
    common = copy.deepcopy(config)
    for name in _OF_ONE_CONFIG:
        vars(common).pop(name, None)
    return common


def _loadable(load: Callable[..., Any]) -> Callable[..., Any]:
    """vLLM 0.32 calls a method that the function lacks which it saves on the CPU, and compiles again."""

    def load_compiled_function(*args: Any, **kwargs: Any) -> Any:
        loaded = load(*args, **kwargs)
        function = loaded._artifacts.compiled_fn
        if not hasattr(function, "finalize_loading"):
            function.finalize_loading = lambda config: None
        return loaded

    return load_compiled_function
