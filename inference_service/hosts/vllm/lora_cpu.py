"""Correct and fast LoRA on the CPU: replaces vLLM's PyTorch-native wrapper (vllm/lora/punica_wrapper).

The kernels of vLLM's wrapper use -1, which means "no adapter", as an index: once all slots are in use, a
request without an adapter is answered with the last slot's. They also copy an adapter's matrices for each
token. Here tokens are grouped by adapter once per step (lora_batch.py).
"""

from typing import Any

from torch import Tensor
from vllm.lora.punica_wrapper import punica_cpu

from inference_service.hosts.vllm.lora_batch import Batch


def _matrices(stacked: Tensor, outputs: int | None = None) -> Tensor:
    """vLLM's stack without its dimension of size 1, cut to `outputs`: stack and outputs may be padded."""
    matrices = stacked.squeeze(1) if stacked.dim() == 4 else stacked
    return matrices if outputs is None else matrices[:, :outputs]


class GroupedPunicaWrapper(punica_cpu.PunicaWrapperCPU):  # type: ignore[misc]
    """vLLM's wrapper; each layer calls it once, with the stacked matrices of all slots."""

    _tokens = _samples = Batch(())

    def update_metadata(self, *args: Any, **kwargs: Any) -> None:
        """Called for each batch whose tokens differ from those of the previous one."""
        super().update_metadata(*args, **kwargs)
        self._tokens = Batch(self.token_lora_indices.tolist())
        self._samples = Batch(self.sampler_indices.tolist())

    def add_lora_linear(
        self,
        y: Tensor,
        x: Tensor,
        lora_a_stacked: tuple[Tensor, ...],
        lora_b_stacked: tuple[Tensor, ...],
        scale: float,
        output_slices: tuple[int, ...],
        **kwargs: Any,
    ) -> None:
        """Add to the outputs of a linear layer, with one or more projections side by side."""
        begin = 0
        for down, up, width in zip(lora_a_stacked, lora_b_stacked, output_slices, strict=True):
            _add(self._tokens, y[:, begin : begin + width], x, (down, up), scale)
            begin += width

    def add_lora_embedding(
        self, y: Tensor, x: Tensor, lora_b_stacked: Tensor, add_inputs: bool = True, **kwargs: Any
    ) -> None:
        """Add to embeddings; `x` are the tokens after the first matrix."""
        _add(self._tokens, y, x, (lora_b_stacked,), 1.0)

    def add_lora_logits(
        self,
        y: Tensor,
        x: Tensor,
        lora_a_stacked: Tensor,
        lora_b_stacked: Tensor,
        scale: float,
        **kwargs: Any,
    ) -> None:
        """Add to the logits."""
        logits = y.view(-1, y.shape[-1])
        _add(self._samples, logits, x.view(-1, x.shape[-1]), (lora_a_stacked, lora_b_stacked), scale)


def _add(batch: Batch, y: Tensor, x: Tensor, stacks: tuple[Tensor, ...], scale: float) -> None:
    *downs, up = stacks
    chain = [*map(_matrices, downs), _matrices(up, y.shape[1])]
    batch.add(y[:, : chain[-1].shape[1]], x, chain, scale)


def install() -> None:
    """Make vLLM use it: its platform looks the class up by name."""
    punica_cpu.PunicaWrapperCPU = GroupedPunicaWrapper
