"""What the launcher relies on, in the pinned vLLM and in itself."""

import subprocess
import sys
from types import SimpleNamespace

import pytest

from inference_service.engines import warmth
from inference_service.engines.vllm_names import modules_of
from tests.engines.conftest import PinnedVllm


def test_the_pinned_vllm_has_what_forked_hosts_rely_on_and_its_import_reaches_no_gpu(
    pinned_vllm: PinnedVllm,
) -> None:
    assert pinned_vllm.cold is None


def test_a_symbol_that_is_gone_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(warmth, "EXPECTED", {"json": ("dumps", "nobody_has_it")})
    assert warmth.why_unexpected() == "json has no nobody_has_it"
    monkeypatch.setattr(warmth, "EXPECTED", {"nobody.has.it": ("x",)})
    assert "nobody.has.it cannot be imported" in str(warmth.why_unexpected())


# In a process of its own: whatever other tests imported may have left a thread in this one.
ASK_WITH_A_THREAD = """
import threading
from inference_service.engines import warmth
print(warmth.why_cold("fake"))
threading.Thread(target=threading.Event().wait, daemon=True).start()
print(warmth.why_cold("fake"))
"""


def test_a_second_thread_makes_it_cold() -> None:
    told = subprocess.run(
        [sys.executable, "-c", ASK_WITH_A_THREAD], capture_output=True, text=True, check=True
    ).stdout
    assert told.splitlines() == ["None", "it has 2 threads, and a fork keeps one"]


def test_a_cuda_context_makes_it_cold(monkeypatch: pytest.MonkeyPatch) -> None:
    torch = SimpleNamespace(cuda=SimpleNamespace(is_initialized=lambda: True))
    monkeypatch.setitem(sys.modules, "torch", torch)
    assert warmth.why_cuda() == "it has a CUDA context"


def test_modules_of_architectures() -> None:
    assert modules_of(["LlamaForCausalLM", "NobodysForCausalLM"]) == ["vllm.model_executor.models.llama"]
