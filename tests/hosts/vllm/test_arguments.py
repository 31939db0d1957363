"""The command line for CUDA, as vLLM's own parser understands it."""

from typing import Any

import pytest

from inference_service.backends.vllm import graph_sizes, vllm_arguments
from inference_service.checkpoints.memory_profile import Footprint
from inference_service.checkpoints.serving_config import Serving
from inference_service.checkpoints.snapshot import Snapshot
from inference_service.config import Settings
from inference_service.machine.device import Device, DeviceKind
from tests.fixtures.checkpoints import base_checkpoint
from tests.fixtures.installed import needs_vllm

L4 = Device(DeviceKind.CUDA, "NVIDIA L4", memory_bytes=24 << 30)


@pytest.mark.parametrize(
    ("most", "sizes"),
    [
        (1, (1,)),
        (3, (1, 2, 3)),
        (50, (1, 2, 4, 8, 16, 32, 50)),
        (64, (1, 2, 4, 8, 16, 32, 64)),
        (256, (1, 2, 4, 8, 16, 32, 64, 128, 192, 256)),
        (100_000, (1, 2, 4, 8, 16, 32, 64, 128, 192, 256, 320, 384, 448, 512)),
    ],
)
def test_graphs_follow_the_sequences_that_can_run(most: int, sizes: tuple[int, ...]) -> None:
    assert graph_sizes(most) == sizes


def arguments(serving: Serving | None = None, rank: int = 0, **settings: Any) -> tuple[str, ...]:
    snapshot = Snapshot("m", "r", base_checkpoint(), 1 << 20, serving or Serving(), rank)
    return vllm_arguments(Settings(**settings), L4, snapshot, Footprint(1 << 28, 1 << 28, 1 << 28))


@needs_vllm
@pytest.mark.filterwarnings("ignore")  # vLLM's imports
@pytest.mark.parametrize(
    ("found", "sizes"),
    [
        pytest.param(arguments, [1, 2, 4, 8, 16, 32, 50], id="by the requests that can run"),
        pytest.param(lambda: arguments(Serving(max_num_seqs=4)), [1, 2, 4], id="by serving.json"),
        pytest.param(lambda: arguments(rank=8, cuda_graph_sizes="1,3"), [1, 3], id="as the operator says"),
    ],
)
def test_vllm_takes_the_sizes_and_the_flags(found: Any, sizes: list[int]) -> None:
    from vllm.engine.arg_utils import AsyncEngineArgs

    from inference_service.engines.base import HostSpec
    from inference_service.hosts.vllm.control import parse_arguments

    spec = HostSpec("m", "", "", found(), {}, 1, 1.0)
    parsed = AsyncEngineArgs.from_cli_args(parse_arguments(spec))
    parsed.tensor_parallel_size = 1
    config = parsed.create_engine_config().compilation_config
    assert parsed.cudagraph_capture_sizes == sizes
    assert config.cudagraph_specialize_lora is False


@needs_vllm
@pytest.mark.filterwarnings("ignore")  # vLLM's imports
@pytest.mark.parametrize("sleeping", [0, 2])
def test_vllm_takes_the_flag_of_engines_that_may_sleep(sleeping: int) -> None:
    from inference_service.engines.base import HostSpec
    from inference_service.hosts.vllm.control import parse_arguments

    spec = HostSpec("m", "", "", arguments(max_sleeping=sleeping), {}, 1, 1.0)
    assert parse_arguments(spec).enable_sleep_mode is bool(sleeping)


@needs_vllm
def test_an_eager_engine_captures_none() -> None:
    assert "--cudagraph-capture-sizes" not in arguments(engine_eager=True)
    assert "--enforce-eager" in arguments(engine_eager=True)


@pytest.mark.parametrize("sizes", ["0", "-1", "a", "1;2", "100000"])
def test_sizes_that_are_none(sizes: str) -> None:
    with pytest.raises(ValueError, match="cuda_graph_sizes"):
        Settings(cuda_graph_sizes=sizes)
