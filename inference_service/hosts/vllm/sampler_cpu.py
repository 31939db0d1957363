"""Log probabilities on the CPU from the first request on: without vLLM's compiled count of a token's rank.

Compiling that count takes seconds of the first request with log probabilities in each engine, which is the
weight check's, and saves a copy of the logits that a CPU has the memory for.
"""

from torch import Tensor
from vllm.v1.sample import sampler


def batched_count_greater_than(x: Tensor, values: Tensor) -> Tensor:
    """Of batch x vocabulary the number of elements in each row that reach its value (batch x 1): batch."""
    return (x >= values).sum(-1)


def install() -> None:
    """Let vLLM use it: the sampler looks the function up by name at each call."""
    sampler.batched_count_greater_than = batched_count_greater_than
