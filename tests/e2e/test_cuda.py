"""What only a machine with a GPU can show: `make test-gpu`. No network: the models are made here."""

import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path

import psutil
import pytest

from inference_service.machine.device import DeviceKind, find_device
from tests.fixtures.host_socket import weight_digests
from tests.fixtures.service_process import ServiceProcess, running_service

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(find_device().kind is not DeviceKind.CUDA, reason="no CUDA device here"),
]


BASE, TUNED, ADAPTER = "base", "projections", "adapter-1"
ONE = {"MAX_CACHED_MODELS": "1", "GPU_MEMORY_UTILIZATION": "0.3", "ENGINE": "auto", "MIN_RESIDENCY": "0"}


@pytest.fixture(scope="module")
def bucket(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Small models of random weights: fine-tunes of two architectures, adapters."""
    from benchmarks.gpu.models import SMALL, make

    root = tmp_path_factory.mktemp("bucket")
    make(root, SMALL)
    return root


def gpu_service(bucket: Path, room: Path, **settings: str) -> AbstractContextManager[ServiceProcess]:
    return running_service(room, GCS_BUCKET=f"file://{bucket}", LOAD_TIMEOUT="600", **settings)


@pytest.fixture(scope="module")
def service(bucket: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServiceProcess]:
    with gpu_service(bucket, tmp_path_factory.mktemp("cuda"), **ONE) as service:
        yield service


def ask(service: ServiceProcess, model: str) -> str:
    """Its greedy text, which is noise and always the same."""
    answer = service.client(timeout=900).completions.create(
        model=model, prompt="Tell me of the fox.", max_tokens=24, temperature=0
    )
    return answer.choices[0].text


def used_gpu_bytes() -> int:
    import pynvml

    pynvml.nvmlInit()
    try:
        return int(pynvml.nvmlDeviceGetMemoryInfo(pynvml.nvmlDeviceGetHandleByIndex(0)).used)
    finally:
        pynvml.nvmlShutdown()


def test_a_model_is_served_on_the_gpu_and_its_memory_comes_back(service: ServiceProcess) -> None:
    idle = used_gpu_bytes()
    assert ask(service, BASE) != ask(service, TUNED)
    health = service.http.get("/health").json()
    assert (health["device"], health["backend"]) == ("cuda", "vllm")
    assert used_gpu_bytes() > idle + (1 << 30)
    assert service.http.post(f"/admin/unload/{TUNED}").json()["unloaded"]
    assert used_gpu_bytes() < idle + (200 << 20)


def test_two_engines_keep_within_what_is_reserved_for_them(bucket: Path, tmp_path: Path) -> None:
    settings = {"MAX_CACHED_MODELS": "2", "GPU_MEMORY_UTILIZATION": "0.4", "ENGINE": "auto"}
    with gpu_service(bucket, tmp_path, **settings) as service:
        idle = used_gpu_bytes()
        for model in (BASE, "other"):
            ask(service, model)
        stats = service.stats()
        assert len(stats["engines"]) == 2
        for engine in stats["engines"]:
            assert engine["measured_bytes"] <= sum(engine["memory"].values())
        assert used_gpu_bytes() - idle < 1.02 * stats["budget"]["reserved_bytes"]
        assert stats["budget"]["reserved_bytes"] <= stats["budget"]["total_bytes"]


@pytest.mark.skipif(sys.platform != "linux", reason="/proc")
def test_the_launcher_is_warm_and_touches_no_gpu(
    service: ServiceProcess, bucket: Path, tmp_path: Path
) -> None:
    answer = ask(service, BASE)
    (launcher,) = psutil.Process(service.process.pid).children()
    opened = {str(fd.readlink()) for fd in Path(f"/proc/{launcher.pid}/fd").iterdir()}
    assert {path for path in opened if "nvidia" in path} <= {"/dev/nvidiactl"}, "NVML's alone"
    assert "without a warm launcher" not in service.log_text()
    assert title(service, BASE) == f"inference-service: {BASE} (forked)"
    service.http.post(f"/admin/unload/{BASE}").raise_for_status()
    with gpu_service(bucket, tmp_path, WARM_LAUNCHER="false", **ONE) as spawning:
        assert ask(spawning, BASE) == answer
        assert title(spawning, BASE) == f"inference-service: {BASE} (spawned)"


def title(service: ServiceProcess, model: str) -> str:
    """The title of a model's host."""
    return psutil.Process(service.engine(model)["process_id"]).cmdline()[0]


@pytest.mark.parametrize("pair", [(BASE, TUNED), ("tied-1", "tied-2")])
def test_swapped_weights_are_a_fresh_engines(service: ServiceProcess, pair: tuple[str, str]) -> None:
    """Text and digests, with CUDA graphs, tied and untied, and nothing of an adapter left behind."""
    fresh = {}
    for model in (pair[1], pair[0]):
        for engine in service.stats()["engines"]:
            service.http.post(f"/admin/unload/{engine['model']}").raise_for_status()
        fresh[model] = (ask(service, model), digests(service, model))
    adapted = ask(service, ADAPTER) if pair[0] == BASE else None
    for model in (pair[1], pair[0]):
        assert (ask(service, model), digests(service, model)) == fresh[model]
        assert service.engine(model)["swapped"]
    assert adapted is None or ask(service, ADAPTER) == adapted


def test_an_engine_sleeps_and_wakes_with_its_weights(bucket: Path, tmp_path: Path) -> None:
    with gpu_service(bucket, tmp_path, MAX_SLEEPING="1", **ONE) as service:
        idle = used_gpu_bytes()
        fresh, fresh_digests, adapted = ask(service, BASE), digests(service, BASE), ask(service, ADAPTER)
        process = service.engine(BASE)["process_id"]
        ask(service, "other")
        sleeper, awake = service.engine(BASE), service.engine("other")
        assert (sleeper["state"], sleeper["process_id"]) == ("sleeping", process)
        assert 0 < sleeper["asleep_bytes"] < awake["measured_bytes"] / 2
        assert used_gpu_bytes() - idle < 1.02 * service.stats()["budget"]["reserved_bytes"]
        assert (ask(service, BASE), digests(service, BASE)) == (fresh, fresh_digests)
        assert service.engine(BASE)["process_id"] == process
        assert ask(service, ADAPTER) == adapted
        assert 'inference_sleeps_total{model="base",status="woken"} 1.0' in service.http.get("/metrics").text


def digests(service: ServiceProcess, model: str) -> dict[str, str]:
    return weight_digests(service.engine(model)["process_id"])


def test_weights_are_prepared_while_another_model_streams(service: ServiceProcess) -> None:
    from benchmarks.gpu.service import Measured

    expected = ask(service, TUNED)
    ask(service, BASE)
    with ThreadPoolExecutor(1) as pool:
        with Measured(service).busy(BASE):
            waiting = pool.submit(ask, service, TUNED)
            service.wait_until(lambda: any(each["ready_bytes"] for each in service.stats()["prepared"]), 60)
            (prepared,) = service.stats()["prepared"]
        assert (prepared["ready_bytes"], prepared["refused"]) == (prepared["total_bytes"], None)
        assert waiting.result(60) == expected
    engine = service.engine(TUNED)
    assert engine["copied_from"] == {"prepared": engine["copied_bytes"]}
