"""Which engines share what they compile."""

from dataclasses import replace

import pytest

from inference_service.backends.compile_key import compile_key
from inference_service.config import Settings
from inference_service.machine.device import Device, DeviceKind

L4 = Device(DeviceKind.CUDA, "NVIDIA L4", driver="535.1 / odd", driver_cuda=(12, 2))


def test_a_key_is_a_file_name_that_says_what_it_is_for() -> None:
    key = compile_key(Settings(), L4, "swap")
    assert key.startswith("vllm-")
    assert "-NVIDIA-L4-535.1-odd-" in key
    assert "/" not in key
    assert key == compile_key(Settings(port=1), L4, "swap")


@pytest.mark.parametrize(
    ("settings", "device", "swap_key"),
    [
        (Settings(), L4, "other"),
        (Settings(), replace(L4, name="NVIDIA H200"), "swap"),
        (Settings(), replace(L4, driver="580.1"), "swap"),
        (Settings(max_model_len=100), L4, "swap"),
        (Settings(cuda_graph_sizes=(1, 2)), L4, "swap"),
        (Settings(tensor_parallel_size=2), L4, "swap"),
    ],
)
def test_what_shapes_the_graph_is_in_the_key(settings: Settings, device: Device, swap_key: str) -> None:
    assert compile_key(settings, device, swap_key) != compile_key(Settings(), L4, "swap")
