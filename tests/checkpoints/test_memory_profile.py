"""What a model takes in memory, from its headers and its config.json."""

from typing import Any

import pytest

from inference_service.checkpoints.memory_profile import Weights, memory_profile_of
from inference_service.checkpoints.safetensors import Tensor
from inference_service.checkpoints.serving_config import Serving
from inference_service.config import Backend, Settings
from inference_service.machine.device import Device, DeviceKind

CONFIG = {"vocab_size": 1000, "num_hidden_layers": 2, "num_attention_heads": 2}
EMBEDDINGS = {"model.embed_tokens.weight": Tensor("BF16", (1000, 8), 0, 16_000)}
HEAD = {"lm_head.weight": Tensor("BF16", (1000, 8), 0, 16_000)}


@pytest.mark.parametrize(
    ("tensors", "config", "backend", "kind", "expected"),
    [
        (EMBEDDINGS, {}, Backend.TRANSFORMERS, DeviceKind.CPU, 64_000),
        (EMBEDDINGS, {}, Backend.TRANSFORMERS, DeviceKind.MPS, 32_000),
        (EMBEDDINGS, {}, Backend.VLLM, DeviceKind.CPU, 32_000),
        (EMBEDDINGS, {"tie_word_embeddings": False}, Backend.TRANSFORMERS, DeviceKind.CPU, 32_000),
        (EMBEDDINGS | HEAD, {}, Backend.TRANSFORMERS, DeviceKind.CPU, 64_000),
    ],
    ids=["tied", "on MPS", "vllm", "of another name", "untied"],
)
def test_an_output_layer_that_is_packed_beside_the_embeddings_counts(
    tensors: dict[str, Tensor], config: dict[str, Any], backend: Backend, kind: DeviceKind, expected: int
) -> None:
    settings = Settings(dtype="float32", max_model_len=64)
    device = Device(kind, "some")
    found = memory_profile_of(CONFIG | config, Serving(), Weights(tensors), settings, device, backend)
    assert found.weights_bytes == expected
