"""Cloud Run's service.yaml and service-memory.yaml: `python -m deploy.cloudrun.manifests` writes them.

The one place where what they set is decided. What follows from another value (the platform's time limit from
the service's, its concurrency from how many requests the service takes) is derived from it; a setting whose
default is right is not repeated. A test holds the files, and the command in docs/cloud-run.md, equal to this.
"""

from dataclasses import dataclass
from pathlib import Path
from string import Template

from pydantic_settings import BaseSettings, PydanticBaseSettingsSource

from inference_service.config import Settings

HERE = Path(__file__).parent
MOUNT = "/cache"
# Of the file system that is memory; the snapshots get half of the memory by default.
IN_MEMORY = "/tmp/model_cache"  # noqa: S108
# The service's own 504 comes before the platform's.
PLATFORM_MARGIN_SECONDS = 10
# Requests beyond those that the service lets wait get its 429, so the platform has to let some of them in.
REFUSED_AT_ONCE = 50


class _Deployed(Settings):
    """Without what this machine's environment and .env say."""

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        *others: PydanticBaseSettingsSource,
        **more: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return (init_settings,)


@dataclass(frozen=True)
class Variant:
    """One manifest: its file, and the size of an instance; `disk_gib` None: it has no ephemeral disk."""

    file: str
    title: str
    cpus: int
    memory_gib: int
    disk_gib: int | None

    @property
    def environment(self) -> dict[str, str]:
        """The settings that differ from their defaults."""
        return {
            "GCS_BUCKET": "your-models-bucket",
            "LOCAL_MODEL_CACHE": IN_MEMORY if self.disk_gib is None else MOUNT,
            # As long as the openai client waits by default: the first load of an architecture compiles.
            "REQUEST_TIMEOUT": "590",
            "MAX_MODEL_LEN": "8192",
        }

    @property
    def settings(self) -> Settings:
        """As the service reads them there."""
        return _Deployed.model_validate({name.lower(): value for name, value in self.environment.items()})

    @property
    def timeout_seconds(self) -> int:
        return int(self.settings.request_timeout) + PLATFORM_MARGIN_SECONDS

    @property
    def concurrency(self) -> int:
        return self.settings.concurrency + self.settings.queued + REFUSED_AT_ONCE

    def render(self) -> str:
        entries = "\n".join(
            f'            - {{name: {name}, value: "{value}"}}' for name, value in self.environment.items()
        )
        mount = "" if self.disk_gib is None else Template(_MOUNT).substitute(mount=MOUNT)
        volume = "" if self.disk_gib is None else Template(_VOLUME).substitute(disk=self.disk_gib)
        return Template(_MANIFEST).substitute(
            title=self.title,
            file=self.file,
            timeout=self.timeout_seconds,
            concurrency=self.concurrency,
            cpus=self.cpus,
            memory=self.memory_gib,
            entries=entries,
            mount=mount,
            volume=volume,
        )


VARIANTS = (
    Variant("service.yaml", "snapshots on an ephemeral disk", 4, 16, 50),
    Variant("service-memory.yaml", "without a disk, snapshots in memory", 8, 32, None),
)

_MANIFEST = """\
# Cloud Run: one NVIDIA L4 per instance, scaled to zero; $title.
# Written by `python -m deploy.cloudrun.manifests`. docs/cloud-run.md has the commands that go with it.
apiVersion: serving.knative.dev/v1
kind: Service
metadata:
  name: inference-service
spec:
  template:
    metadata:
      annotations:
        autoscaling.knative.dev/minScale: "0"
        autoscaling.knative.dev/maxScale: "1"
        # A GPU is billed and held while the instance lives; loads run between requests too.
        run.googleapis.com/cpu-throttling: "false"
        run.googleapis.com/execution-environment: gen2
        run.googleapis.com/gpu-zonal-redundancy-disabled: "true"
        run.googleapis.com/startup-cpu-boost: "true"
    spec:
      nodeSelector:
        run.googleapis.com/accelerator: nvidia-l4
      serviceAccountName: inference-service@PROJECT.iam.gserviceaccount.com
      # Above the requests that run and wait in the service, so that the service, not the platform, decides
      # which requests wait and which get 429.
      containerConcurrency: $concurrency
      # Above REQUEST_TIMEOUT: the service's own 504 comes first.
      timeoutSeconds: $timeout
      containers:
        - image: REGION-docker.pkg.dev/PROJECT/inference-service/inference-service:latest
          ports:
            - name: http1
              containerPort: 8080
          resources:
            limits:
              cpu: "$cpus"
              memory: ${memory}Gi
              nvidia.com/gpu: "1"
          # The port is open within a second or so; a model is loaded when it is asked for.
          startupProbe:
            httpGet: {path: /ready}
            periodSeconds: 2
            failureThreshold: 30
          livenessProbe:
            httpGet: {path: /health}
            periodSeconds: 30
          # Every other setting has its default; docs/configuration.md lists them.
          env:
$entries
            - name: ADMIN_API_KEY
              valueFrom:
                secretKeyRef: {name: inference-service-admin-key, key: latest}
$mount$volume"""

_MOUNT = """\
          volumeMounts:
            - {name: cache, mountPath: $mount}
"""

# 10 GiB at least. The quota is 10 GB an instance until it is raised.
_VOLUME = """\
      volumes:
        - name: cache
          emptyDir: {medium: Disk, sizeLimit: ${disk}Gi}
"""


def main() -> None:
    for variant in VARIANTS:
        (HERE / variant.file).write_text(variant.render())


if __name__ == "__main__":
    main()
