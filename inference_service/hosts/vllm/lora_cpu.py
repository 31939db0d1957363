"""LoRA on the CPU, right and fast: in the place of vLLM's PyTorch-native wrapper (vllm/lora/punica_wrapper).

Its kernels take -1, which means "no adapter", for an index: once all slots are in use a request without an
adapter is answered with the last slot's. And they copy an adapter's matrices once for each token. Here it is
found out once a step which tokens are whose (lora_batch.py).
"""

from typing import Any

from torch import Tensor
from vllm.lora.punica_wrapper import punica_cpu

from inference_service.hosts.vllm.lora_batch import Batch


def _matrices(stacked: Tensor, outputs: int | None = None) -> Tensor:
    """vLLM's stack without its dimension of one; no more outputs than there are: either may be padded."""
    matrices = stacked.squeeze(1) if stacked.dim() == 4 else stacked
    return matrices if outputs is None else matrices[:, :outputs]


class GroupedPunicaWrapper(punica_cpu.PunicaWrapperCPU):  # type: ignore[misc]
    """vLLM's wrapper, whose layers call it once each with the stacked matrices of all slots."""

    _tokens = _samples = Batch(())

    def update_metadata(self, *args: Any, **kwargs: Any) -> None:
        """Called with each batch that has other tokens than the one before."""
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
        """To the outputs of a linear layer, of one or several projections side by side."""
        begin = 0
        for down, up, width in zip(lora_a_stacked, lora_b_stacked, output_slices, strict=True):
            _add(self._tokens, y[:, begin : begin + width], x, (down, up), scale)
            begin += width

    def add_lora_embedding(
        self, y: Tensor, x: Tensor, lora_b_stacked: Tensor, add_inputs: bool = True, **kwargs: Any
    ) -> None:
        """To embeddings; `x` is what the first matrix has made of the tokens."""
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
        """To the logits."""
        logits = y.view(-1, y.shape[-1])
        _add(self._samples, logits, x.view(-1, x.shape[-1]), (lora_a_stacked, lora_b_stacked), scale)


def _add(batch: Batch, y: Tensor, x: Tensor, stacks: tuple[Tensor, ...], scale: float) -> None:
    *downs, up = stacks
    chain = [*map(_matrices, downs), _matrices(up, y.shape[1])]
    batch.add(y[:, : chain[-1].shape[1]], x, chain, scale)


def install() -> None:
    """Let vLLM use it: its platform names the class."""
    punica_cpu.PunicaWrapperCPU = GroupedPunicaWrapper
