"""From a snapshot to an engine: the host's program, its command line and its environment.

vLLM is configured through its command line only, its most stable interface.
"""

import contextlib
import itertools
import os
import shutil
import tempfile
from pathlib import Path
from typing import TypeVar

from inference_service.backends.base import backend_version, missing_for
from inference_service.backends.environment import compiled_environment
from inference_service.backends.preload import PROGRAMS
from inference_service.backends.transformers import transformers_arguments
from inference_service.backends.vllm import runs_eagerly, vllm_arguments
from inference_service.checkpoints.memory_profile import Footprint
from inference_service.checkpoints.snapshot import Snapshot
from inference_service.config import Backend, EngineChoice, Settings
from inference_service.engines.base import HostSpec
from inference_service.engines.launcher import Launcher
from inference_service.engines.process_engine import ProcessEngine
from inference_service.engines.process_title import title_of
from inference_service.machine.device import Device

_Number = TypeVar("_Number", int, float)
ROOM_PREFIX = "inference-service-"


class EngineFactory:
    """Creates engines for one device and backend; owns the directory of their sockets."""

    def __init__(self, settings: Settings, device: Device, backend: Backend, launcher: Launcher) -> None:
        self._settings = settings
        self._device = device
        self._backend = backend
        self._launcher = launcher
        self._numbers = itertools.count(1)
        _sweep_orphaned_rooms()
        self._room = Path(tempfile.mkdtemp(prefix=f"{ROOM_PREFIX}{os.getpid()}-"))

    def make(self, snapshot: Snapshot, footprint: Footprint) -> ProcessEngine:
        """A new engine that stays within `footprint`, not started yet."""
        directory = self._room / str(next(self._numbers))

        def specify(snapshot: Snapshot) -> HostSpec:
            return self._spec(snapshot, footprint, directory)

        return ProcessEngine(self._launcher, specify(snapshot), directory, specify)

    def conditions(self) -> str:
        """What logits depend on besides the weights: kernels, their version, the dtype of the computation."""
        bits = "int8" if self._settings.quantizes else ""
        eager = "eager" if runs_eagerly(self._settings.engine_eager, self._device) else "compiled"
        computing = f"{self._device.name} {self._settings.dtype} {eager} {bits}".rstrip()
        return f"{self._backend} {backend_version(self._backend)} {computing}"

    def close(self) -> None:
        shutil.rmtree(self._room, ignore_errors=True)

    def _spec(self, snapshot: Snapshot, footprint: Footprint, directory: Path) -> HostSpec:
        arguments: tuple[str, ...] = ()
        environment: dict[str, str] = {}
        fallback: tuple[str, ...] | None = None
        if self._backend is Backend.VLLM:
            if self._settings.engine is EngineChoice.AUTO and not missing_for(
                Backend.TRANSFORMERS, self._device
            ):
                fallback = transformers_arguments(self._settings, self._device, snapshot, footprint)
            arguments = vllm_arguments(self._settings, self._device, snapshot, footprint)
            # vLLM's sockets and temporary files: they are removed with the engine's own directory.
            environment = {
                "VLLM_RPC_BASE_PATH": str(directory),
                "TMPDIR": str(directory),
                "VLLM_PROCESS_NAME_PREFIX": title_of(snapshot.model),
            }
            if snapshot.compiled is not None:
                environment |= compiled_environment(snapshot.compiled)
        elif self._backend is Backend.TRANSFORMERS:
            arguments = transformers_arguments(self._settings, self._device, snapshot, footprint)
        elif self._backend is Backend.FAKE:
            arguments = (str(self._settings.fake_tokens_per_second), str(snapshot.adapter_rank))
        sampling = snapshot.serving.sampling_defaults
        return HostSpec(
            model=snapshot.model,
            program=PROGRAMS[self._backend],
            directory=str(snapshot.path),
            arguments=arguments,
            environment=environment,
            fallback=fallback,
            default_max_tokens=_or_default(sampling.max_tokens, self._settings.default_max_tokens),
            default_temperature=_or_default(sampling.temperature, self._settings.default_temperature),
        )


def _sweep_orphaned_rooms() -> None:
    """Remove directories left by services that were killed; their process id is in the name."""
    for room in Path(tempfile.gettempdir()).glob(f"{ROOM_PREFIX}*-*"):
        owner = room.name.removeprefix(ROOM_PREFIX).partition("-")[0]
        with contextlib.suppress(FileNotFoundError):  # another service is cleaning up too
            if owner.isdigit() and room.stat().st_uid == os.getuid() and not _is_alive(int(owner)):
                shutil.rmtree(room, ignore_errors=True)


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass  # another user's, but alive
    return True


def _or_default(value: _Number | None, default: _Number) -> _Number:
    return default if value is None else value
