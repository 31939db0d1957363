"""The memory that a model needs, computed from its safetensors headers and config.json."""

from dataclasses import dataclass
from typing import Any

from inference_service.checkpoints.context_length import longest_request, positions
from inference_service.checkpoints.safetensors import Tensor
from inference_service.checkpoints.serving_config import Serving
from inference_service.config import Backend, Settings
from inference_service.errors import readable_bytes
from inference_service.machine.device import Device, DeviceKind, resolve_dtype, tensor_parallel_size

_GIB = 1 << 30
_MOST = 1 << 40
_DTYPE_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
_FLOATS = frozenset({"F64", "F32", "F16", "BF16"})


@dataclass(frozen=True)
class Weights:
    """The tensors of all files by name, from their headers."""

    tensors: dict[str, Tensor]

    def bytes_as(self, dtype: str) -> int:
        """Bytes in memory after floats are converted to `dtype`; packed integers are unchanged."""
        return sum(
            tensor.elements * _DTYPE_BYTES[dtype] if tensor.dtype in _FLOATS else tensor.bytes
            for tensor in self.tensors.values()
        )


@dataclass(frozen=True)
class MemoryProfile:
    """Bytes of the weights as `dtype` and of one token in the KV cache, summed over all `gpus`.

    `context` is the longest request in tokens. It and `token_bytes` are 0 if config.json does not say.
    `kv_cache_bytes` is set by serving.json; `adapter_bytes` is the maximum per rank of a LoRA adapter.
    """

    dtype: str
    weights_bytes: int
    token_bytes: int = 0
    context: int = 0
    gpus: int = 1
    kv_cache_bytes: int | None = None
    adapter_bytes: int = 0


def memory_profile_of(
    config: dict[str, Any],
    serving: Serving,
    weights: Weights,
    settings: Settings,
    device: Device,
    backend: Backend,
) -> MemoryProfile:
    """The memory profile of a checkpoint as this service would load it on `device`."""
    merged = config | (config.get("text_config") or {})
    stored_dtype = merged.get("dtype") or merged.get("torch_dtype")
    dtype = serving.dtype or resolve_dtype(settings.dtype, device, backend, stored_dtype)
    kv_cache_gib = serving.kv_cache_gib
    return MemoryProfile(
        dtype=dtype,
        weights_bytes=weights.bytes_as(dtype) + _packed_head_bytes(merged, weights, dtype, device, backend),
        token_bytes=_token_bytes(merged, dtype),
        context=longest_request(merged, serving, settings.max_model_len) or positions(merged) or 0,
        gpus=serving.tensor_parallel_size or tensor_parallel_size(settings.tensor_parallel_size, device),
        kv_cache_bytes=None if kv_cache_gib is None else int(kv_cache_gib * _GIB),
        adapter_bytes=_DTYPE_BYTES[dtype] * sum(map(_sides, weights.tensors.values())),
    )


def _packed_head_bytes(
    config: dict[str, Any], weights: Weights, dtype: str, device: Device, backend: Backend
) -> int:
    """A second copy of tied embeddings: on the CPU, the output layer is packed for the processor."""
    packs = backend is Backend.TRANSFORMERS and device.kind is DeviceKind.CPU
    has_head = any(name.endswith(("lm_head.weight", "embed_out.weight")) for name in weights.tensors)
    if not packs or has_head or config.get("tie_word_embeddings") is False:
        return 0
    vocabulary = _number(config, "vocab_size")
    embeddings = (tensor for tensor in weights.tensors.values() if tensor.shape[:1] == (vocabulary,))
    return max((tensor.elements for tensor in embeddings), default=0) * _DTYPE_BYTES[dtype]


def _sides(tensor: Tensor) -> int:
    """Inputs plus outputs of a layer: a LoRA has a matrix for each."""
    return sum(tensor.shape) if len(tensor.shape) == 2 else 0


def memory_profile_of_fake(count: int, serving: Serving) -> MemoryProfile:
    """Counts each byte on disk as one in memory: ENGINE=fake is for trying out the service."""
    return MemoryProfile("", count, kv_cache_bytes=int((serving.kv_cache_gib or 0) * _GIB))


def _token_bytes(config: dict[str, Any], dtype: str) -> int:
    heads = _number(config, "num_attention_heads") or 1
    head_dim = _number(config, "head_dim") or _number(config, "hidden_size") // heads
    kv_heads = _number(config, "num_key_value_heads") or heads
    keys_and_values = 2
    return keys_and_values * _number(config, "num_hidden_layers") * kv_heads * head_dim * _DTYPE_BYTES[dtype]


def _number(config: dict[str, Any], key: str) -> int:
    """A count in config.json; 0 if missing or implausible."""
    value = config.get(key)
    return value if type(value) is int and 0 < value <= _MOST else 0


@dataclass(frozen=True)
class Footprint:
    """Bytes that one engine uses on each of its devices."""

    weights: int
    kv_cache: int
    overhead: int

    @property
    def total(self) -> int:
        return self.weights + self.kv_cache + self.overhead

    def __str__(self) -> str:
        return (
            f"{readable_bytes(self.total)} (weights {readable_bytes(self.weights)}, KV cache "
            f"{readable_bytes(self.kv_cache)}, overhead {readable_bytes(self.overhead)})"
        )
