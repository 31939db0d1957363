"""This project's extension of vLLM's workers (`--worker-extension-cls`).

vLLM's engine core outlives a parent that was killed (SIGKILL of the host), and keeps its memory. This module
is imported in every process that holds a worker and ends it with its parent. It reports when weights are
loaded and when the engine warms up, and swaps another checkpoint's weights into the live model.
"""

import logging
import multiprocessing
import multiprocessing.connection
import os
import threading
from collections.abc import Callable
from functools import wraps
from typing import Any

from vllm.platforms import current_platform
from vllm.v1.worker.gpu_worker import Worker

from inference_service.engines.process_title import retitle, title_child
from inference_service.hosts.phases import enter_phase

_PHASES = {"load_model": "weights", "compile_or_warm_up_model": "warm-up"}


class WorkerExtension:
    """Mixed into vLLM's worker class."""

    model_runner: Any

    def swap_weights(self, model: str, directory: str) -> None:
        """Load the weights of `model` in `directory`, of the same shapes, into the live model.

        Any error leaves the model unusable: the engine must be ended.
        """
        if current_platform.is_cpu():
            _embed_only(self.model_runner.get_model())
        self.model_runner.reload_weights(weights_path=directory)
        retitle(model)  # this process, if it is not the host's own
        if current_platform.is_cpu():
            _tie_again(self.model_runner.get_model())


def _embed_only(model: Any) -> None:
    """Do not pack the embeddings on the CPU: only the output layer, a separate one, needs them packed."""
    head, embeddings = _unwrapped(getattr(model, "lm_head", None)), _embeddings(model)
    if head is None or embeddings is None or head is embeddings:
        return
    embeddings.quant_method.process_weights_after_loading = lambda layer: None
    vars(embeddings).pop("cpu_linear", None)


def _tie_again(model: Any) -> None:
    """Repack a tied output layer: on the CPU it would keep using a packed copy of the old embeddings."""
    config = getattr(model, "config", None)
    head = _unwrapped(getattr(model, "lm_head", None))
    embeddings = _embeddings(model)
    if not getattr(config, "tie_word_embeddings", False) or head is None or embeddings is None:
        return
    if head is not embeddings:
        head.weight = embeddings.weight
    head.quant_method.process_weights_after_loading(head)


def _embeddings(model: Any) -> Any:
    return _unwrapped(getattr(getattr(model, "model", None), "embed_tokens", None))


def _unwrapped(layer: Any) -> Any:
    """The layer itself, if LoRA has wrapped it."""
    return getattr(layer, "base_layer", layer)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is None:
        return

    def watch() -> None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, name="parent-watchdog", daemon=True).start()


def _tell_phases(worker: type[Any]) -> None:
    """Report a phase when the worker's method for it is called."""
    for name, phase in _PHASES.items():
        if name in vars(worker):
            setattr(worker, name, _telling(vars(worker)[name], phase))


def _telling(method: Callable[..., Any], phase: str) -> Callable[..., Any]:
    @wraps(method)
    def reporting(*args: Any, **kwargs: Any) -> Any:
        enter_phase(phase)
        return method(*args, **kwargs)

    return reporting


_end_with_parent()
title_child()
_tell_phases(Worker)
# It warns of tied output layers and rotary embeddings, which have no tensor in a checkpoint.
logging.getLogger("vllm.model_executor.model_loader.reload.layerwise").setLevel(logging.ERROR)
if current_platform.is_cpu():
    from vllm.v1.worker.cpu_worker import CPUWorker

    from inference_service.hosts.vllm import lora_cpu, sampler_cpu

    _tell_phases(CPUWorker)
    lora_cpu.install()
    sampler_cpu.install()
