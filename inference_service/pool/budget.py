"""The memory of the device in bytes: what each engine gets, so that as many as there are slots fit together.

Pure arithmetic; what is really free is measured by engines/memory.py.
"""

from typing import NamedTuple

from inference_service.engines.base import Footprint
from inference_service.engines.device import Backend, Device, DeviceKind
from inference_service.storage.shape import Shape

_MIB = 1 << 20
MIN_KV_CACHE_BYTES = 64 * _MIB
UNKNOWN_KV_CACHE_BYTES = 1024 * _MIB
FULL_LENGTH_REQUESTS = 4
# A context that nobody has bounded is not given room in full where room is short.
ENOUGH_TOKENS = 4096


class _Cost(NamedTuple):
    """Bytes beside weights and KV cache: of every engine, per byte of its weights (packed copies,
    activations), per byte of its cache (what a step copies of it), and prompts whose keys and values lie
    elsewhere."""

    fixed: int
    per_weight: float = 0.0
    per_cache: float = 0.0
    prompts: int = 0


# vLLM on the CPU: measured with SmolLM2-135M in float32, 604 MiB at 513 MiB of weights, the pages that it
# shares with the launcher left out. transformers on the CPU: 107 MiB as it starts, 280 after the log
# probabilities of a prompt of 2,048 tokens, 400 after hundreds of grammars and prompts of full length. vLLM
# on CUDA: 2.15 GiB of the 2.18 that these numbers reserve, seen once (7.2B on an H200, docs/engines.md).
# MPS: not measured yet. A layer of transformers repeats the keys and values that it reads for every head,
# which is 0.11 to 0.14 of the cache in common architectures.
_COSTS = {
    (Backend.VLLM, DeviceKind.CPU): _Cost(544 * _MIB, 0.125),
    (Backend.VLLM, DeviceKind.CUDA): _Cost(1536 * _MIB, 0.05),
    (Backend.TRANSFORMERS, DeviceKind.CPU): _Cost(352 * _MIB, 0.0, 0.15, 1),
    (Backend.TRANSFORMERS, DeviceKind.MPS): _Cost(768 * _MIB, 0.0, 0.15, 1),
    (Backend.TRANSFORMERS, DeviceKind.CUDA): _Cost(1536 * _MIB, 0.05, 0.15, 1),
}
_OTHER_COST = _Cost(32 * _MIB)


class Budget:
    """Bytes on each device for all engines; `total` None: not known, and nothing is counted."""

    def __init__(
        self, device: Device, backend: Backend, utilization: float, slots: int, adapters: int = 0
    ) -> None:
        self.total = max(1, int(device.memory_bytes * utilization)) if device.memory_bytes else None
        self._touched_at_start = device.kind is not DeviceKind.CUDA
        self._cost = _COSTS.get((backend, device.kind), _OTHER_COST)
        self._slots = slots
        self._adapters = adapters

    def footprint(self, shape: Shape, adapter_rank: int = 0) -> Footprint:
        """What an engine of this shape, with room for adapters of that rank, gets on each of its devices.

        An equal share where the model fits into one; else what it needs, and fewer engines fit together.
        Never more than `total`: alone, every engine may be tried.
        """
        weights = shape.weights_bytes // shape.gpus
        overhead = self._cost.fixed + int(weights * self._cost.per_weight)
        overhead += self._cost.prompts * min(shape.context, ENOUGH_TOKENS) * shape.token_bytes // shape.gpus
        overhead += self._adapters * adapter_rank * shape.adapter_bytes // shape.gpus
        kv_cache = self._kv_cache(shape, weights + overhead)
        overhead += int(kv_cache * self._cost.per_cache)
        if self.total is not None:
            overhead = max(0, min(overhead, self.total - weights - kv_cache))
        return Footprint(weights, kv_cache, overhead)

    def _kv_cache(self, shape: Shape, others: int) -> int:
        if shape.kv_cache_bytes is not None:
            return shape.kv_cache_bytes // shape.gpus
        token_bytes = shape.token_bytes // shape.gpus
        wanted = token_bytes * shape.context * FULL_LENGTH_REQUESTS or UNKNOWN_KV_CACHE_BYTES
        if self.total is None:
            return max(MIN_KV_CACHE_BYTES, wanted)
        rooms = (self.total // self._slots - others, self.total - others)
        share, whole = (int(room / (1 + self._cost.per_cache)) for room in rooms)
        if share < max(MIN_KV_CACHE_BYTES, token_bytes * min(shape.context, ENOUGH_TOKENS)):
            return max(MIN_KV_CACHE_BYTES, min(wanted, whole))
        # On the CPU vLLM touches all of its cache at the start: no more than a few requests can use.
        return max(MIN_KV_CACHE_BYTES, min(wanted, share)) if self._touched_at_start else share
