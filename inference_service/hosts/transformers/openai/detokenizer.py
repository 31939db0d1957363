"""From tokens to text as they come, right for characters of several tokens; strings that end it. Pure."""

from functools import lru_cache
from typing import Any

# What a decoder puts in the place of bytes that are no character yet.
_UNFINISHED = "�"
# Tokens of the prompt before the first new one: some tokenizers write a space between two tokens only.
CONTEXT_TOKENS = 6
KEPT_TEXTS = 1 << 16


class Detokenizer:
    """Text of the tokens so far; a character that lacks bytes waits for them."""

    def __init__(self, tokenizer: Any, prompt: list[int], *, skip_special: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skip_special = skip_special
        self._ids = prompt[-CONTEXT_TOKENS:]
        self._prefix = 0
        self._read = len(self._ids)

    def add(self, token: int) -> str:
        """The text that this token has completed."""
        self._ids.append(token)
        return self._advance(final=False)

    def finish(self) -> str:
        """What is left, without the bytes that never became a character."""
        return self._advance(final=True).rstrip(_UNFINISHED)

    def _advance(self, *, final: bool) -> str:
        shown = self._decode(self._ids[self._prefix : self._read])
        text = self._decode(self._ids[self._prefix :])
        if len(text) <= len(shown) or (text.endswith(_UNFINISHED) and not final):
            return ""
        self._prefix, self._read = self._read, len(self._ids)
        return text[len(shown) :]

    def _decode(self, ids: list[int]) -> str:
        text: str = self._tokenizer.decode(
            ids, skip_special_tokens=self._skip_special, clean_up_tokenization_spaces=False
        )
        return text


class StopFinder:
    """Holds back what may be the beginning of a stop string, and ends the text before the first one."""

    def __init__(self, stops: list[str], *, keep: bool = False) -> None:
        """`keep`: the stop string itself is part of the text."""
        self._stops = stops
        self._keep = keep
        self._held = ""
        self.found = False

    def add(self, text: str, *, may_end: bool = True) -> str:
        """What may be shown now; nothing after a stop string was found. `may_end`: whether one counts yet."""
        if self.found:
            return ""
        self._held += text
        ends = may_end and [(at, stop) for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if ends:
            self.found = True
            at, stop = min(ends, key=lambda end: end[0])
            return self._held[: at + len(stop) if self._keep else at]
        safe = len(self._held) - self._unsure()
        shown, self._held = self._held[:safe], self._held[safe:]
        return shown

    def finish(self) -> str:
        """What was held back in vain."""
        shown, self._held = ("" if self.found else self._held), ""
        return shown

    def _unsure(self) -> int:
        """Characters at the end with which a stop string may begin."""
        longest = max(map(len, self._stops), default=1) - 1
        for length in range(min(longest, len(self._held)), 0, -1):
            tail = self._held[-length:]
            if any(stop.startswith(tail) for stop in self._stops):
                return length
        return 0


class TokenTexts:
    """Single tokens as text and as the bytes that they stand for."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._byte_of = _bytes_by_character() if _is_byte_level(tokenizer) else None
        # The same few thousand come again and again.
        self.text = lru_cache(KEPT_TEXTS)(self._text)

    def _text(self, token: int) -> str:
        decoded: str = self._tokenizer.decode([token], clean_up_tokenization_spaces=False)
        return decoded

    def content(self, token: int) -> bytes:
        piece = self._tokenizer.convert_ids_to_tokens(token)
        if isinstance(piece, str):
            if self._byte_of is not None and all(character in self._byte_of for character in piece):
                return bytes(self._byte_of[character] for character in piece)
            if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
                return bytes([int(piece[3:5], 16)])
        return self.text(token).encode(errors="replace")


def _is_byte_level(tokenizer: Any) -> bool:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    return "ByteLevel" in repr(getattr(backend, "decoder", None))


def _bytes_by_character() -> dict[str, int]:
    """GPT-2's alphabet for bytes: printable ones are themselves, the others are put behind Latin-1.

    https://github.com/openai/gpt-2/blob/master/src/encoder.py
    """
    printable = [
        *range(ord("!"), ord("~") + 1),
        *range(ord("¡"), ord("¬") + 1),
        *range(ord("®"), ord("ÿ") + 1),
    ]
    others = [byte for byte in range(256) if byte not in printable]
    found = {chr(byte): byte for byte in printable}
    return found | {chr(256 + number): byte for number, byte in enumerate(others)}
