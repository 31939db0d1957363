"""One sequence: its parameters, its output so far, and the sink that receives it.

Knows no model; modified only by its runner, in one thread.
"""

import random
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from inference_service.hosts.transformers.generation.grammar import Grammar


class Finish(StrEnum):
    """OpenAI's finish reasons."""

    STOP = "stop"
    LENGTH = "length"


@dataclass(frozen=True)
class SamplingParams:
    """How the tokens of one sequence are chosen.

    `temperature` 0: the most likely token. `top_k` 0: all tokens. `logprobs`: None for none, else the number
    of most likely tokens to report besides the chosen one. `stop_tokens` end the sequence.
    """

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None
    min_tokens: int = 0
    stop_tokens: frozenset[int] = frozenset()
    logprobs: int | None = None

    @property
    def ranks(self) -> bool:
        """Whether tokens are filtered by rank."""
        return bool(self.top_k or self.top_p < 1)

    @property
    def penalises(self) -> bool:
        """Whether a token's probability depends on the tokens before it."""
        return bool(self.presence_penalty or self.frequency_penalty or self.repetition_penalty != 1.0)


@dataclass(frozen=True)
class Token:
    """One chosen token. Log probabilities are natural logarithms, before any sampling parameter applies."""

    id: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()
    finish: Finish | None = None


@dataclass(frozen=True)
class Failure:
    """The engine cannot continue a sequence. `refused`: because of its parameters."""

    reason: str
    refused: bool = False


Sink = Callable[[Token | Failure], None]


class Sequence:
    """A prompt that is being continued. `sink` is called in the thread that chooses the tokens."""

    def __init__(
        self,
        name: str,
        prompt: list[int],
        params: SamplingParams,
        sink: Sink,
        *,
        adapter: str | None = None,
        grammar: "Grammar | None" = None,
    ) -> None:
        self.name = name
        self.prompt = prompt
        self.params = params
        self.adapter = adapter
        self.cancelled = False
        self.failure: Failure | None = None
        self.output: list[int] = []
        self.counts: Counter[int] = Counter()
        self.matcher = None if grammar is None else grammar.matcher(params.stop_tokens)
        self._sink = sink
        # A string: Python ignores the sign of an integer seed.
        self._random = random.Random(None if params.seed is None else str(params.seed))  # noqa: S311

    def draw(self) -> float:
        """The sequence's next random number in [0, 1), independent of the batch."""
        return self._random.random()

    def take(self, token: int, logprob: float | None, top: tuple[tuple[int, float], ...]) -> Token:
        """Append the chosen token; `finish` is set if it is the last."""
        self.output.append(token)
        self.counts[token] += 1
        if self.matcher is not None and self.failure is None and not self.matcher.accept(token):
            self.failure = Failure("the grammar does not allow any token here", refused=True)
        return Token(token, logprob, top, self._finish(token))

    def tell(self, news: Token | Failure) -> None:
        if not self.cancelled:
            self._sink(news)

    def _finish(self, token: int) -> Finish | None:
        if token in self.params.stop_tokens or (self.matcher is not None and self.matcher.ended):
            return Finish.STOP
        return Finish.LENGTH if len(self.output) >= self.params.max_tokens else None
