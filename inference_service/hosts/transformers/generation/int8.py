"""Weights of 8 bits on the CPU, one scale for each output; activations stay as they are.

Written here, because the libraries' are slower than no quantisation at all on a CPU without a compiler
(torchao), or cost a model of this size half of what it knows (PyTorch's dynamic one): docs/engines.md.
"""

from typing import Any

import torch
from torch import nn

from inference_service.hosts.transformers.generation.malloc import layers_one_by_one

# Up to so many rows PyTorch's kernel is faster than to widen the weights and multiply those.
KERNEL_ROWS = 16
_LARGEST = 127


class Int8Linear(nn.Linear):  # type: ignore[misc]
    """A linear layer for inference. `weight` int8 [out, in], `scale` [out] in the activations' type.

    A kind of nn.Linear, so that PEFT can put an adapter beside it.
    """

    def __init__(self, layer: Any) -> None:
        super().__init__(layer.in_features, layer.out_features, bias=False, device="meta")
        wide = layer.weight.detach().float()
        scale = wide.abs().amax(dim=1).clamp(min=torch.finfo(torch.float32).tiny) / _LARGEST
        narrow = (wide / scale.unsqueeze(1)).round().to(torch.int8)
        self.weight = nn.Parameter(narrow, requires_grad=False)
        self.bias = layer.bias
        self.register_buffer("scale", scale.to(layer.weight.dtype))

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        flat = rows.reshape(-1, self.in_features)
        if flat.shape[0] <= KERNEL_ROWS:
            # Its kernel for float32 is a plain loop.
            scale = self.scale.to(torch.bfloat16)
            found = torch._weight_int8pack_mm(flat.to(torch.bfloat16), self.weight, scale).to(rows.dtype)
        else:
            found = nn.functional.linear(flat, self.weight.to(rows.dtype)) * self.scale
        if self.bias is not None:
            found = found + self.bias
        return found.reshape(*rows.shape[:-1], self.out_features)


def quantize(model: Any) -> None:
    """Every linear layer of `model` and its output layer; embeddings stay as they are."""
    for path, layer in layers_one_by_one(model, nn.Linear):
        model.set_submodule(path, Int8Linear(layer))
