"""Engines that compile (ENGINE_EAGER=false): the second fine-tune of an architecture compiles nothing.

Nor does another machine with the same COMPILE_CACHE.
"""

import re
import shutil
from pathlib import Path

import pytest

from tests.e2e.conftest import NOISE, real_service
from tests.e2e.engines import ENGINES
from tests.e2e.test_openai_client import CAPITAL
from tests.e2e.test_swap import answer
from tests.fixtures.bucket import Bucket
from tests.fixtures.service_process import ServiceProcess

COMPILED, LOADED = "saved AOT compiled function", "Directly load AOT compilation"


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.skipif(shutil.which("g++") is None, reason="compiling for the CPU requires a compiler")
def test_two_fine_tunes_share_what_is_compiled(family: Bucket, tmp_path: Path) -> None:
    settings = {
        "ENGINE_EAGER": "false",
        "MAX_CACHED_MODELS": "1",
        "WEIGHT_SWAP": "off",
        "LOAD_TIMEOUT": "1000",
    }
    settings |= {
        "REQUEST_TIMEOUT": "1000",
        "QUEUE_TIMEOUT": "1000",
        "COMPILE_CACHE": str(tmp_path / "shared"),
    }
    rooms = [tmp_path / name for name in ("one", "two", "eager")]
    for room in rooms:
        room.mkdir()
    with real_service(family, rooms[0], ENGINES["vllm"], **settings) as service:
        found = [load(service, model) for model in NOISE]
        service.wait_until(lambda: outcome(service, "pushed") == 1, 60)
        compiled = [answer(service, model, CAPITAL)[0] for model in NOISE]
    with real_service(family, rooms[1], ENGINES["vllm"], **settings) as service:
        found.append(load(service, NOISE[1]))
        assert (outcome(service, "pulled"), outcome(service, "pushed")) == (1, 0)
        assert answer(service, NOISE[1], CAPITAL)[0] == compiled[1]
    assert found == ["compiled", "loaded", "loaded"]
    with real_service(family, rooms[2], ENGINES["vllm"]) as service:
        assert [answer(service, model, CAPITAL)[0] for model in NOISE] == compiled


def load(service: ServiceProcess, model: str) -> str:
    """What its engine's log says of the artefacts."""
    seen = len(service.log_text())
    service.client(timeout=1000).completions.create(model=model, prompt="x", max_tokens=1)
    log = service.log_text()[seen:]
    return {(True, False): "compiled", (False, True): "loaded"}.get((COMPILED in log, LOADED in log), log)


def outcome(service: ServiceProcess, status: str) -> int:
    """How often COMPILE_CACHE has reported it."""
    found = re.search(
        rf'compile_cache_total{{model="",status="{status}"}} (\d+)', service.http.get("/metrics").text
    )
    return 0 if found is None else int(found[1])
