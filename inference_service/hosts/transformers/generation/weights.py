"""A checkpoint's weights: into a fresh model, and into the live one of another checkpoint of its shapes."""

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
    """Where a model's weights go, and as what. `spread`: over all CUDA devices, layer by layer.

    `device`: cpu, cuda, mps, or host: in the machine's memory, on their way to a device.
    """

    device: str
    dtype: str
    spread: bool = False
    int8: bool = False

    @property
    def is_exact(self) -> bool:
        """All numbers have 32 bits; weights of 8 are multiplied as 16."""
        return self.dtype == "float32" and not self.int8


class MissingWeightsError(Exception):
    """A checkpoint does not hold every weight of its architecture."""


def load(directory: Path, place: Placement) -> Any:
    """A model of the checkpoint in `directory`, ready to run; raises what transformers raises."""
    try:
        model = _read(directory, place, "sdpa")
    except ValueError as error:
        if "scaled_dot_product_attention" not in str(error):
            raise
        model = _read(directory, place, "eager")
    model.requires_grad_(requires_grad=False).eval()
    # `generate` would take defaults from it; engine.py applies the checkpoint's.
    model.generation_config = GenerationConfig()
    if place.int8:
        quantize(model)
    elif place.device == "cpu":
        pack(model)
    return model if place.spread or place.device == "host" else model.to(place.device)


def replace(model: Any, directory: Path, place: Placement) -> None:
    """Put the weights of the checkpoint in `directory` into `model`, whose architecture is the same.

    Where it raises the model may be a mixture: it is of no use any more.
    """
    if place.device == "cpu":
        _let_go(model)
    fresh = load(directory, place if place.device == "cpu" else Placement("host", place.dtype))
    # On the CPU the new tensors themselves take the old ones' place: nothing is copied.
    model.load_state_dict(fresh.state_dict(), strict=True, assign=place.device == "cpu")
    take_packed(model, fresh)
    model.requires_grad_(requires_grad=False)
    del fresh
    gc.collect()
    give_back()


def _let_go(model: Any) -> None:
    """Leave the shapes of the weights only: the old and the new together would be more than was reserved."""
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
        # transformers would go on with random numbers in their place.
        raise MissingWeightsError(
            f"the checkpoint lacks {len(missing)} of its weights, among them {missing[0]}"
        )
    return model
