"""Digests of the live model's weights, to compare an engine after a swap with a fresh one."""

import hashlib
from typing import Any

import torch
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.model_executor.model_loader.weight_checksum import compute_tensor_digests


def digests(model: Any) -> dict[str, str]:
    """vLLM's own digest of each parameter; on the CPU also of what each packed copy computes.

    There vLLM keeps the packed copy and drops the parameter's bytes. Names are those without LoRA.
    """
    parameters: dict[str, str] = compute_tensor_digests(model)
    packed = {
        f"{name}.packed": _product(module)
        for name, module in model.named_modules()
        if "cpu_linear" in vars(module) and _multiplies(module)
    }
    return {name.replace(".base_layer.", "."): digest for name, digest in (parameters | packed).items()}


def _multiplies(module: Any) -> bool:
    """Not embeddings, whose packed copy no request uses."""
    return isinstance(module, ParallelLMHead) or not isinstance(module, VocabParallelEmbedding)


def _product(module: Any) -> str:
    with torch.inference_mode():
        product = module.cpu_linear(_inputs(module), module.weight, getattr(module, "bias", None))
    return hashlib.sha256(product.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()


def _inputs(module: Any) -> torch.Tensor:
    """The same for every engine, and different in each column."""
    width = module.embedding_dim if isinstance(module, ParallelLMHead) else module.input_size_per_partition
    generator = torch.Generator().manual_seed(width)
    return torch.randn(4, width, generator=generator).to(module.weight.dtype)
