"""8-bit weights on the CPU, with one scale per output; activations are not quantized.

Written here because the libraries' versions are slower than no quantization on a CPU without a compiler
(torchao), or cost a small model half of its quality (PyTorch's dynamic quantization): docs/engines.md.
"""

from typing import Any

import torch
from torch import nn

from inference_service.hosts.transformers.generation.malloc import layers_one_by_one

# Up to this number of rows, PyTorch's kernel is faster than widening the weights and multiplying.
KERNEL_ROWS = 16
_LARGEST = 127


class Int8Linear(nn.Linear):  # type: ignore[misc]
    """A linear layer for inference. `weight` int8 [out, in], `scale` [out] in the activations' type.

    A subclass of nn.Linear, so that PEFT can add an adapter to it.
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
            # The kernel for float32 is a plain loop.
            scale = self.scale.to(torch.bfloat16)
            found = torch._weight_int8pack_mm(flat.to(torch.bfloat16), self.weight, scale).to(rows.dtype)
        else:
            found = nn.functional.linear(flat, self.weight.to(rows.dtype)) * self.scale
        if self.bias is not None:
            found = found + self.bias
        return found.reshape(*rows.shape[:-1], self.out_features)


def quantize(model: Any) -> None:
    """Quantize every linear layer of `model` and its output layer, but not embeddings."""
    for path, layer in layers_one_by_one(model, nn.Linear):
        model.set_submodule(path, Int8Linear(layer))
