"""Headers: those of a real file, and those that lie."""

import json
from pathlib import Path

import pytest

from inference_service.checkpoints.safetensors import BadHeader, Tensor, header_bytes, parse_header


def header(tensors: dict[str, object]) -> bytes:
    return json.dumps(tensors).encode()


def entry(dtype: str, shape: list[int], start: int, end: int) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


def test_a_real_file(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    from safetensors.torch import save_file

    tensors = {"a": torch.zeros(3, 4), "b": torch.zeros(5, dtype=torch.bfloat16), "c": torch.zeros(())}
    save_file(tensors, tmp_path / "m.safetensors", metadata={"format": "pt"})
    content = (tmp_path / "m.safetensors").read_bytes()
    length = header_bytes(content[:8], len(content))
    found = parse_header(content[8 : 8 + length], len(content))
    assert {name: (tensor.dtype, tensor.shape, tensor.bytes) for name, tensor in found.items()} == {
        "a": ("F32", (3, 4), 48),
        "b": ("BF16", (5,), 10),
        "c": ("F32", (), 4),
    }
    assert found["a"].elements == 12


def test_a_type_that_nobody_knows_yet_is_the_engines_to_judge() -> None:
    content = header({"a": entry("F3", [8], 0, 3)})
    assert parse_header(content, 8 + len(content) + 3) == {"a": Tensor("F3", (8,), 0, 3)}


@pytest.mark.parametrize(
    ("tensors", "extra", "words"),
    [
        ({"a": entry("F32", [2], 0, 8)}, -1, "cut off: 1 bytes are missing"),
        ({"a": entry("F32", [2], 0, 8)}, 3, "3 bytes that belong to no tensor"),
        ({"a": entry("F32", [2], 4, 12)}, 4, "does not begin after the header"),
        ({"a": entry("F32", [2], 0, 8), "b": entry("F32", [2], 4, 12)}, 4, "overlap or leave gaps"),
        ({"a": entry("F32", [3], 0, 8)}, 0, "cannot have 8 bytes"),
        ({"a": entry("F32", [-2], 0, 8)}, 0, "whole numbers"),
        ({"a": entry("F32", [2.0], 0, 8)}, 0, "whole numbers"),  # type: ignore[list-item]
        ({"a": {"dtype": "F32"}}, 0, "not valid"),
        ({"a": 1}, 0, "not valid"),
    ],
)
def test_a_header_that_lies(tensors: dict[str, object], extra: int, words: str) -> None:
    content = header(tensors)
    ends = [each["data_offsets"][1] for each in tensors.values() if isinstance(each, dict) and len(each) > 1]
    with pytest.raises(BadHeader, match=words):
        parse_header(content, 8 + len(content) + max(ends, default=0) + extra)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff", b"[" * 100_000])
def test_what_is_no_header(content: bytes) -> None:
    with pytest.raises(BadHeader):
        parse_header(content, 8 + len(content))


@pytest.mark.parametrize(
    ("first", "size"),
    [(b"", 0), (b"1234", 4), ((1000).to_bytes(8, "little"), 900), ((1 << 60).to_bytes(8, "little"), 1 << 61)],
)
def test_a_length_that_cannot_be(first: bytes, size: int) -> None:
    with pytest.raises(BadHeader):
        header_bytes(first, size)
