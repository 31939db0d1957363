"""The soak: a short one that shows that it works, a longer one of the whole service under every fault."""

import json
import subprocess
import sys

import pytest


@pytest.mark.parametrize("seconds", [5, pytest.param(120, marks=pytest.mark.slow)])
def test_every_error_has_an_explanation(seconds: int) -> None:
    command = [sys.executable, "-m", "benchmarks.soak", "--duration", str(seconds)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=seconds + 240, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    figures = json.loads(ended.stdout.splitlines()[-1])["figures"]
    assert figures["unexplained_errors"] == 0
    assert min(figures["ok"], figures["scrapes"], figures["loads"]) > 0
    assert figures["leases_left"] == figures["processes_left"] == 0
