"""The device's memory in bytes: how much each engine gets, so that one per slot fits, or as many as possible.

Pure arithmetic; machine/memory.py measures what is really free.
"""

from inference_service.backends.costs import COSTS, OTHER_COST
from inference_service.checkpoints.memory_profile import Footprint, MemoryProfile
from inference_service.config import Backend
from inference_service.machine.device import Device, DeviceKind

_MIB = 1 << 20
MIN_KV_CACHE_BYTES = 64 * _MIB
UNKNOWN_KV_CACHE_BYTES = 1024 * _MIB
FULL_LENGTH_REQUESTS = 4
# Of the memory; more engines than fit into it may sleep only where others leave room.
SLEEPERS_SHARE = 1 / 3
# What a request is taken to use of its context where as many engines as possible are to fit.
TYPICAL_TOKENS = 1024
# If memory is short, an unbounded context does not get its full KV cache.
ENOUGH_TOKENS = 4096


class Budget:
    """Bytes on each device for all engines; `total` None: unknown, and nothing is counted.

    `slots` None: as many engines as fit, each with the KV cache of `requests`; what they leave is free for
    the next. `sleepers`: engines that may sleep beside them.
    """

    def __init__(
        self,
        device: Device,
        backend: Backend,
        utilization: float,
        slots: int | None,
        adapters: int = 0,
        requests: int = 1,
        sleepers: int = 0,
    ) -> None:
        self.total = max(1, int(device.memory_bytes * utilization)) if device.memory_bytes else None
        self._touched_at_start = device.kind is not DeviceKind.CUDA
        self._cost = COSTS.get((backend, device.kind), OTHER_COST)
        self._slots = slots
        self._requests = requests
        self._adapters = adapters
        self.sleepers = sleepers

    def footprint(self, profile: MemoryProfile, adapter_rank: int = 0) -> Footprint:
        """What an engine with this profile gets on each of its devices, with room for adapters of that rank.

        An equal share if the model fits into one; else what it needs, and fewer engines fit together. Never
        more than `total`: every engine may be tried alone.
        """
        weights = profile.weights_bytes // profile.gpus
        overhead = self._kept(weights)
        prompt_bytes = min(profile.context, ENOUGH_TOKENS) * profile.token_bytes
        overhead += self._cost.prompts * prompt_bytes // profile.gpus
        overhead += self._adapters * adapter_rank * profile.adapter_bytes // profile.gpus
        kv_cache = self._kv_cache(profile, weights + overhead)
        overhead += int(kv_cache * self._cost.per_cache)
        if self.total is not None:
            overhead = max(0, min(overhead, self.total - weights - kv_cache))
        return Footprint(weights, kv_cache, overhead)

    def asleep_bytes(self, profile: MemoryProfile) -> int:
        """What an engine with this profile is expected to keep of each of its devices while it sleeps."""
        return self._kept(profile.weights_bytes // profile.gpus)

    def _for_sleepers(self) -> int:
        """As much for each that sleeps as any model that fits into a share would keep, within bounds."""
        if self.total is None or self._slots is None:
            return 0
        wanted = self.sleepers * self._kept(self.total // self._slots)
        return min(wanted, int(self.total * SLEEPERS_SHARE))

    def _kept(self, weights: int) -> int:
        return self._cost.fixed + int(weights * self._cost.per_weight)

    def _kv_cache(self, profile: MemoryProfile, others: int) -> int:
        if profile.kv_cache_bytes is not None:
            return profile.kv_cache_bytes // profile.gpus
        token_bytes = profile.token_bytes // profile.gpus
        wanted = token_bytes * profile.context * FULL_LENGTH_REQUESTS or UNKNOWN_KV_CACHE_BYTES
        if self.total is None:
            return max(MIN_KV_CACHE_BYTES, wanted)
        whole = self._cache_in(self.total - others)
        if self._slots is None:
            typical = 0 if self._touched_at_start else token_bytes * TYPICAL_TOKENS * self._requests
            return max(MIN_KV_CACHE_BYTES, min(max(wanted, typical), whole))
        share = self._cache_in((self.total - self._for_sleepers()) // self._slots - others)
        if share < max(MIN_KV_CACHE_BYTES, token_bytes * min(profile.context, ENOUGH_TOKENS)):
            return max(MIN_KV_CACHE_BYTES, min(wanted, whole))
        # On the CPU vLLM touches all of its cache at the start: only as much as a few requests can use.
        return max(MIN_KV_CACHE_BYTES, min(wanted, share)) if self._touched_at_start else share

    def _cache_in(self, room: int) -> int:
        """The KV cache that fits into `room`, with what it costs beside itself."""
        return int(room / (1 + self._cost.per_cache))
