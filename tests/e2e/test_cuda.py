"""What only a machine with a GPU can show: `make test-gpu`."""

import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from inference_service.machine.device import DeviceKind, find_device
from tests.e2e.conftest import real_service
from tests.e2e.engines import ENGINES
from tests.e2e.test_openai_client import BASE, TUNED, ask
from tests.fixtures.bucket import Bucket
from tests.fixtures.service_process import ServiceProcess

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(find_device().kind is not DeviceKind.CUDA, reason="no CUDA device here"),
]


@pytest.fixture(scope="module")
def service(bucket: Bucket, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServiceProcess]:
    room = tmp_path_factory.mktemp("cuda")
    with real_service(
        bucket, room, ENGINES["vllm"], MAX_CACHED_MODELS="1", GPU_MEMORY_UTILIZATION="0.3", ENGINE="auto"
    ) as service:
        yield service


def used_gpu_bytes() -> int:
    import pynvml

    pynvml.nvmlInit()
    try:
        return int(pynvml.nvmlDeviceGetMemoryInfo(pynvml.nvmlDeviceGetHandleByIndex(0)).used)
    finally:
        pynvml.nvmlShutdown()


def test_a_model_is_served_on_the_gpu_and_its_memory_comes_back(service: ServiceProcess) -> None:
    idle = used_gpu_bytes()
    assert ask(service, BASE) == "The capital of France is Paris."
    health = service.http.get("/health").json()
    assert (health["device"], health["backend"]) == ("cuda", "vllm")
    assert used_gpu_bytes() > idle + (1 << 30)
    assert ask(service, TUNED) == "The capital of France is Zubrowka."
    assert service.http.post(f"/admin/unload/{TUNED}").json()["unloaded"]
    assert used_gpu_bytes() < idle + (200 << 20)


def test_two_engines_keep_within_what_is_reserved_for_them(bucket: Bucket, tmp_path: Path) -> None:
    settings = {"MAX_CACHED_MODELS": "2", "GPU_MEMORY_UTILIZATION": "0.4", "ENGINE": "auto"}
    with real_service(bucket, tmp_path, ENGINES["vllm"], **settings) as service:
        idle = used_gpu_bytes()
        for model in (BASE, TUNED):
            ask(service, model)
        stats = service.stats()
        assert len(stats["engines"]) == 2
        assert used_gpu_bytes() - idle < 1.02 * stats["budget"]["reserved_bytes"]
        assert stats["budget"]["reserved_bytes"] <= stats["budget"]["total_bytes"]


@pytest.mark.skipif(sys.platform != "linux", reason="/proc")
def test_the_launcher_is_warm_and_touches_no_gpu(
    service: ServiceProcess, bucket: Bucket, tmp_path: Path
) -> None:
    answer = ask(service, BASE)
    (launcher,) = psutil.Process(service.process.pid).children()
    opened = {str(fd.readlink()) for fd in Path(f"/proc/{launcher.pid}/fd").iterdir()}
    assert {path for path in opened if "nvidia" in path} <= {"/dev/nvidiactl"}, "NVML's alone"
    assert "without a warm launcher" not in service.log_text()
    assert title(service, BASE) == f"inference-service: {BASE} (forked)"
    service.http.post(f"/admin/unload/{BASE}").raise_for_status()
    settings = {"MAX_CACHED_MODELS": "1", "GPU_MEMORY_UTILIZATION": "0.3", "ENGINE": "auto"}
    with real_service(bucket, tmp_path, ENGINES["vllm"], WARM_LAUNCHER="false", **settings) as spawning:
        assert ask(spawning, BASE) == answer
        assert title(spawning, BASE) == f"inference-service: {BASE} (spawned)"


def title(service: ServiceProcess, model: str) -> str:
    """The title of a model's host."""
    return psutil.Process(service.engine(model)["process_id"]).cmdline()[0]


def test_weights_are_swapped_on_the_gpu(bucket: Bucket, tmp_path: Path) -> None:
    """The tied embeddings of the one are not left behind in the other's answers."""
    settings = {"MAX_CACHED_MODELS": "1", "MIN_RESIDENCY": "0", "ENGINE": "auto"}
    with real_service(bucket, tmp_path, ENGINES["vllm"], **settings) as service:
        answers = [ask(service, model) for model in (BASE, TUNED, BASE, TUNED)]
        assert answers[:2] == answers[2:]
        assert service.engine(TUNED)["swapped"]
