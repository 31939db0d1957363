"""This project's extension of vLLM's workers (`--worker-extension-cls`).

vLLM's engine core outlives a parent that was killed (SIGKILL of the host), and keeps its memory. This module
is imported in every process that holds a worker and ends it with its parent. It reports when weights are
loaded and when the engine warms up, and has the worker's side of the control routes.
"""

import logging
import multiprocessing
import multiprocessing.connection
import os
import threading
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

from vllm.device_allocator import get_mem_allocator_instance
from vllm.platforms import current_platform
from vllm.v1.worker.gpu_worker import Worker

from inference_service.engines.process_title import retitle, title_child
from inference_service.hosts.phases import enter_phase
from inference_service.hosts.vllm.compiled import share_artefacts
from inference_service.hosts.vllm.weights.digests import digests
from inference_service.hosts.vllm.weights.source import WeightSource, weight_source
from inference_service.hosts.vllm.weights.swap import mapped, swap

_PHASES = {"load_model": "weights", "compile_or_warm_up_model": "warm-up"}


class WorkerExtension:
    """Mixed into vLLM's worker class."""

    model_runner: Any

    def swap_weights(self, model: str, before: str | None, directory: str) -> dict[str, Any]:
        """Load the weights of `model` in `directory` into the live model, which holds those in `before`.

        `before` None: it holds none, because it has slept. Returns the fields of weights.swap.Done. Any error
        leaves the model unusable: the engine must end.
        """
        held = None if before is None else Path(before)
        done = swap(self.model_runner, self._weight_source(), held, Path(directory))
        retitle(model)  # this process, if it is not the host's own
        return done._asdict()

    def freed_by_sleep(self) -> int:
        """Bytes of the device that the sleeping engine does not hold."""
        allocated = get_mem_allocator_instance().pointer_to_data.values()
        return sum(each.handle[1] for each in allocated if each.is_asleep)

    def prepare_weights(self, directory: str) -> None:
        """Begin to make the weights in `directory` ready for a swap; returns at once."""
        self._weight_source().prepare(Path(directory), mapped(Path(directory)))

    def weights_prepared(self, directory: str) -> dict[str, Any]:
        """How far the weights in `directory` are ready: the fields of weights.prepared.Status."""
        status = self._weight_source().status(Path(directory))
        return {} if status is None else status._asdict()

    def forget_weights(self, directory: str) -> None:
        """Hold the weights in `directory` no longer."""
        self._weight_source().forget(Path(directory))

    def _weight_source(self) -> WeightSource:
        return weight_source(self.model_runner.device)

    def weight_digests(self) -> dict[str, str]:
        """A digest of every parameter by name: equal for two engines only if their weights are."""
        return digests(self.model_runner.get_model())


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is None:
        return

    def watch() -> None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, name="parent-watchdog", daemon=True).start()


def _tell_phases(owner: type[Any], phases: dict[str, str]) -> None:
    """Report a phase when the method for it is called."""
    for name, phase in phases.items():
        if name in vars(owner):
            setattr(owner, name, _telling(vars(owner)[name], phase))


def _telling(method: Callable[..., Any], phase: str) -> Callable[..., Any]:
    @wraps(method)
    def reporting(*args: Any, **kwargs: Any) -> Any:
        enter_phase(phase)
        return method(*args, **kwargs)

    return reporting


_end_with_parent()
title_child()
share_artefacts()
_tell_phases(Worker, _PHASES)
# They warn of modules that a swap gives no weights, most of them on purpose.
for _name in ("layerwise", "inplace"):
    logging.getLogger(f"vllm.model_executor.model_loader.reload.{_name}").setLevel(logging.ERROR)
if current_platform.is_cpu():
    from vllm.v1.worker.cpu_worker import CPUWorker

    from inference_service.hosts.vllm import lora_cpu, sampler_cpu

    _tell_phases(CPUWorker, _PHASES)
    lora_cpu.install()
    sampler_cpu.install()
else:
    from vllm.v1.worker.gpu.model_runner import GPUModelRunner as NewModelRunner
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    _tell_phases(Worker, {"determine_available_memory": "compile"})
    for _runner in (GPUModelRunner, NewModelRunner):
        _tell_phases(_runner, {"capture_model": "graphs"})
