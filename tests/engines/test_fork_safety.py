"""What the launcher relies on, in the pinned vLLM and in itself."""

import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import pytest

from inference_service.backends.source_tables import modules_of
from inference_service.engines import fork_safety
from inference_service.machine.device import Device, DeviceKind
from tests.fixtures.installed import needs_vllm
from tests.fixtures.pinned_vllm import PinnedVllm


def test_the_pinned_vllm_has_what_forked_hosts_rely_on_and_its_import_reaches_no_gpu(
    pinned_vllm: PinnedVllm,
) -> None:
    assert pinned_vllm.cold is None
    assert pinned_vllm.missing == []


def test_a_symbol_that_is_gone_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fork_safety, "EXPECTED", {"json": ("dumps", "nobody_has_it")})
    assert fork_safety.why_unexpected() == "json has no nobody_has_it"
    monkeypatch.setattr(fork_safety, "EXPECTED", {"nobody.has.it": ("x",)})
    assert "nobody.has.it cannot be imported" in str(fork_safety.why_unexpected())


# In a process of its own: whatever other tests imported may have left a thread in this one.
ASK_WITH_A_THREAD = """
import threading
from inference_service.engines import fork_safety
print(fork_safety.why_cold("fake"))
threading.Thread(target=threading.Event().wait, daemon=True).start()
print(fork_safety.why_cold("fake"))
"""


def test_a_second_thread_makes_it_cold() -> None:
    told = subprocess.run(
        [sys.executable, "-c", ASK_WITH_A_THREAD], capture_output=True, text=True, check=True
    ).stdout
    assert told.splitlines() == ["None", "it has 2 threads, and a fork keeps one"]


def test_a_cuda_context_makes_it_cold(monkeypatch: pytest.MonkeyPatch) -> None:
    torch = SimpleNamespace(cuda=SimpleNamespace(is_initialized=lambda: True))
    monkeypatch.setitem(sys.modules, "torch", torch)
    assert fork_safety.why_cuda() == "it has a CUDA context"


@pytest.mark.parametrize(
    ("opened", "cold"),
    [
        ([], False),
        (["nvidiactl"], False),
        (["nvidiactl", "nvidia0", "nvidia-uvm"], True),
        (["nvidia-uvm-tools"], True),
    ],
)
def test_only_what_cuda_opens_makes_it_cold(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, opened: list[str], cold: bool
) -> None:
    monkeypatch.setattr(fork_safety, "DEVICES", tmp_path)
    files = [(tmp_path / name).open("w") for name in opened]
    try:
        found = fork_safety.why_cuda()
    finally:
        for file in files:
            file.close()
    assert (found is not None) is cold
    if found is not None:
        assert found == f"it has initialised CUDA ({tmp_path / opened[-1]} is open)"
    assert fork_safety.why_cuda() is None, "closed again"


@pytest.mark.parametrize("before", [None, "", "0", "2,3", "GPU-8932f937"])
def test_gpus_are_hidden_for_a_while(monkeypatch: pytest.MonkeyPatch, before: str | None) -> None:
    if before is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", before)
    with suppress(ZeroDivisionError), fork_safety.gpus_hidden():
        assert visible_to_a_child() == repr("")
        raise ZeroDivisionError
    assert visible_to_a_child() == repr(before)


def visible_to_a_child() -> str:
    """What the process's own environment holds, not Python's copy of it."""
    command = [sys.executable, "-c", "import os; print(repr(os.environ.get('CUDA_VISIBLE_DEVICES')))"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


@pytest.mark.parametrize(
    ("cuda", "triton", "cold"), [(True, False, True), (True, True, False), (False, False, False)]
)
def test_a_vllm_that_lost_triton_makes_it_cold(
    monkeypatch: pytest.MonkeyPatch, cuda: bool, triton: bool, cold: bool
) -> None:
    platforms = SimpleNamespace(current_platform=SimpleNamespace(is_cuda=lambda: cuda))
    monkeypatch.setitem(sys.modules, "vllm.platforms", platforms)
    importing = SimpleNamespace(HAS_TRITON=triton)
    monkeypatch.setitem(sys.modules, "vllm.triton_utils.importing", importing)
    assert (fork_safety.why_without_triton() is not None) is cold


def test_a_preload_that_unsets_the_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    with fork_safety.gpus_hidden():
        del os.environ["CUDA_VISIBLE_DEVICES"]
    assert visible_to_a_child() == "None"


def test_hosts_are_spawned_where_a_fork_would_know_another_gpu() -> None:
    gpu = Device(DeviceKind.CUDA, "NVIDIA L4")
    assert fork_safety.why_spawned(True, gpu) is None
    assert fork_safety.why_spawned(False, gpu) == "WARM_LAUNCHER is off"
    mixed = Device(DeviceKind.CUDA, "NVIDIA L4", like_first=False)
    assert "not all of one kind" in str(fork_safety.why_spawned(True, mixed))


@needs_vllm
def test_modules_of_architectures() -> None:
    assert modules_of(["LlamaForCausalLM", "NobodysForCausalLM"]) == ["vllm.model_executor.models.llama"]
