"""LoRA on the CPU, right and fast: in the place of vLLM's PyTorch-native kernels (vllm/lora/ops/torch_ops).

Those take -1, which means "no adapter", for an index: once all slots are in use a request without an adapter
is answered with the last slot's. And they copy an adapter's matrices once for each token. Here the tokens of
each adapter are multiplied together, and those of none are left alone.
"""

from collections.abc import Iterator

import torch
from torch import Tensor
from vllm.lora.ops.torch_ops import lora_ops
from vllm.lora.punica_wrapper import punica_cpu


def bgmv_shrink(
    inputs: Tensor, weights: Tensor, output: Tensor, indices: Tensor, scaling: float = 1.0
) -> None:
    """Tokens x inputs by slots x rank x inputs, into tokens x rank; zero for tokens without an adapter."""
    output.zero_()
    for rows, matrix in _groups(weights, indices, output.dtype):
        output[rows, : matrix.shape[0]] = scaling * (inputs[rows].to(output.dtype) @ matrix.T)


def bgmv_expand(
    inputs: Tensor, weights: Tensor, output: Tensor, indices: Tensor, add_inputs: bool = True
) -> None:
    """Tokens x rank by slots x outputs x rank, added to (or put into) tokens x outputs."""
    bgmv_expand_slice(inputs, weights, output, indices, 0, output.shape[1], add_inputs)


def bgmv_expand_slice(
    inputs: Tensor,
    weights: Tensor,
    output: Tensor,
    indices: Tensor,
    slice_offset: int,
    slice_size: int,
    add_inputs: bool = True,
) -> None:
    """As `bgmv_expand`, of some of the outputs."""
    part = output[:, slice_offset : slice_offset + slice_size]
    if not add_inputs:
        part.zero_()
    for rows, matrix in _groups(weights, indices, output.dtype):
        # Adapter and model may pad their outputs differently.
        common = min(matrix.shape[0], part.shape[1])
        product = inputs[rows, : matrix.shape[1]].to(output.dtype) @ matrix[:common].T
        part[rows, :common] += product


def _groups(weights: Tensor, indices: Tensor, dtype: torch.dtype) -> Iterator[tuple[Tensor, Tensor]]:
    """The tokens (their numbers) of each adapter in the batch, with its matrix."""
    matrices = weights.squeeze(dim=1) if weights.dim() == 4 else weights
    for slot in torch.unique(indices).tolist():
        if slot >= 0:
            yield (indices == slot).nonzero().squeeze(1), matrices[slot].to(dtype)


def install() -> None:
    """Let vLLM use these: its modules look the functions up by name at each call."""
    for module in (lora_ops, punica_cpu):
        for function in (bgmv_shrink, bgmv_expand, bgmv_expand_slice):
            setattr(module, function.__name__, function)
