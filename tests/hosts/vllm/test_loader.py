"""The loader of fresh engines over the reader of swaps."""

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("vllm")
pytestmark = pytest.mark.filterwarnings("ignore")  # vLLM's imports

from safetensors.torch import save_file  # noqa: E402

from inference_service.hosts.vllm.weights.mapped import MappedWeights  # noqa: E402
from inference_service.hosts.vllm.weights.read_ahead import Ring  # noqa: E402
from inference_service.hosts.vllm.weights.source import Way, WeightSource  # noqa: E402


class Watched(WeightSource):
    """It counts, over all loads, what tensors were copied from."""

    def __init__(self) -> None:
        super().__init__(torch.device("cpu"), ring=Ring(torch.empty(1 << 16, dtype=torch.uint8)))
        self.copied_from: Counter[Way] = Counter()

    def tensors(
        self, directory: Path, weights: MappedWeights, names: Sequence[str], copied_from: Counter[Way]
    ) -> Iterator[tuple[str, Any]]:
        yield from super().tensors(directory, weights, names, self.copied_from)


@pytest.fixture
def source(monkeypatch: pytest.MonkeyPatch) -> Watched:
    from inference_service.hosts.vllm.weights import loader

    watched = Watched()
    monkeypatch.setattr(loader, "weight_source", lambda device: watched)
    return watched


def loaded(directory: Path, **more: Any) -> dict[str, Any]:
    """By name, what vLLM gets of a checkpoint."""
    from vllm.config.load import LoadConfig
    from vllm.model_executor.model_loader import get_model_loader
    from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

    from inference_service.hosts.vllm.weights.loader import LOAD_FORMAT

    loader: Any = get_model_loader(LoadConfig(load_format=LOAD_FORMAT))
    wanted = DefaultModelLoader.Source(str(directory), None, prefix="p.", **more)
    return {name: tensor.clone() for name, tensor in loader._get_weights_iterator(wanted)}


def test_tensors_come_through_the_ring(tmp_path: Path, source: Watched) -> None:
    tensors = {f"t{number}": torch.randn(100, 7).to(torch.bfloat16) for number in range(40)}
    names = sorted(tensors)
    save_file({name: tensors[name] for name in names[:20]}, tmp_path / "model-00001-of-00002.safetensors")
    save_file({name: tensors[name] for name in names[20:]}, tmp_path / "model-00002-of-00002.safetensors")
    found = loaded(tmp_path)
    assert found.keys() == {f"p.{name}" for name in names}
    assert all(torch.equal(found[f"p.{name}"], tensors[name]) for name in names)
    assert source.copied_from[Way.READ_AHEAD] == 40 * 100 * 7 * 2


@pytest.mark.parametrize(
    "more", [{}, {"is_unused_weight": lambda name: False}], ids=["types that are not swapped", "a filter"]
)
def test_what_the_reader_does_not_take_vllm_reads_itself(
    tmp_path: Path, source: Watched, more: dict[str, Any]
) -> None:
    dtype = torch.bfloat16 if more else torch.float8_e4m3fn
    tensor = torch.randn(4, 4).to(dtype)
    save_file({"a": tensor}, tmp_path / "model.safetensors")
    assert torch.equal(loaded(tmp_path, **more)["p.a"].float(), tensor.float())
    assert not source.copied_from


def test_a_file_cut_short_is_an_error(tmp_path: Path, source: Watched) -> None:
    save_file({"a": torch.ones(4)}, tmp_path / "model.safetensors")
    content = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(content[:-1])
    with pytest.raises(Exception, match=r"incomplete|missing|not fully covered"):
        loaded(tmp_path)
