"""A model, its tokenizer and its runner: the one object that the host's HTTP layer uses."""

import asyncio
import itertools
import logging
import math
import queue
import threading
import time
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from inference_service.hosts.phases import enter_phase
from inference_service.hosts.tokenizer_files import tokenize_alike
from inference_service.hosts.transformers.generation import weights
from inference_service.hosts.transformers.generation.adapters import Adapters
from inference_service.hosts.transformers.generation.checkpoint import (
    Bounds,
    context,
    generation_config,
    longest_token,
    sampling_defaults,
    stop_tokens,
    token_bytes,
)
from inference_service.hosts.transformers.generation.continuous_batching import CacheSize, ContinuousBatching
from inference_service.hosts.transformers.generation.grammar import Grammars
from inference_service.hosts.transformers.generation.prompt_logprobs import forward, plain_attention, score
from inference_service.hosts.transformers.generation.runner import Runner
from inference_service.hosts.transformers.generation.sampling import choose
from inference_service.hosts.transformers.generation.sequence import (
    Failure,
    SamplingParams,
    Sequence,
    Sink,
    Token,
)
from inference_service.hosts.transformers.generation.sequential import Sequential
from inference_service.hosts.transformers.generation.threads import apart, apart_from_loop
from inference_service.hosts.transformers.generation.weights import Placement
from inference_service.machine.device import Device, DeviceKind
from inference_service.machine.memory import free_bytes

logger = logging.getLogger(__name__)

# A context that suits most requests; memory to score this many is reserved (same number in pool/budget.py).
ENOUGH_TOKENS = 4096
SPARE_BYTES = 512 << 20
WEIGHT_CHECK_TOKENS = 12
WEIGHT_CHECK_TOP = 20
WEIGHT_CHECK_STEPS = 3
# Tolerance between a batch's log probabilities and those of a plain forward, which computes in another order;
# ROUNDED if intermediate values are rounded to 16 bits.
EXACT, ROUNDED = 0.02, 0.5


@dataclass(frozen=True)
class EngineOptions:
    """How to run a checkpoint. `cache_bytes`: for the KV cache; `max_model_len` None: as long as possible."""

    place: Placement
    cache_bytes: int
    max_model_len: int | None
    sequences: int
    sampling: dict[str, Any] = field(default_factory=dict)
    shares_prefixes: bool = True


class NoRoom(Exception):
    """Not enough memory for a request. The message says how much it needs."""


class EngineFailed(Exception):
    """The engine cannot continue a request, or has failed altogether."""


class Engine:
    """The constructor blocks for seconds."""

    def __init__(self, directory: Path, options: EngineOptions) -> None:
        self.options = options
        apart(lambda: self._build(directory))

    def _build(self, directory: Path) -> None:
        enter_phase("weights")
        self.model = weights.load(directory, self.options.place)
        self.adapters = Adapters(self.model)
        self._names = itertools.count(1)
        self._scoring = asyncio.Lock()
        self._directory = directory
        self._read_tokenizer()
        self._take_in(directory)
        enter_phase("warm-up")
        self.runner, self.limitation = self._choose_runner()

    def _read_tokenizer(self) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(
            self._directory, local_files_only=True, trust_remote_code=False
        )
        self._grammars: Grammars | None = None
        self._longest_token = longest_token(self.tokenizer)

    def _take_in(self, directory: Path) -> None:
        """Read the rest of the checkpoint, besides its weights and tokenizer."""
        generation = generation_config(directory)
        self.defaults = sampling_defaults(generation) | self.options.sampling
        self.vocabulary = self._count_logits()
        self.stop_tokens = stop_tokens(self.tokenizer, generation, self.model.config, self.vocabulary)

    def _count_logits(self) -> int:
        head = self.model.get_output_embeddings()
        return int(getattr(head, "out_features", 0) or self.model.config.get_text_config().vocab_size)

    @property
    def max_model_len(self) -> int:
        """Tokens of a prompt and its continuation together."""
        longest = [self.runner.size.tokens] if isinstance(self.runner, ContinuousBatching) else []
        return min([*longest, self.options.max_model_len or context(self.model.config)])

    @property
    def bounds(self) -> Bounds:
        """Limits of a prompt."""
        return Bounds(self.vocabulary, self.max_model_len, self.max_model_len * self._longest_token)

    @property
    def grammars(self) -> Grammars:
        """Created on first use, because reading the vocabulary takes a moment. Blocks."""
        if self._grammars is None:
            self._grammars = Grammars(self.tokenizer, self.vocabulary, self.stop_tokens)
        return self._grammars

    def submit(
        self,
        prompt: list[int],
        params: SamplingParams,
        sink: Sink,
        *,
        adapter: str | None = None,
        grammar: Any = None,
    ) -> Sequence:
        """Start a sequence. `sink` is called on the running event loop. Raises RunnerDead."""
        loop = asyncio.get_running_loop()

        def tell(news: Token | Failure) -> None:
            with suppress(RuntimeError):  # the loop is closed
                loop.call_soon_threadsafe(sink, news)

        sequence = Sequence(
            f"sequence-{next(self._names)}", prompt, params, tell, adapter=adapter, grammar=grammar
        )
        self.runner.submit(sequence)
        return sequence

    async def score(
        self, prompt: list[int], adapter: str | None, top: int, params: list[SamplingParams]
    ) -> tuple[list[Token], list[Token]]:
        """Returns the prompt's log probabilities, and for each of `params` the next token.

        Raises NoRoom and RunnerDead.
        """
        unwanted = threading.Event()
        # One at a time: each holds its own keys and values, and memory is reserved for one.
        async with self._scoring:
            self._check_room(len(prompt))
            try:
                return await apart_from_loop(lambda: self._score(prompt, adapter, top, params, unwanted))
            finally:
                unwanted.set()

    def _check_room(self, tokens: int) -> None:
        """Check the memory for the keys and values of a prompt that exceeds the reserve."""
        needed = tokens * self._cache_size.token_bytes + SPARE_BYTES
        free = (
            free_bytes(Device(DeviceKind(self.options.place.device), "")) if tokens > ENOUGH_TOKENS else None
        )
        if free is not None and needed > free:
            raise NoRoom(
                f"The log probabilities of {tokens} prompt tokens need {needed >> 20} MiB of memory, but "
                f"only {free >> 20} MiB are free."
            )

    def _score(
        self,
        prompt: list[int],
        adapter: str | None,
        top: int,
        params: list[SamplingParams],
        unwanted: threading.Event,
    ) -> tuple[list[Token], list[Token]]:
        scored, logits = score(
            self.runner,
            self.adapters.enter,
            prompt,
            adapter,
            top,
            in_pieces=self.limitation is None or self.options.place.spread,
            vocabulary=self.vocabulary,
            unwanted=unwanted,
        )
        following = [Sequence("scored", prompt, each, lambda news: None) for each in params]
        return scored, choose(logits.expand(len(following), -1), following) if following else []

    async def weight_check(self) -> list[tuple[int, float]]:
        """The most likely tokens after a fixed prompt with their log probabilities, highest first.

        Raises ValueError if one is not finite.
        """
        (token,) = await self._collect(
            self._weight_check_prompt(), SamplingParams(1, temperature=0, logprobs=self._top())
        )
        if not all(math.isfinite(logprob) for _, logprob in token.top):
            raise ValueError("the weight check returned logits that are not finite: the weights are damaged")
        return sorted(token.top, key=lambda pair: (-pair[1], pair[0]))

    async def swap(self, directory: Path, options: EngineOptions) -> dict[str, float]:
        """Serve another checkpoint with the same tensor shapes. Returns the seconds of each phase.

        If it raises, the engine is unusable.
        """
        started = time.monotonic()
        sampling_defaults(generation_config(directory))
        await apart_from_loop(lambda: self._replace_weights(directory, options))
        replaced = time.monotonic()
        await apart_from_loop(lambda: self._follow(directory))
        return {"weights": replaced - started, "warm-up": time.monotonic() - replaced}

    def _replace_weights(self, directory: Path, options: EngineOptions) -> None:
        with self.runner.exclusive() as model:
            self.adapters.clear()
            self.runner.forget()
            weights.replace(model, directory, options.place)
        self.options = options

    def _follow(self, directory: Path) -> None:
        before, self._directory = self._directory, directory
        if not tokenize_alike(before, directory):
            self._read_tokenizer()
        self._take_in(directory)

    async def add_adapter(self, name: str, number: int, directory: Path) -> None:
        await apart_from_loop(lambda: self._exclusively(lambda: self.adapters.add(name, number, directory)))

    async def remove_adapter(self, name: str) -> None:
        await apart_from_loop(lambda: self._exclusively(lambda: self.adapters.remove(name)))

    def _exclusively(self, change: Callable[[], None]) -> None:
        with self.runner.exclusive():
            change()

    def __str__(self) -> str:
        place = self.options.place
        kind = "one at a time"
        if isinstance(self.runner, ContinuousBatching):
            kind = (
                f"continuous batching of {self.options.sequences}, cache_tokens={self.runner.size.tokens}, "
            )
            kind += f"enable_prefix_caching={self.options.shares_prefixes}"
        return (
            f"{kind}, device={place.device}, dtype=torch.{place.dtype}, int8={place.int8}, "
            f"max_seq_len={self.max_model_len}"
        )

    def close(self) -> None:
        self.runner.close()

    @property
    def _cache_size(self) -> CacheSize:
        config = self.model.config.get_text_config()
        return CacheSize(
            self.options.cache_bytes,
            token_bytes(config, self.model.dtype),
            self.options.sequences,
            least=min(ENOUGH_TOKENS, self.options.max_model_len or context(self.model.config)),
        )

    def _choose_runner(self) -> tuple[Runner, str | None]:
        """Continuous batching if transformers supports it; else sequential, and the reason."""
        reason: str | None = "the model is spread over several devices"
        if not self.options.place.spread:
            reason = self._try_continuous()
            if reason is None:
                return self._continuous, None
        logger.warning("requests are served one at a time: %s", reason)
        return Sequential(self.model, self.adapters.enter), f"requests are served one at a time: {reason}"

    def _try_continuous(self) -> str | None:
        """Why this architecture cannot be batched; None if it can, with the same results as alone."""
        kind = type(self.model).__name__
        attention = self.model.config._attn_implementation
        try:
            self._continuous = ContinuousBatching(
                self.model,
                self._cache_size,
                self.adapters,
                shares_prefixes=self.options.shares_prefixes,
            )
            reason = self._differs_from_plain(self._continuous)
        except Exception as error:
            reason = f"{type(error).__name__}: {error}".strip().splitlines()[0]
        if reason is None:
            return None
        if hasattr(self, "_continuous"):
            self._continuous.close()
            del self._continuous
        self.model.set_attn_implementation(attention)
        return f"continuous batching does not support {kind} ({reason})"

    def _differs_from_plain(self, runner: Runner) -> str | None:
        """An architecture with recurrent state may run in a batch and return nonsense."""
        prompt = self._weight_check_prompt()
        tokens = _run(runner, prompt, SamplingParams(WEIGHT_CHECK_STEPS, temperature=0, logprobs=1))
        with plain_attention(self.model):
            logits = forward(self.model, prompt + [token.id for token in tokens[:-1]])[len(prompt) - 1 :]
        expected = torch.log_softmax(logits, dim=-1)
        for row, token in zip(expected, tokens, strict=True):
            difference = abs(float(row[token.id]) - (token.logprob or 0.0))
            if not difference <= (EXACT if self.options.place.is_exact else ROUNDED):
                return f"its log probabilities are off by {difference:.2g}"
        return None

    def _weight_check_prompt(self) -> list[int]:
        count = min(WEIGHT_CHECK_TOKENS, max(1, context(self.model.config) - WEIGHT_CHECK_STEPS))
        return [(7919 * (number + 1)) % self.vocabulary for number in range(count)]

    def _top(self) -> int:
        return min(WEIGHT_CHECK_TOP, self.vocabulary)

    async def _collect(self, prompt: list[int], params: SamplingParams) -> list[Token]:
        return [token async for token in self.generate(prompt, params)]

    async def generate(self, prompt: list[int], params: SamplingParams) -> AsyncIterator[Token]:
        """Yield a sequence's tokens as they are chosen. Raises EngineFailed and RunnerDead."""
        news: asyncio.Queue[Token | Failure] = asyncio.Queue()
        sequence = self.submit(prompt, params, news.put_nowait)
        try:
            while True:
                token = await news.get()
                if isinstance(token, Failure):
                    raise EngineFailed(token.reason)
                yield token
                if token.finish is not None:
                    return
        finally:
            self.runner.cancel(sequence)


def _run(runner: Runner, prompt: list[int], params: SamplingParams) -> list[Token]:
    """Run a whole sequence and wait for it. Raises EngineFailed."""
    news: queue.SimpleQueue[Token | Failure] = queue.SimpleQueue()
    runner.submit(Sequence("trial", prompt, params, news.put))
    tokens: list[Token] = []
    while not tokens or tokens[-1].finish is None:
        token = news.get()
        if isinstance(token, Failure):
            raise EngineFailed(token.reason)
        tokens.append(token)
    return tokens
