"""The weights of a fresh engine through the reader of swaps (LOAD_FORMAT=read_ahead).

Imported by the worker before it loads its model, which registers the loader with vLLM.
"""

import dataclasses
import logging
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from vllm.config.load import LoadConfig
from vllm.model_executor.model_loader import register_model_loader
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader
from vllm.platforms import current_platform

from inference_service.hosts.vllm.weights.mapped import MappedWeights
from inference_service.hosts.vllm.weights.source import weight_source

logger = logging.getLogger(__name__)

LOAD_FORMAT = "read_ahead"


@register_model_loader(LOAD_FORMAT)
class ReadAheadLoader(DefaultModelLoader):  # type: ignore[misc]
    """vLLM's own loader, but tensors come through the reader of swaps; it reads itself what that does not."""

    counter_before_loading_weights: float = 0.0

    def __init__(self, load_config: LoadConfig) -> None:
        super().__init__(dataclasses.replace(load_config, load_format="safetensors"))

    def _get_weights_iterator(self, source: Any) -> Iterator[tuple[str, torch.Tensor]]:
        weights = None if source.is_unused_weight else self._mapped(source)
        if weights is None:
            yield from super()._get_weights_iterator(source)
            return
        # vLLM logs the seconds from here on.
        self.counter_before_loading_weights = self.counter_before_loading_weights or time.perf_counter()
        directory, names = Path(source.model_or_path), list(weights.contents)
        for name, tensor in weight_source(_device()).tensors(directory, weights, names, Counter()):
            yield source.prefix + name, tensor

    def _mapped(self, source: Any) -> MappedWeights | None:
        directory, files, _, _ = self._prepare_weights(
            source.model_or_path,
            source.subfolder,
            source.revision,
            source.fall_back_to_pt,
            source.allow_patterns_overrides,
        )
        try:
            return MappedWeights(Path(directory), [Path(file) for file in sorted(files)])
        except ValueError as error:
            logger.info("vLLM's own loader reads the weights: %s", error)
            return None


def _device() -> torch.device:
    """The worker's."""
    kind = current_platform.device_type
    return (
        torch.device(kind) if kind == "cpu" else torch.device(kind, torch.accelerator.current_device_index())
    )


def weight_files(directory: Path) -> list[Path]:
    """The files that vLLM would read, in their order."""
    loader: Any = DefaultModelLoader(LoadConfig(load_format="safetensors"))
    _, files, _, _ = loader._prepare_weights(str(directory), None, None, False, None)
    return [Path(file) for file in sorted(files)]
