"""Which tensors a swap must copy. Pure."""

from collections.abc import Mapping, Sequence

from inference_service.hosts.vllm.weights.mapped import Content


def changed(
    before: Mapping[str, Content], after: Mapping[str, Content], fused: Mapping[str, Sequence[str]]
) -> list[str]:
    """The tensors of each module of vLLM that has one whose bytes differ, or are not known to be equal.

    `fused`: names of the checkpoint's modules that vLLM keeps as one, by its name (`packed_modules_mapping`).
    """
    part_of = {part: whole for whole, parts in fused.items() for part in parts}
    equal = {name for name, content in after.items() if content.checksum and before.get(name) == content}
    dirty = {_module(name, part_of) for name in after if name not in equal}
    return [name for name in after if _module(name, part_of) in dirty]


def _module(tensor: str, part_of: Mapping[str, str]) -> str:
    """The module of vLLM that a tensor belongs to, named as the checkpoint names its parts."""
    parent, _, _ = tensor.rpartition(".")
    above, _, name = parent.rpartition(".")
    return f"{above}.{part_of.get(name, name)}"
