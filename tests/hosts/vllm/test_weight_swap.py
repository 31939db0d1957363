"""What a swap copies: the modules of vLLM that differ, whole, as views of the mapped files."""

from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from safetensors.torch import load_file, save_file  # noqa: E402

from inference_service.checkpoints.safetensors import BadHeader  # noqa: E402
from inference_service.checkpoints.tensor_checksums import TENSOR_CHECKSUMS, dump  # noqa: E402
from inference_service.hosts.vllm.weights.changed import changed  # noqa: E402
from inference_service.hosts.vllm.weights.mapped import Content, MappedWeights  # noqa: E402
from inference_service.hosts.vllm.weights.read_ahead import Ring  # noqa: E402
from inference_service.hosts.vllm.weights.source import WeightSource  # noqa: E402
from inference_service.storage.snapshots import checksums  # noqa: E402

FUSED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}
ATTENTION = [f"layers.0.attn.{part}_proj.weight" for part in "qkvo"]


def contents(**checksums: str | None) -> dict[str, Content]:
    """Tensors of layer 0's attention, all equal unless said otherwise."""
    return {name: Content("BF16", (2, 2), checksums.get(name.split(".")[3][0], "same")) for name in ATTENTION}


@pytest.mark.parametrize(
    ("before", "after", "copied"),
    [
        pytest.param(contents(), contents(), "", id="nothing differs"),
        pytest.param(contents(), contents(v="other"), "qkv", id="one of a fused module: all of it"),
        pytest.param(contents(), contents(o="other"), "o", id="a module of its own"),
        pytest.param(contents(k=None), contents(k=None), "qkv", id="unknown is not equal"),
        pytest.param({}, contents(), "qkvo", id="nothing known"),
        pytest.param(
            contents() | {ATTENTION[3]: Content("F16", (2, 2), "same")}, contents(), "o", id="another type"
        ),
    ],
)
def test_what_differs(before: dict[str, Content], after: dict[str, Content], copied: str) -> None:
    assert changed(before, after, FUSED) == [name for name in ATTENTION if name.split(".")[3][0] in copied]


def test_a_bias_comes_with_its_weight() -> None:
    names = [
        "layers.0.mlp.up_proj.weight",
        "layers.0.mlp.up_proj.bias",
        "layers.0.mlp.gate_proj.weight",
        "top",
    ]
    before = {name: Content("F32", (1,), "a") for name in names}
    after = before | {names[1]: Content("F32", (1,), "b")}
    assert changed(before, after, FUSED) == names[:3]
    assert changed(before, before | {"top": Content("F32", (1,), "b")}, FUSED) == ["top"]


@pytest.mark.parametrize("padding", [0, 1, 2, 3, 4])
def test_views_of_the_files_are_their_tensors(tmp_path: Path, padding: int) -> None:
    """Also where the header's length is odd."""
    tensors = {
        "a": torch.randn(3, 5).to(torch.bfloat16),
        "b": torch.randn(7),
        "c": torch.randn(2, 2, 2).half(),
        "empty": torch.empty(0, 4),
        "scalar": torch.tensor(1.5),
    }
    files = [tmp_path / "one.safetensors", tmp_path / "two.safetensors"]
    save_file({name: tensors[name] for name in ("a", "empty")}, files[0])
    save_file({name: tensors[name] for name in ("b", "c", "scalar")}, files[1])
    for file in files:
        pad(file, padding)
    weights = MappedWeights(tmp_path, files)
    assert weights.contents.keys() == tensors.keys()
    for name, tensor in tensors.items():
        view = weights.view(name)
        assert (view.dtype, view.shape) == (tensor.dtype, tensor.shape)
        assert torch.equal(view, tensor)
    assert weights.bytes(["a", "b"]) == 3 * 5 * 2 + 7 * 4


def pad(file: Path, count: int) -> None:
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = content[8 : 8 + length].rstrip() + b" " * count
    file.write_bytes(len(header).to_bytes(8, "little") + header + content[8 + length :])


def test_files_that_are_damaged_or_ambiguous(tmp_path: Path) -> None:
    one, two = tmp_path / "one.safetensors", tmp_path / "two.safetensors"
    for file in (one, two):
        save_file({"a": torch.ones(4)}, file)
    with pytest.raises(ValueError, match="a is in two files"):
        MappedWeights(tmp_path, [one, two])
    two.write_bytes(one.read_bytes()[:-1])
    with pytest.raises(BadHeader, match="1 bytes are missing"):
        MappedWeights(tmp_path, [two])


class Fused(torch.nn.Module):  # type: ignore[misc, name-defined, unused-ignore]
    """Two matrices of the checkpoint in one parameter, as in vLLM."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(4, 2), requires_grad=False)
        self.weight.weight_loader = self.load

    def load(self, param: Any, loaded_weight: Any, part: int) -> None:
        param.data[2 * part : 2 * part + 2].copy_(loaded_weight)


class Model(torch.nn.Module):  # type: ignore[misc, name-defined, unused-ignore]
    """`collects`: it takes all tensors before it loads the first."""

    def __init__(self, fused: dict[str, list[str]], *, collects: bool) -> None:
        super().__init__()
        self.mlp, self.norm = Fused(), torch.nn.Linear(2, 1, bias=False)
        self.packed_modules_mapping, self.collects = fused, collects
        self.loaded: list[str] = []

    def load_weights(self, weights: Iterable[tuple[str, Any]]) -> None:
        for name, tensor in list(weights) if self.collects else weights:
            self.loaded.append(name)
            if name == "norm.weight":
                self.norm.weight.weight_loader(self.norm.weight, tensor)
            else:
                self.mlp.weight.weight_loader(
                    self.mlp.weight, tensor, ("mlp.a.weight", "mlp.b.weight").index(name)
                )


def default_loader(param: Any, loaded_weight: Any) -> None:
    param.data.copy_(loaded_weight)


class Runner:
    """vLLM's model runner, as far as a swap uses it."""

    def __init__(self, model: Model) -> None:
        from vllm.config import LoadConfig
        from vllm.model_executor.model_loader.reload import layerwise

        self.model = model
        self.vllm_config = SimpleNamespace(
            model_config=SimpleNamespace(), load_config=LoadConfig("safetensors")
        )
        self._reload = layerwise
        layerwise.record_metadata_for_reloading(model)

    def get_model(self) -> Model:
        return self.model

    def reload_weights(self, weights_iterator: Iterable[tuple[str, Any]]) -> None:
        self._reload.initialize_layerwise_reload(self.model)
        self.model.load_weights(weights_iterator)
        self._reload.finalize_layerwise_reload(self.model, SimpleNamespace(dtype=torch.float32))

    def reset_lora_state(self) -> None:
        """There is none."""


def snapshot(directory: Path, **tensors: float) -> Path:
    directory.mkdir()
    file = directory / "model.safetensors"
    shapes = {"mlp.a.weight": (2, 2), "mlp.b.weight": (2, 2), "norm.weight": (1, 2)}
    save_file({name: torch.full(shape, tensors[name[-8]]) for name, shape in shapes.items()}, file)
    with file.open("rb") as opened:
        found = checksums.of_file(opened.fileno(), file.name, file.stat().st_size)
    (directory / TENSOR_CHECKSUMS).write_bytes(dump({file.name: found.tensors}))
    return directory


@pytest.mark.filterwarnings("ignore")  # vLLM's imports
@pytest.mark.parametrize("ring", [None, Ring(torch.empty(1000, dtype=torch.uint8))], ids=["mapped", "ring"])
@pytest.mark.parametrize(
    ("fused", "collects", "copied"),
    [
        pytest.param({"fused": ["a", "b"]}, False, 32, id="known"),
        pytest.param({}, False, 40, id="modules that vLLM fuses unknown to us"),
        pytest.param({"fused": ["a", "b"]}, True, 40, id="a model that cannot be checked"),
    ],
)
def test_no_module_gets_half_of_its_weights(
    tmp_path: Path, ring: Ring | None, fused: dict[str, list[str]], collects: bool, copied: int
) -> None:
    pytest.importorskip("vllm")
    from inference_service.hosts.vllm.weights.swap import swap

    source = WeightSource(torch.device("cpu"), ring=ring)
    before = snapshot(tmp_path / "before", a=1.0, b=2.0, m=3.0)
    after = snapshot(tmp_path / "after", a=1.0, b=5.0, m=3.0)
    model = Model(fused, collects=collects)
    model.norm.weight.weight_loader = default_loader
    runner = Runner(model)
    runner.reload_weights([(name, each) for name, each in load_file(before / "model.safetensors").items()])
    storage = model.mlp.weight.data_ptr()
    done = swap(runner, source, before, after)
    assert (done.copied_bytes, done.total_bytes) == (copied, 40)
    assert done.copied_from == {"mapped" if ring is None else "read_ahead": copied}
    assert model.mlp.weight.tolist() == [[1.0, 1.0], [1.0, 1.0], [5.0, 5.0], [5.0, 5.0]]
    assert model.norm.weight.tolist() == [[3.0, 3.0]]
    assert model.mlp.weight.data_ptr() == storage, "CUDA graphs refer to it"
    assert runner.vllm_config.model_config.model == str(after)
    assert swap(runner, source, after, after).copied_bytes == 0
