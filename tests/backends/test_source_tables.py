"""vLLM's own tables, read without importing it, are what vLLM says when it is imported."""

import re

from inference_service.backends import source_tables
from tests.fixtures.pinned_vllm import PinnedVllm


def test_parsers_and_quantisations(pinned_vllm: PinnedVllm) -> None:
    said = pinned_vllm.names
    assert sorted(source_tables.tool_parsers() or []) == said["tool_parsers"]
    assert sorted(source_tables.reasoning_parsers() or []) == said["reasoning_parsers"]
    assert sorted(source_tables.quantizations() or []) == said["quantizations"]


def test_architectures(pinned_vllm: PinnedVllm) -> None:
    said = pinned_vllm.names
    known = source_tables.architectures()
    assert known is not None
    generative = {name for name in said["architectures"] if name.endswith("ForCausalLM")}
    # Draft models are no models of their own.
    drafts = {name for name in generative if re.search("[Ee]agle|MTP|DFlash", name)}
    assert generative - drafts - known == set()
    assert "LlamaForCausalLM" in known
    assert "NobodysForCausalLM" not in known


def test_another_release_is_not_guessed_at() -> None:
    assert source_tables._table("vllm", "no/such/file.py", "X") is None
    assert source_tables._table("vllm", "tool_parsers/__init__.py", "_NO_SUCH_TABLE") is None
    assert source_tables._table("no_such_package", "x.py", "X") is None
