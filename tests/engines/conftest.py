"""What the pinned vLLM says of itself; it is imported once, in a process of its own."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass

import pytest

# As the launcher does it, with every way to CUDA closed: whatever reached for it would raise.
ASK_VLLM = """
import json
import torch
def refused(*_, **__):
    raise AssertionError("the launcher reached for CUDA")
torch._C._cuda_init = refused
torch.cuda._lazy_init = refused
from inference_service.engines import launcher_process, warmth
launcher_process.preload("vllm", "cpu")
cold = warmth.why_cold("vllm")
import importlib.util
wanted = {*launcher_process.PRELOAD["vllm"], *sum(launcher_process.PRELOAD_VLLM.values(), ())}
missing = sorted(name for name in wanted if importlib.util.find_spec(name) is None)
from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS
from vllm.model_executor.models.registry import ModelRegistry
from vllm.reasoning import ReasoningParserManager
from vllm.tool_parsers import ToolParserManager
print(json.dumps({"cold": cold, "missing": missing, "names": {
    "architectures": sorted(ModelRegistry.get_supported_archs()),
    "quantizations": sorted(QUANTIZATION_METHODS),
    "reasoning_parsers": sorted(ReasoningParserManager.list_registered()),
    "tool_parsers": sorted(ToolParserManager.list_registered()),
}}), flush=True)
"""


@dataclass(frozen=True)
class PinnedVllm:
    """`cold`: why hosts must not be forked from a process that has imported it; `missing`: modules that the
    launcher preloads in vain, for whatever device; `names`: its own tables."""

    cold: str | None
    missing: list[str]
    names: dict[str, list[str]]


@pytest.fixture(scope="session")
def pinned_vllm() -> PinnedVllm:
    environment = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "HF_HUB_OFFLINE": "1"}
    ended = subprocess.run(
        [sys.executable, "-c", ASK_VLLM],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr[-2000:]
    return PinnedVllm(**json.loads(ended.stdout.splitlines()[-1]))
