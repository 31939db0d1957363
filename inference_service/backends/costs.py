"""The memory that an engine takes besides weights and KV cache, by backend and device, as measured."""

from typing import NamedTuple

from inference_service.config import Backend
from inference_service.machine.device import DeviceKind

_MIB = 1 << 20


class Cost(NamedTuple):
    """Bytes besides weights and KV cache: per engine, per byte of weights (packed copies, activations), per
    byte of cache (what a step copies of it), and for prompts whose keys and values are not in the cache."""

    fixed: int
    per_weight: float = 0.0
    per_cache: float = 0.0
    prompts: int = 0


# vLLM on the CPU: measured with SmolLM2-135M in float32, 604 MiB at 513 MiB of weights, without the pages
# shared with the launcher. transformers on the CPU: 107 MiB after its start, 280 after the log
# probabilities of a prompt of 2,048 tokens, 400 after hundreds of grammars and prompts of full length. vLLM
# on CUDA: 2.15 GiB of the 2.18 that these numbers reserve, measured once (7.2B on an H200, docs/engines.md).
# MPS: not measured yet. A layer of transformers repeats the keys and values that it reads for every head,
# which is 0.11 to 0.14 of the cache in common architectures.
COSTS = {
    (Backend.VLLM, DeviceKind.CPU): Cost(544 * _MIB, 0.125),
    (Backend.VLLM, DeviceKind.CUDA): Cost(1536 * _MIB, 0.05),
    (Backend.TRANSFORMERS, DeviceKind.CPU): Cost(352 * _MIB, 0.0, 0.15, 1),
    (Backend.TRANSFORMERS, DeviceKind.MPS): Cost(768 * _MIB, 0.0, 0.15, 1),
    (Backend.TRANSFORMERS, DeviceKind.CUDA): Cost(1536 * _MIB, 0.05, 0.15, 1),
}


OTHER_COST = Cost(32 * _MIB)
