"""Loads a checkpoint's weights into a new model, or into a live one with the same tensor shapes."""

import gc
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, GenerationConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from inference_service.hosts.transformers.generation.int8 import quantize
from inference_service.hosts.transformers.generation.malloc import give_back
from inference_service.hosts.transformers.generation.onednn import drop_packed, pack, take_packed


@dataclass(frozen=True)
class Placement:
    """Device and type of a model's weights. `spread`: over all CUDA devices, layer by layer.

    `device`: cpu, cuda, mps, or host (in main memory, to be copied to a device).
    """

    device: str
    dtype: str
    spread: bool = False
    int8: bool = False

    @property
    def is_exact(self) -> bool:
        """Whether all values have 32 bits; 8-bit weights are multiplied as 16 bits."""
        return self.dtype == "float32" and not self.int8


class MissingWeightsError(Exception):
    """A checkpoint lacks weights of its architecture."""


def load(directory: Path, place: Placement) -> Any:
    """A model of the checkpoint in `directory`, ready to run. Raises what transformers raises."""
    try:
        model = _read(directory, place, "sdpa")
    except ValueError as error:
        if "scaled_dot_product_attention" not in str(error):
            raise
        model = _read(directory, place, "eager")
    model.requires_grad_(requires_grad=False).eval()
    # `generate` would apply its defaults; engine.py applies the checkpoint's.
    model.generation_config = GenerationConfig()
    if place.int8:
        quantize(model)
    elif place.device == "cpu":
        pack(model)
    return model if place.spread or place.device == "host" else model.to(place.device)


def replace(model: Any, directory: Path, place: Placement) -> None:
    """Load the weights of the checkpoint in `directory` into `model`, which has the same architecture.

    If it raises, the model may hold a mixture of weights and is unusable.
    """
    if place.device == "cpu":
        _let_go(model)
    fresh = load(directory, place if place.device == "cpu" else Placement("host", place.dtype))
    # On the CPU the new tensors replace the old ones without a copy.
    model.load_state_dict(fresh.state_dict(), strict=True, assign=place.device == "cpu")
    take_packed(model, fresh)
    model.requires_grad_(requires_grad=False)
    del fresh
    gc.collect()
    give_back()


def _let_go(model: Any) -> None:
    """Keep only the shapes of the weights: old and new together would exceed the reserved memory."""
    for module in model.modules():
        for name, weight in list(module.named_parameters(recurse=False)):
            module.register_parameter(name, nn.Parameter(weight.to("meta"), requires_grad=False))
    drop_packed(model)
    give_back()


def _read(directory: Path, place: Placement, attention: str) -> Any:
    config = AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    kind = (
        AutoModelForCausalLM if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING else AutoModelForImageTextToText
    )
    model, loading = kind.from_pretrained(
        directory,
        dtype=getattr(torch, place.dtype),
        attn_implementation=attention,
        device_map="auto" if place.spread else None,
        use_safetensors=True,
        local_files_only=True,
        trust_remote_code=False,
        output_loading_info=True,
    )
    missing = sorted(loading["missing_keys"])
    if missing:
        # transformers would use random numbers instead.
        raise MissingWeightsError(
            f"the checkpoint lacks {len(missing)} of its weights, for example {missing[0]}"
        )
    return model
