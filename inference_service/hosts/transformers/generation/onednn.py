"""Linear layers of a CPU with their weights laid out as oneDNN multiplies them fastest: two to three times.

PyTorch packs them for each product, unless a compiler does it; these are the operators that its compiler
uses (torch/_inductor/fx_passes/mkldnn_fusion.py). Where a build lacks them, layers stay as they are.
"""

from typing import Any

import torch
from torch import nn

from inference_service.hosts.transformers.generation.malloc import layers_one_by_one


class PackedLinear(nn.Linear):  # type: ignore[misc]
    """For inference. A kind of nn.Linear, so that PEFT can put an adapter beside it."""

    def __init__(self, layer: Any) -> None:
        super().__init__(layer.in_features, layer.out_features, bias=False, device="meta")
        # Nothing to multiply with: what looks at it wants to know the type and the device.
        self.weight = nn.Parameter(torch.empty(0, dtype=layer.weight.dtype), requires_grad=False)
        self.bias = layer.bias
        self.packed = torch.ops.mkldnn._reorder_linear_weight(layer.weight.detach(), None)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        flat = rows.reshape(-1, self.in_features)
        found = torch.ops.mkldnn._linear_pointwise(flat, self.packed, self.bias, "none", [], "")
        return found.reshape(*rows.shape[:-1], self.out_features)


def pack(model: Any) -> None:
    """Every linear layer of `model` and its output layer; embeddings stay as they are."""
    if not can_pack(model.dtype):
        return
    for path, layer in layers_one_by_one(model, nn.Linear):
        model.set_submodule(path, PackedLinear(layer))


def drop_packed(model: Any) -> None:
    """Until `take_packed` the model cannot be used."""
    for layer in model.modules():
        if isinstance(layer, PackedLinear):
            layer.packed = None


def take_packed(model: Any, fresh: Any) -> None:
    """Put the packed weights of `fresh` into `model`, whose architecture is the same."""
    for path, layer in fresh.named_modules():
        if isinstance(layer, PackedLinear):
            model.get_submodule(path).packed = layer.packed


def can_pack(dtype: torch.dtype) -> bool:
    """Whether this PyTorch, on this processor, has packed products of `dtype`; tried with a small one."""
    layer = nn.Linear(32, 32, bias=False, dtype=dtype)
    rows = torch.ones(2, 32, dtype=dtype)
    try:
        with torch.no_grad():
            return bool(torch.allclose(PackedLinear(layer)(rows), layer(rows), rtol=0.05, atol=0.05))
    except (AttributeError, RuntimeError, NotImplementedError):
        return False
