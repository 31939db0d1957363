"""Incremental detokenization, correct for characters that span several tokens, and stop strings. Pure."""

from functools import lru_cache
from typing import Any

# A decoder's replacement for bytes that are not a complete character.
_UNFINISHED = "�"
# Tokens of the prompt decoded before the first new one: some tokenizers add a space only between two tokens.
CONTEXT_TOKENS = 6
KEPT_TEXTS = 1 << 16


class Detokenizer:
    """The text of the tokens so far; an incomplete character is held back until its bytes arrive."""

    def __init__(self, tokenizer: Any, prompt: list[int], *, skip_special: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skip_special = skip_special
        self._ids = prompt[-CONTEXT_TOKENS:]
        self._prefix = 0
        self._read = len(self._ids)

    def add(self, token: int) -> str:
        """The text that this token completes."""
        self._ids.append(token)
        return self._advance(final=False)

    def finish(self) -> str:
        """The remaining text, without bytes that never became a character."""
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
    """Holds back text that may begin a stop string, and ends the text before the first stop string."""

    def __init__(self, stops: list[str], *, keep: bool = False) -> None:
        """`keep`: include the stop string in the text."""
        self._stops = stops
        self._keep = keep
        self._held = ""
        self.found = False

    def add(self, text: str, *, may_end: bool = True) -> str:
        """The text that can be sent now, none after a stop string. `may_end`: stop strings count already."""
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
        """The text that was held back but did not become a stop string."""
        shown, self._held = ("" if self.found else self._held), ""
        return shown

    def _unsure(self) -> int:
        """The number of characters at the end that may begin a stop string."""
        longest = max(map(len, self._stops), default=1) - 1
        for length in range(min(longest, len(self._held)), 0, -1):
            tail = self._held[-length:]
            if any(stop.startswith(tail) for stop in self._stops):
                return length
        return 0


class TokenTexts:
    """Single tokens as text and as bytes."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._byte_of = _bytes_by_character() if _is_byte_level(tokenizer) else None
        # A few thousand tokens account for most calls.
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
    """GPT-2's byte alphabet: printable bytes map to themselves, the others to characters after Latin-1.

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
