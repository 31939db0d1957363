"""One of a request's answers while it is generated: tokens in, chunks of text with log probabilities out."""

from dataclasses import dataclass, field

from inference_service.hosts.transformers.generation.sequence import Finish, Token
from inference_service.hosts.transformers.openai.detokenizer import Detokenizer, StopFinder


@dataclass
class TextChunk:
    """New text of an answer. `tokens`: the tokens of this text; `finish` is set on the last chunk."""

    text: str
    tokens: list[Token] = field(default_factory=list)
    finish: str | None = None


class Choice:
    """Takes tokens in order, and ends at a stop string once it has `min_tokens`.

    `index`: its place among the request's answers.
    """

    def __init__(self, index: int, detokenizer: Detokenizer, stops: StopFinder, min_tokens: int = 0) -> None:
        self.index = index
        self.tokens = 0
        self.finished = False
        self._detokenizer = detokenizer
        self._stops = stops
        self._min_tokens = min_tokens
        self._waiting: list[Token] = []

    def take(self, token: Token) -> TextChunk | None:
        """The chunk that can be sent now; None while a character or a stop string may be incomplete."""
        self.tokens += 1
        text = ""
        # The end-of-sequence token has a log probability, which lm-eval needs, but no text.
        self._waiting.append(token)
        if token.finish is not Finish.STOP:
            may_end = self.tokens > self._min_tokens
            text = self._stops.add(self._detokenizer.add(token.id), may_end=may_end)
        if token.finish is not None and not self._stops.found:
            text += self._stops.add(self._detokenizer.finish())
            text += self._stops.finish()
        finish = "stop" if self._stops.found else token.finish and token.finish.value
        self.finished = finish is not None
        if not text and not self.finished:
            return None
        tokens, self._waiting = self._waiting, []
        return TextChunk(text, tokens, finish)
