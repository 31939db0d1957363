"""Many sequences in one batch, on transformers' continuous batching with a paged cache.

transformers packs the batch and keeps the pages; the tokens are chosen by sampling.py, in the place of one of
its logits processors, because its own know nothing of log probabilities, seeds or grammars. What this relies
on beyond transformers' documented interface is pinned with its release and tested (tests/hosts).
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
# Of one step: a long prompt is read in pieces, so that running sequences go on meanwhile.
BATCH_TOKENS = 512
MIN_BATCH_TOKENS = 64
# The attention mask of a step has this many rows, each as long as the cache.
MASK_BYTES = 128 << 20
STOP_SECONDS = 5.0
SHRINKING = 0.9
_TURNS = "turns"


@dataclass(frozen=True)
class CacheSize:
    """The paged cache in bytes and in tokens, and how many sequences share one step.

    With fewer than `least` tokens the model is better off without one.
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
        """Rows of the mask that fit; never fewer than one for each sequence."""
        rows = MASK_BYTES // (4 * self.tokens)
        return max(self.sequences, MIN_BATCH_TOKENS, min(BATCH_TOKENS, rows))


class ContinuousBatching:
    """A Runner (see runner.py)."""

    def __init__(self, model: Any, size: CacheSize, adapters: Adapters, *, shares_prefixes: bool) -> None:
        """Raises whatever transformers raises where it cannot run this architecture so."""
        self._sequences: dict[str, Sequence] = {}
        self._adapters = adapters
        self._lock = threading.Lock()
        # transformers lets several threads into one pause.
        self._model_lock = threading.Lock()
        self._chooser = _Chooser(self._sequences, self._end_early)
        SCHEDULER_MAPPING[_TURNS] = partial(AdapterRoundRobin, find=self._wanted, enter=adapters.enter)
        self.size, self._manager = self._fitted(model, size, shares_prefixes=shares_prefixes)
        self._manager.start()

    def _fitted(self, model: Any, size: CacheSize, *, shares_prefixes: bool) -> tuple[CacheSize, Any]:
        """The manager with its pages, fewer than planned where transformers sees no memory for them all."""
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
                logger.warning("the cache is made smaller, %d tokens: %s", size.tokens, error)
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
            raise RunnerDead("the batch's thread has ended")

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
        # Who was cancelled a moment ago holds pages until the next step, which then would keep them.
        batch = self._manager.batch_processor
        batch.fail_all_requests(EvictedError("the model's weights were replaced"))
        batch.scheduler.block_new_requests = False
        batch.cache.evict_cached_blocks()

    def close(self) -> None:
        self._manager.stop(block=True, timeout=STOP_SECONDS, hard_stop=True)

    def _end_early(self, sequence: Sequence) -> None:
        """It has ended for a reason that transformers does not know of."""
        self._manager.cancel_request(sequence.name)

    def _wanted(self, name: str) -> Sequence | None:
        """A sequence that can go on; None where its client has left, or its adapter has gone."""
        sequence = self._sequences.get(name)
        if sequence is None or sequence.adapter is None or sequence.adapter in self._adapters:
            return sequence
        self._fail(name, f"its adapter '{sequence.adapter}' has been removed")
        return None

    def _fail(self, name: str, reason: str) -> None:
        sequence = self._drop(name)
        if sequence is not None:
            sequence.tell(Failure(reason))

    def _drop(self, name: str) -> Sequence | None:
        with self._lock:
            return self._sequences.pop(name, None)


class EvictedError(Exception):
    """A sequence has lost its pages."""


class AdapterRoundRobin(FIFOScheduler):  # type: ignore[misc]
    """One adapter a step, in turn: its weights are in the model's layers, for every row of a batch alike.

    Pages are shared between sequences of the bare model only: an adapter's hold other keys and values.
    """

    def __init__(
        self,
        *sizes: Any,
        find: Callable[[str], Sequence | None],
        enter: Callable[[str | None], None],
        **named: Any,
    ) -> None:
        """`find`: the sequence of a name, None where nobody waits for it any more."""
        super().__init__(*sizes, **named)
        self._find = find
        self._enter = enter
        self._shares = self.cache.use_prefix_sharing
        self._turn: str | None = None
        self._adapters: dict[str, str | None] = {}

    def schedule_batch(self, token_budget: int, cache_budget: int) -> Any:
        """A turn for which the cache has no room is left out; where it has room for none, one that holds some
        of it is reported, so that transformers can put its sequences off."""
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
        """Their pages let in again who was put off; transformers does that at orderly ends only."""
        cleared = super().clear_cancelled_requests()
        if cleared:
            self.block_new_requests = False
        return cleared

    def _look_who_is_there(self) -> None:
        """Who has left since the step's orders were read is in no turn, and gives its pages back now."""
        found = {name: self._find(name) for name in (*self.active_requests, *self.waiting_requests)}
        for name, sequence in found.items():
            if sequence is None:
                self.set_request_cancellation(name)
        self.clear_cancelled_requests()
        self._adapters = {name: sequence.adapter for name, sequence in found.items() if sequence is not None}

    def _adapters_of(self, names: Iterable[str]) -> list[str | None]:
        return list(dict.fromkeys(self._adapters[name] for name in names))

    def _turns(self) -> list[str | None]:
        """Adapters that are wanted, the next in turn first; never empty."""
        waiting = () if self.block_new_requests else self.waiting_requests
        adapters = self._adapters_of((*self.active_requests, *waiting))
        if self._turn in adapters:
            after = adapters.index(self._turn) + 1
            adapters = adapters[after:] + adapters[:after]
        return adapters or [None]


class _Chooser(ContinuousBatchingLogitsProcessor):  # type: ignore[misc]
    """Chooses the tokens, and leaves to the argmax that follows one finite logit a row."""

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
        # A step may bring logits for nobody (the first piece of a prompt), and for one who has just left.
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
    """Takes failures only: tokens have been sent by then."""

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
        # The size leaves what others need: transformers is to keep none of it free once more.
        max_memory_percent=1.0,
        allow_block_sharing=shares_prefixes,
        auto_switch_to_flash=False,
        use_async_batching=False,
        use_cuda_graph=False,
        scheduler_type=_TURNS,
    )


def _put_in(manager: Any, chooser: _Chooser) -> None:
    """As transformers adds a processor of its own, which it does from a generation config only."""
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
