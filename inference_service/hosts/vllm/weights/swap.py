"""Other weights of the same shapes into the live model, of which only what differs is copied.

vLLM's layerwise reload puts back the tensors of a module that it is given no weights for. So a swap yields
the tensors of the modules that differ, each module whole, as views of the mapped files; vLLM copies them into
the storage that CUDA graphs refer to.
"""

import logging
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding
from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info
from vllm.platforms import current_platform

from inference_service.hosts.vllm.weights.changed import changed
from inference_service.hosts.vllm.weights.loader import weight_files
from inference_service.hosts.vllm.weights.mapped import MappedWeights
from inference_service.hosts.vllm.weights.source import Way, WeightSource

logger = logging.getLogger(__name__)


class Done(NamedTuple):
    """Bytes of the checkpoint that a swap has copied, of how many, and what they were copied from."""

    copied_bytes: int
    total_bytes: int
    copied_from: dict[str, int]


def swap(runner: Any, source: WeightSource, before: Path | None, directory: Path) -> Done:
    """Load the weights in `directory` into the runner's model, which holds those in `before`; None: none."""
    model = runner.get_model()
    held = None if before is None else mapped(before)
    weights = _Weights(model, source, directory, held, mapped(directory))
    config = runner.vllm_config.model_config
    config.model, config.model_weights, config.revision = str(directory), "", None
    if current_platform.is_cpu():
        _embed_only(model)
    if weights.names:
        runner.reload_weights(weights_iterator=weights)
    else:
        runner.reset_lora_state()
    if current_platform.is_cpu():
        _tie_again(model)
    copied_from = {str(way): count for way, count in weights.copied_from.items()}
    return Done(weights.copied_from.total(), weights.total_bytes, copied_from)


class _Weights:
    """Iterates over the tensors to copy, by name; counts what it has yielded."""

    def __init__(
        self,
        model: Any,
        source: WeightSource,
        directory: Path,
        before: MappedWeights | None,
        after: MappedWeights,
    ) -> None:
        self._model = model
        self._source = source
        self._directory = directory
        self._after = after
        packed = getattr(model, "packed_modules_mapping", {})
        held = {} if before is None else before.contents
        self.names = changed(held, after.contents, packed)
        self.copied_from: Counter[Way] = Counter()
        self.total_bytes = after.bytes(after.contents)

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        yield from self._tensors(self.names)
        rest = [name for name in self._after.contents if name not in set(self.names)]
        # A model that collects its tensors before it loads them cannot be checked: it gets them all.
        broken = ["none of them yet"] if not _touched(self._model) else list(_partly_loaded(self._model))
        if rest and broken:
            logger.warning(
                "the swap copies every tensor: vLLM combines them in a way that is not known here: %s", broken
            )
            yield from self._tensors(rest)

    def _tensors(self, names: list[str]) -> Iterator[tuple[str, torch.Tensor]]:
        return self._source.tensors(self._directory, self._after, names, self.copied_from)


def mapped(directory: Path) -> MappedWeights:
    """The files that vLLM's own loader would read."""
    return MappedWeights(directory, weight_files(directory))


def _partly_loaded(model: Any) -> Iterator[str]:
    """Modules that a reload has given some of their weights and not the others, which would be lost.

    Only while a reload is under way.
    """
    for name, module in model.named_modules():
        info = get_layerwise_info(module)
        # A vocabulary's padding is in no checkpoint.
        if isinstance(module, VocabParallelEmbedding) or not info.can_load():
            continue
        if 0 < info.load_numel < info.load_numel_total:
            yield name


def _touched(model: Any) -> bool:
    """Whether a reload that is under way has given any weight to a module yet."""
    infos = [get_layerwise_info(module) for module in model.modules()]
    return any(not info.can_load() or info.load_numel for info in infos)


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
