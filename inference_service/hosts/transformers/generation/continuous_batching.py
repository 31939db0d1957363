"""Many sequences in one batch, on transformers' continuous batching with a paged cache.

transformers packs the batch and manages the pages. sampling.py chooses the tokens, installed as a logits
processor, because transformers' own processors do not support log probabilities, seeds or grammars. What this
uses beyond transformers' documented interface is pinned with its release and tested (tests/hosts).
"""

import logging
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from transformers import ContinuousBatchingConfig, GenerationConfig
from transformers.generation.continuous_batching.cb_logits_processors import ContinuousBatchingLogitsProcessor
from transformers.generation.continuous_batching.continuous_api import OutputRouter
from transformers.generation.continuous_batching.scheduler import SCHEDULER_MAPPING, FIFOScheduler

from inference_service.hosts.transformers.generation.adapters import Adapters
from inference_service.hosts.transformers.generation.runner import RunnerDead
from inference_service.hosts.transformers.generation.sampling import choose
from inference_service.hosts.transformers.generation.sequence import Failure, Sequence, Token

logger = logging.getLogger(__name__)

PAGE_TOKENS = 32
# Per step: a long prompt is processed in chunks, so that running sequences are not blocked.
BATCH_TOKENS = 512
MIN_BATCH_TOKENS = 64
# Of a step's attention mask, which has a row for each token of the batch, as long as the cache.
MASK_BYTES = 128 << 20
STOP_SECONDS = 5.0
SHRINKING = 0.9
_TURNS = "turns"


@dataclass(frozen=True)
class CacheSize:
    """The size of the paged cache, and the maximum number of sequences in one step.

    A cache of fewer than `least` tokens is not worth having.
    """

    bytes: int
    token_bytes: int
    sequences: int
    least: int = 1

    @property
    def blocks(self) -> int:
        return max(2, self.bytes // (self.token_bytes * PAGE_TOKENS))

    @property
    def tokens(self) -> int:
        return self.blocks * PAGE_TOKENS

    @property
    def batch_tokens(self) -> int:
        """The number of mask rows that fit; at least one for each sequence."""
        rows = MASK_BYTES // (4 * self.tokens)
        return max(self.sequences, MIN_BATCH_TOKENS, min(BATCH_TOKENS, rows))


class ContinuousBatching:
    """A Runner (see runner.py)."""

    def __init__(self, model: Any, size: CacheSize, adapters: Adapters, *, shares_prefixes: bool) -> None:
        """Raises whatever transformers raises if it cannot batch this architecture."""
        self._sequences: dict[str, Sequence] = {}
        self._adapters = adapters
        self._lock = threading.Lock()
        # A pause of transformers admits several threads.
        self._model_lock = threading.Lock()
        self._chooser = _Chooser(self._sequences, self._end_early)
        SCHEDULER_MAPPING[_TURNS] = partial(AdapterRoundRobin, find=self._wanted, enter=adapters.enter)
        self.size, self._manager = self._fitted(model, size, shares_prefixes=shares_prefixes)
        self._manager.start()

    def _fitted(self, model: Any, size: CacheSize, *, shares_prefixes: bool) -> tuple[CacheSize, Any]:
        """The manager with its pages: fewer than planned if transformers finds too little memory for them."""
        while True:
            manager = model.init_continuous_batching(
                generation_config=GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=0),
                continuous_batching_config=_config(size, shares_prefixes=shares_prefixes),
            )
            _put_in(manager, self._chooser)
            manager.output_router = _Router(self._fail)
            try:
                manager.batch_processor = manager._create_batch_processor()
            except MemoryError as error:
                smaller = replace(size, bytes=int(size.bytes * SHRINKING))
                if smaller.tokens < size.least:
                    raise
                size = smaller
                logger.warning("the KV cache is reduced to %d tokens: %s", size.tokens, error)
            else:
                return size, manager

    @property
    def running(self) -> int:
        return len(self._sequences)

    @property
    def steps(self) -> int:
        return self._chooser.steps

    def is_alive(self) -> bool:
        return bool(self._manager.is_running())

    def submit(self, sequence: Sequence) -> None:
        with self._lock:
            self._sequences[sequence.name] = sequence
        accepted = self._manager.add_request(
            sequence.prompt,
            request_id=sequence.name,
            max_new_tokens=sequence.params.max_tokens,
            eos_token_id=sorted(sequence.params.stop_tokens) or -1,
        )
        if accepted is None:
            self._drop(sequence.name)
            raise RunnerDead("the continuous batching thread has ended")

    def cancel(self, sequence: Sequence) -> None:
        sequence.cancelled = True
        if self._drop(sequence.name) is not None:
            self._manager.cancel_request(sequence.name)

    @contextmanager
    def exclusive(self) -> Iterator[Any]:
        with self._model_lock:
            try:
                pause = self._manager.pause()
                pause.__enter__()
            except RuntimeError as error:
                raise RunnerDead(str(error)) from error
            try:
                yield self._manager.model
            finally:
                pause.__exit__(None, None, None)

    def forget(self) -> None:
        # A sequence cancelled just now holds its pages until the next step, which would cache them.
        batch = self._manager.batch_processor
        batch.fail_all_requests(EvictedError("the model's weights were replaced"))
        batch.scheduler.block_new_requests = False
        batch.cache.evict_cached_blocks()

    def close(self) -> None:
        self._manager.stop(block=True, timeout=STOP_SECONDS, hard_stop=True)

    def _end_early(self, sequence: Sequence) -> None:
        """The sequence has ended for a reason unknown to transformers."""
        self._manager.cancel_request(sequence.name)

    def _wanted(self, name: str) -> Sequence | None:
        """A sequence that can continue; None if its client has disconnected or its adapter was removed."""
        sequence = self._sequences.get(name)
        if sequence is None or sequence.adapter is None or sequence.adapter in self._adapters:
            return sequence
        self._fail(name, f"its adapter '{sequence.adapter}' was removed")
        return None

    def _fail(self, name: str, reason: str) -> None:
        sequence = self._drop(name)
        if sequence is not None:
            sequence.tell(Failure(reason))

    def _drop(self, name: str) -> Sequence | None:
        with self._lock:
            return self._sequences.pop(name, None)


class EvictedError(Exception):
    """The pages of a sequence were evicted."""


class AdapterRoundRobin(FIFOScheduler):  # type: ignore[misc]
    """One adapter per step, in turn: an active adapter applies to every row of the batch.

    Only sequences of the base model share pages: an adapter's pages hold other keys and values.
    """

    def __init__(
        self,
        *sizes: Any,
        find: Callable[[str], Sequence | None],
        enter: Callable[[str | None], None],
        **named: Any,
    ) -> None:
        """`find`: the sequence of a name, None if it is no longer wanted."""
        super().__init__(*sizes, **named)
        self._find = find
        self._enter = enter
        self._shares = self.cache.use_prefix_sharing
        self._turn: str | None = None
        self._adapters: dict[str, str | None] = {}

    def schedule_batch(self, token_budget: int, cache_budget: int) -> Any:
        """Skip a turn for which the cache has no space. If it has space for none, return a turn that holds
        pages, so that transformers can offload its sequences."""
        self._look_who_is_there()
        turns = self._turns()
        holding = [turn for turn in turns if turn in self._adapters_of(self.active_requests)]
        for turn in (*turns, *holding[:1]):
            self._turn = turn
            self.cache.use_prefix_sharing = self._shares and turn is None
            scheduled = super().schedule_batch(token_budget, cache_budget)
            if scheduled[0] is not None:
                break
        self._enter(self._turn)
        return scheduled

    def _process_candidates(self, candidates: list[Any], *budgets: Any) -> Any:
        mine = [state for state in candidates if self._adapters[state.request_id] == self._turn]
        return super()._process_candidates(mine, *budgets)

    def clear_cancelled_requests(self) -> Any:
        """Their pages admit new sequences again; transformers unblocks only when a sequence finishes."""
        cleared = super().clear_cancelled_requests()
        if cleared:
            self.block_new_requests = False
        return cleared

    def _look_who_is_there(self) -> None:
        """Sequences cancelled since the step began get no turn, and free their pages now."""
        found = {name: self._find(name) for name in (*self.active_requests, *self.waiting_requests)}
        for name, sequence in found.items():
            if sequence is None:
                self.set_request_cancellation(name)
        self.clear_cancelled_requests()
        self._adapters = {name: sequence.adapter for name, sequence in found.items() if sequence is not None}

    def _adapters_of(self, names: Iterable[str]) -> list[str | None]:
        return list(dict.fromkeys(self._adapters[name] for name in names))

    def _turns(self) -> list[str | None]:
        """Adapters of the present sequences, the next in turn first; never empty."""
        waiting = () if self.block_new_requests else self.waiting_requests
        adapters = self._adapters_of((*self.active_requests, *waiting))
        if self._turn in adapters:
            after = adapters.index(self._turn) + 1
            adapters = adapters[after:] + adapters[:after]
        return adapters or [None]


class _Chooser(ContinuousBatchingLogitsProcessor):  # type: ignore[misc]
    """Chooses the tokens, and leaves one finite logit a row for the argmax that follows."""

    supported_kwargs: dict[str, type] = {}  # noqa: RUF012  (transformers reads it from the class)
    ignored_kwargs = ()

    def __init__(self, sequences: dict[str, Sequence], end_early: Callable[[Sequence], None]) -> None:
        self.steps = 0
        self._end_early = end_early
        self._sequences = sequences
        self._rows: list[str] = []

    def fill_defaults(self, int32_tensor: torch.Tensor) -> None:
        int32_tensor.zero_()

    def prepare_tensor_args(self, requests_with_new_token: list[Any]) -> torch.Tensor:
        self.steps += 1
        self._rows = [request.state.request_id for request in requests_with_new_token]
        return torch.zeros(len(self._rows), dtype=torch.int32)

    def __call__(self, scores: torch.Tensor, tensor_arg: torch.Tensor) -> torch.Tensor:
        # A step may return no logits (the first chunk of a prompt), or those of a sequence just cancelled.
        rows = {row: self._sequences.get(name) for row, name in enumerate(self._rows)}
        present = {row: sequence for row, sequence in rows.items() if sequence is not None}
        if not present:
            return scores
        sequences = list(present.values())
        whole = len(present) == len(scores)
        logits = scores if whole else scores[torch.tensor(list(present), device=scores.device)]
        tokens = choose(logits, sequences)
        for sequence, token in zip(sequences, tokens, strict=True):
            self._tell(sequence, token)
        return _only(scores, list(present), [token.id for token in tokens])

    def _tell(self, sequence: Sequence, token: Token) -> None:
        known = token.id in sequence.params.stop_tokens or len(sequence.output) >= sequence.params.max_tokens
        ended = token.finish is not None or sequence.failure is not None
        if ended:
            self._sequences.pop(sequence.name, None)
        if ended and not known:
            self._end_early(sequence)
        sequence.tell(sequence.failure or token)


class _Router(OutputRouter):  # type: ignore[misc]
    """Handles failures only: tokens have already been sent."""

    def __init__(self, fail: Callable[[str, str], None]) -> None:
        super().__init__()
        self._fail = fail

    def deliver(self, output: Any) -> None:
        if output.error is not None:
            self._fail(output.request_id, output.error)

    def deliver_batch(self, outputs: list[Any]) -> None:
        for output in outputs:
            self.deliver(output)


def _config(size: CacheSize, *, shares_prefixes: bool) -> ContinuousBatchingConfig:
    return ContinuousBatchingConfig(
        page_size=PAGE_TOKENS,
        num_blocks=size.blocks,
        max_batch_tokens=size.batch_tokens,
        max_requests_per_batch=size.sequences,
        # The size already leaves a reserve: transformers must not subtract one again.
        max_memory_percent=1.0,
        allow_block_sharing=shares_prefixes,
        auto_switch_to_flash=False,
        use_async_batching=False,
        use_cuda_graph=False,
        scheduler_type=_TURNS,
    )


def _put_in(manager: Any, chooser: _Chooser) -> None:
    """Install the processor as transformers would; it creates its own from a generation config only."""
    processors = manager.logit_processor
    processors.clear()
    processors.logits_processor.append(chooser)
    processors.tensors_required = 1
    processors._retrieve_processors_kwargs()
    processors.do_processing = True


def _only(scores: torch.Tensor, rows: list[int], tokens: list[int]) -> torch.Tensor:
    alone = torch.full_like(scores, torch.finfo(scores.dtype).min)
    alone[torch.tensor(rows, device=scores.device), torch.tensor(tokens, device=scores.device)] = 0.0
    return alone
