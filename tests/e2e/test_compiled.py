"""Engines that compile (ENGINE_EAGER=false): the second fine-tune of an architecture compiles nothing."""

import shutil
from pathlib import Path

import pytest

from tests.e2e.conftest import NOISE, real_service
from tests.e2e.engines import ENGINES
from tests.e2e.test_openai_client import CAPITAL
from tests.e2e.test_swap import answer
from tests.fixtures.bucket import Bucket

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
    settings |= {"REQUEST_TIMEOUT": "1000", "QUEUE_TIMEOUT": "1000"}
    logs = []
    with real_service(family, tmp_path, ENGINES["vllm"], **settings) as service:
        for model in NOISE:
            seen = len(service.log_text())
            service.client(timeout=1000).completions.create(model=model, prompt="x", max_tokens=1)
            logs.append(service.log_text()[seen:])
        compiled = [answer(service, model, CAPITAL)[0] for model in NOISE]
    assert [(COMPILED in log, LOADED in log) for log in logs] == [(True, False), (False, True)]
    with real_service(family, tmp_path, ENGINES["vllm"]) as service:
        assert [answer(service, model, CAPITAL)[0] for model in NOISE] == compiled
