"""vLLM's own tables, read without importing it, are what vLLM says when it is imported."""

import json
import re
import subprocess
import sys

import pytest

from inference_service.engines import vllm_names

ASK_VLLM = """
import json
from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS
from vllm.model_executor.models.registry import ModelRegistry
from vllm.reasoning import ReasoningParserManager
from vllm.tool_parsers import ToolParserManager
print(json.dumps({
    "architectures": sorted(ModelRegistry.get_supported_archs()),
    "quantizations": sorted(QUANTIZATION_METHODS),
    "reasoning_parsers": sorted(ReasoningParserManager.list_registered()),
    "tool_parsers": sorted(ToolParserManager.list_registered()),
}))
"""


@pytest.fixture(scope="module")
def said() -> dict[str, list[str]]:
    done = subprocess.run([sys.executable, "-c", ASK_VLLM], stdout=subprocess.PIPE, check=True, text=True)
    answer: dict[str, list[str]] = json.loads(done.stdout.splitlines()[-1])
    return answer


def test_parsers_and_quantisations(said: dict[str, list[str]]) -> None:
    assert sorted(vllm_names.tool_parsers() or []) == said["tool_parsers"]
    assert sorted(vllm_names.reasoning_parsers() or []) == said["reasoning_parsers"]
    assert sorted(vllm_names.quantizations() or []) == said["quantizations"]


def test_architectures(said: dict[str, list[str]]) -> None:
    known = vllm_names.architectures()
    assert known is not None
    generative = {name for name in said["architectures"] if name.endswith("ForCausalLM")}
    # Draft models are no models of their own.
    drafts = {name for name in generative if re.search("[Ee]agle|MTP|DFlash", name)}
    assert generative - drafts - known == set()
    assert "LlamaForCausalLM" in known
    assert "NobodysForCausalLM" not in known


def test_another_release_is_not_guessed_at() -> None:
    assert vllm_names._table("vllm", "no/such/file.py", "X") is None
    assert vllm_names._table("vllm", "tool_parsers/__init__.py", "_NO_SUCH_TABLE") is None
    assert vllm_names._table("no_such_package", "x.py", "X") is None
