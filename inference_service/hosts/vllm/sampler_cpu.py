"""Log probabilities on the CPU without compilation: replaces vLLM's compiled count of a token's rank.

Compiling it takes seconds of the first request with log probabilities in each engine, which is the weight
check, and only saves a copy of the logits, for which a CPU has the memory.
"""

from torch import Tensor
from vllm.v1.sample import sampler


def batched_count_greater_than(x: Tensor, values: Tensor) -> Tensor:
    """The number of elements in each row of `x` (batch x vocabulary) that reach its value (batch x 1)."""
    return (x >= values).sum(-1)


def install() -> None:
    """Make vLLM use it: the sampler looks the function up by name at each call."""
    sampler.batched_count_greater_than = batched_count_greater_than
