"""The title of a host names the model that it serves, also after a swap."""

import subprocess
import sys

import psutil
import pytest

SCRIPT = """
import os
import sys
from inference_service.engines.process_title import retitle, title_child, title_host, title_of
import setproctitle
for step in {steps}:
    exec(step)
print("ready", flush=True)
sys.stdin.read()
"""


def title_after(*steps: str) -> list[str]:
    """The command line of a process, as others see it, that has taken these steps."""
    command = [sys.executable, "-c", SCRIPT.format(steps=list(steps)), "room for a title " * 10]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        return [part for part in psutil.Process(process.pid).cmdline() if part]
    finally:
        process.communicate(b"")


@pytest.mark.skipif(sys.platform != "linux", reason="how others see it is the system's own")
def test_a_host_is_named_after_its_model_and_again_after_a_swap() -> None:
    first = "title_host('org-model_1.5', 'forked')"
    assert title_after(first) == ["inference-service: org-model_1.5 (forked)"]
    assert title_after(first, "retitle('other')") == ["inference-service: other (forked)"]


@pytest.mark.skipif(sys.platform != "linux", reason="how others see it is the system's own")
def test_vllms_own_processes_keep_their_part_and_others_their_title() -> None:
    core = "setproctitle.setproctitle('inference-service: m::EngineCore')"
    assert title_after(core, "retitle('n')") == ["inference-service: n::EngineCore"]
    assert title_after("setproctitle.setproctitle('mine')", "retitle('n')", "title_child()") == ["mine"]
    child = "setproctitle.setproctitle('VLLM::EngineCore')"
    prefix = "os.environ['VLLM_PROCESS_NAME_PREFIX'] = title_of('m')"
    assert title_after(child, prefix, "title_child()") == ["inference-service: m::EngineCore"]
    assert title_after(child, "title_child()") == ["VLLM::EngineCore"]
