"""One of a request's answers while it arrives: tokens in, pieces of text with their log probabilities out."""

from dataclasses import dataclass, field

from inference_service.hosts.transformers.generation.sequence import Finish, Token
from inference_service.hosts.transformers.openai.detokenizer import Detokenizer, StopFinder


@dataclass
class TextChunk:
    """What an answer has gained. `tokens` are those whose text it holds; `finish` is set on the last."""

    text: str
    tokens: list[Token] = field(default_factory=list)
    finish: str | None = None


class Choice:
    """Takes tokens in order; `index` among the answers of its request. No stop string ends it before it has
    `min_tokens`."""

    def __init__(self, index: int, detokenizer: Detokenizer, stops: StopFinder, min_tokens: int = 0) -> None:
        self.index = index
        self.tokens = 0
        self.finished = False
        self._detokenizer = detokenizer
        self._stops = stops
        self._min_tokens = min_tokens
        self._waiting: list[Token] = []

    def take(self, token: Token) -> TextChunk | None:
        """The piece that can be shown now; None while a character or a stop string may be unfinished."""
        self.tokens += 1
        text = ""
        # The mark that ends an answer has a log probability, which lm-eval counts on, but no text.
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
