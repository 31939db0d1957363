"""Compiled artefacts are keyed by the architecture, not by the fine-tune."""

import json
import shutil
from typing import Any

import pytest

from tests.fixtures.checkpoints import base_checkpoint

pytestmark = pytest.mark.filterwarnings("ignore")  # vLLM's imports


@pytest.fixture(scope="module")
def key(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The key of a model with these changes to its config.json and with these arguments."""
    pytest.importorskip("vllm")
    from vllm.config import ModelConfig

    from inference_service.hosts.vllm.compiled import _of_architecture

    base = base_checkpoint()

    def of(changes: dict[str, Any], **arguments: Any) -> str:
        directory = tmp_path_factory.mktemp("model")
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(base / name, directory)
        config = json.loads((base / "config.json").read_text()) | changes
        (directory / "config.json").write_text(json.dumps(config))
        model = ModelConfig(model=str(directory), dtype="bfloat16", max_model_len=512, **arguments)
        return _of_architecture(ModelConfig.compute_hash)(model)

    return of


@pytest.mark.parametrize(
    ("changes", "arguments"),
    [
        pytest.param({}, {}, id="another directory"),
        pytest.param(
            {"_name_or_path": "me/mine", "transformers_version": "4.1.0"}, {}, id="where it was made"
        ),
        pytest.param({"use_cache": False, "pad_token_id": 3, "attention_dropout": 0.1}, {}, id="training"),
        pytest.param({}, {"override_generation_config": {"temperature": 0.3}}, id="sampling defaults"),
        pytest.param({}, {"served_model_name": "another"}, id="name"),
    ],
)
def test_fine_tunes_share_a_key(key: Any, changes: dict[str, Any], arguments: dict[str, Any]) -> None:
    assert key(changes, **arguments) == key({})


@pytest.mark.parametrize(
    "changes",
    [
        {"rms_norm_eps": 1e-3},
        {"num_hidden_layers": 29},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 5.0}},
        {"hidden_act": "gelu"},
    ],
)
def test_another_architecture_has_another_key(key: Any, changes: dict[str, Any]) -> None:
    assert key(changes) != key({})


def test_the_config_itself_stays_as_it_was(key: Any) -> None:
    from vllm.config import ModelConfig

    from inference_service.hosts.vllm.compiled import _of_architecture

    model = ModelConfig(model=str(base_checkpoint()), dtype="bfloat16", max_model_len=512)
    before = model.hf_config.to_json_string(use_diff=False)
    _of_architecture(ModelConfig.compute_hash)(model)
    assert model.model == str(base_checkpoint())
    assert model.hf_config.to_json_string(use_diff=False) == before
