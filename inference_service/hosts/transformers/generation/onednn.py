"""Linear layers on the CPU with weights packed in oneDNN's layout, which is two to three times as fast.

Without its compiler, PyTorch packs the weights for every product. These are the operators that the compiler
uses (torch/_inductor/fx_passes/mkldnn_fusion.py). If a build lacks them, the layers are not changed.
"""

from typing import Any

import torch
from torch import nn

from inference_service.hosts.transformers.generation.malloc import layers_one_by_one


class PackedLinear(nn.Linear):  # type: ignore[misc]
    """For inference. A subclass of nn.Linear, so that PEFT can add an adapter to it."""

    def __init__(self, layer: Any) -> None:
        super().__init__(layer.in_features, layer.out_features, bias=False, device="meta")
        # A placeholder: other code reads its type and device.
        self.weight = nn.Parameter(torch.empty(0, dtype=layer.weight.dtype), requires_grad=False)
        self.bias = layer.bias
        self.packed = torch.ops.mkldnn._reorder_linear_weight(layer.weight.detach(), None)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        flat = rows.reshape(-1, self.in_features)
        found = torch.ops.mkldnn._linear_pointwise(flat, self.packed, self.bias, "none", [], "")
        return found.reshape(*rows.shape[:-1], self.out_features)


def pack(model: Any) -> None:
    """Pack every linear layer of `model` and its output layer, but not embeddings."""
    if not can_pack(model.dtype):
        return
    for path, layer in layers_one_by_one(model, nn.Linear):
        model.set_submodule(path, PackedLinear(layer))


def drop_packed(model: Any) -> None:
    """Free the packed weights. The model is unusable until `take_packed`."""
    for layer in model.modules():
        if isinstance(layer, PackedLinear):
            layer.packed = None


def take_packed(model: Any, fresh: Any) -> None:
    """Move the packed weights of `fresh` into `model`, which has the same architecture."""
    for path, layer in fresh.named_modules():
        if isinstance(layer, PackedLinear):
            model.get_submodule(path).packed = layer.packed


def can_pack(dtype: torch.dtype) -> bool:
    """Whether this PyTorch supports packed products of `dtype` on this CPU. Tries a small one."""
    layer = nn.Linear(32, 32, bias=False, dtype=dtype)
    rows = torch.ones(2, 32, dtype=dtype)
    try:
        with torch.no_grad():
            return bool(torch.allclose(PackedLinear(layer)(rows), layer(rows), rtol=0.05, atol=0.05))
    except (AttributeError, RuntimeError, NotImplementedError):
        return False
