"""How long a request of a model may be."""

import json
from pathlib import Path
from typing import Any

import pytest

from inference_service.backends.transformers import transformers_arguments
from inference_service.backends.vllm import vllm_arguments
from inference_service.checkpoints.context_length import is_stretched, longest_request, positions
from inference_service.checkpoints.memory_profile import Footprint
from inference_service.checkpoints.serving_config import Serving
from inference_service.checkpoints.snapshot import Snapshot
from inference_service.config import Settings
from inference_service.machine.device import Device, DeviceKind


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"max_position_embeddings": 2048}, 2048),
        ({"n_positions": 1024}, 1024),
        ({"text_config": {"max_position_embeddings": 512}}, 512),
        ({"max_position_embeddings": 2048, "rope_scaling": {"type": "linear", "factor": 4.0}}, 8192),
        ({"max_position_embeddings": 2048, "rope_parameters": {"rope_type": "yarn", "factor": 4}}, 2048),
        (
            {"max_position_embeddings": 64, "rope_parameters": {"a": {"rope_type": "dynamic", "factor": 2}}},
            128,
        ),
        ({"max_position_embeddings": 64, "model_type": "gemma3", "rope_scaling": {"type": "linear"}}, 64),
        ({"max_position_embeddings": "many", "rope_scaling": ["none"]}, None),
        ({"max_position_embeddings": 64, "rope_scaling": {"type": "linear", "factor": float("nan")}}, 64),
        ({"max_position_embeddings": 8192, "model_max_length": 131072}, 131072),
        ({"max_position_embeddings": 10**400}, None),
        ({"max_position_embeddings": 64, "rope_scaling": {"rope_type": None, "factor": 4}}, 64),
        ({}, None),
    ],
)
def test_positions(config: dict[str, Any], expected: int | None) -> None:
    assert positions(config) == expected


def test_stretched_positions_are_told() -> None:
    assert is_stretched({"rope_scaling": {"type": "yarn"}})
    assert not is_stretched({"rope_parameters": {"rope_type": "default"}})


@pytest.mark.parametrize(
    ("config", "setting", "wish", "expected"),
    [
        ({"n_positions": 1024}, 8192, None, 1024),
        ({"n_positions": 1024}, 512, None, 512),
        ({"n_positions": 1024}, None, None, None),
        ({"n_positions": 1024}, 8192, 256, 256),
        ({}, 8192, None, 8192),
    ],
    ids=["fewer positions", "more positions", "no setting", "the model's own wish", "not told"],
)
def test_the_setting_goes_as_far_as_the_model(
    tmp_path: Path, config: dict[str, Any], setting: int | None, wish: int | None, expected: int | None
) -> None:
    settings, serving = Settings(max_model_len=setting), Serving(max_model_len=wish)
    assert longest_request(config, serving, settings.max_model_len) == expected
    (tmp_path / "config.json").write_text(json.dumps(config))
    snapshot = Snapshot("m", "0", tmp_path, 0, serving)
    device, footprint = Device(DeviceKind.CPU, "some"), Footprint(1, 1, 1)
    found = [
        list(arguments(settings, device, snapshot, footprint))
        for arguments in (vllm_arguments, transformers_arguments)
    ]
    told = [each[each.index("--max-model-len") + 1] if "--max-model-len" in each else None for each in found]
    assert told == [str(expected or "auto"), None if expected is None else str(expected)]
