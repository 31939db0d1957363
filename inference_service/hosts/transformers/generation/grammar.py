"""Grammars for structured output, through xgrammar: JSON, JSON schemas, regular expressions, choices, EBNF.

A grammar is compiled once and shared; each sequence has a matcher of its own.
"""

import json
import re
from collections.abc import Callable
from typing import Any

import torch
import xgrammar

# Of compiled grammars; the least recently used are evicted.
CACHE_BYTES = 64 << 20
COMPILER_THREADS = 2
# In a row: a small model may write only whitespace until it reaches max_tokens.
MAX_WHITESPACE = 24
# Characters of a grammar's source: a megabyte takes minutes to compile.
MAX_SOURCE = 64 << 10


# xgrammar's messages begin with the time and the source line.
_PLACE = re.compile(r"^\[[\d:]+\] \S+:\d+: ")


class BadGrammar(Exception):
    """A grammar is invalid or not supported. The message says why."""


class Grammar:
    """A compiled grammar."""

    def __init__(self, compiled: Any, vocabulary: int) -> None:
        self._compiled = compiled
        self._vocabulary = vocabulary

    def matcher(self, stop_tokens: frozenset[int]) -> "Matcher":
        return Matcher(self._compiled, self._vocabulary, stop_tokens)


class Matcher:
    """Which tokens may come next in one sequence."""

    def __init__(self, compiled: Any, vocabulary: int, stop_tokens: frozenset[int]) -> None:
        self._matcher = xgrammar.GrammarMatcher(compiled, override_stop_tokens=sorted(stop_tokens) or None)
        self._vocabulary = vocabulary
        self._bits = xgrammar.allocate_token_bitmask(1, vocabulary)
        self._shifts = torch.arange(32, dtype=torch.int32)

    def allowed(self) -> torch.Tensor:
        """A mask of bools [vocabulary] on the CPU."""
        self._matcher.fill_next_token_bitmask(self._bits)
        spread = (self._bits[0].unsqueeze(-1) >> self._shifts) & 1
        return spread.flatten()[: self._vocabulary].bool()

    @property
    def ended(self) -> bool:
        """Whether the text is complete: no token may follow."""
        return bool(self._matcher.is_terminated())

    def accept(self, token: int) -> bool:
        """Whether the token was allowed."""
        return bool(self._matcher.accept_token(token))


class Grammars:
    """Compiles for one tokenizer. Compiling may take seconds: do not call it on an event loop."""

    def __init__(self, tokenizer: Any, vocabulary: int, stop_tokens: frozenset[int]) -> None:
        """`vocabulary`: the number of logits, which may exceed the number of the tokenizer's tokens.

        Raises BadGrammar if xgrammar does not support the tokenizer.
        """
        try:
            info = xgrammar.TokenizerInfo.from_huggingface(
                tokenizer, vocab_size=vocabulary, stop_token_ids=sorted(stop_tokens) or None
            )
        except Exception as error:  # xgrammar raises many types for an unknown kind of tokenizer
            raise BadGrammar(f"xgrammar does not support this model's tokenizer: {error}") from error
        self._vocabulary = vocabulary
        self._compiler = xgrammar.GrammarCompiler(
            info, max_threads=COMPILER_THREADS, cache_limit_bytes=CACHE_BYTES
        )

    def json(self) -> Grammar:
        """Any JSON object."""
        return self.schema({"type": "object"})

    def schema(self, schema: Any, *, compact: bool = False) -> Grammar:
        """JSON that matches a schema. Raises BadGrammar. `compact`: without whitespace."""
        written = schema if isinstance(schema, str) else json.dumps(schema)
        return self._compiled(
            written,
            lambda: self._compiler.compile_json_schema(
                written, any_whitespace=not compact, max_whitespace_cnt=None if compact else MAX_WHITESPACE
            ),
        )

    def regex(self, pattern: str) -> Grammar:
        """Text that matches a regular expression. Raises BadGrammar."""
        return self._compiled(pattern, lambda: self._compiler.compile_regex(pattern))

    def choice(self, texts: list[str]) -> Grammar:
        """Exactly one of `texts`. Raises BadGrammar."""
        return self.ebnf("root ::= " + " | ".join(json.dumps(text, ensure_ascii=False) for text in texts))

    def ebnf(self, text: str) -> Grammar:
        """Text that matches an EBNF grammar. Raises BadGrammar."""
        return self._compiled(text, lambda: self._compiler.compile_grammar(text))

    def _compiled(self, source: str, compile_it: Callable[[], Any]) -> Grammar:
        if len(source) > MAX_SOURCE:
            raise BadGrammar(f"it has {len(source)} characters, the maximum is {MAX_SOURCE}")
        try:
            return Grammar(compile_it(), self._vocabulary)
        except Exception as error:  # xgrammar raises RuntimeError, ValueError and its own types
            reason = str(error).strip().splitlines()[-1] if str(error) else repr(error)
            raise BadGrammar(_PLACE.sub("", reason)) from error
