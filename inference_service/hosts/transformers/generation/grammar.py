"""Grammars that an answer must follow: JSON and JSON schemas, regular expressions, choices, EBNF; xgrammar's.

A grammar is compiled once and shared; each sequence has a matcher of its own.
"""

import json
import re
from collections.abc import Callable
from typing import Any

import torch
import xgrammar

# Of compiled grammars; the least recently used ones give way.
CACHE_BYTES = 64 << 20
COMPILER_THREADS = 2
# In a row: a small model may write nothing else until its tokens are used up.
MAX_WHITESPACE = 24
# Characters of a grammar's source: one of a megabyte compiles for minutes.
MAX_SOURCE = 64 << 10


# The time and the line of its source, with which xgrammar's messages begin.
_PLACE = re.compile(r"^\[[\d:]+\] \S+:\d+: ")


class BadGrammar(Exception):
    """A grammar that cannot be followed; says why."""


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
        """Whether the text is whole: nothing may follow."""
        return bool(self._matcher.is_terminated())

    def accept(self, token: int) -> bool:
        """Whether the token was allowed."""
        return bool(self._matcher.accept_token(token))


class Grammars:
    """Compiles for one tokenizer. Compiling takes up to seconds: not on an event loop."""

    def __init__(self, tokenizer: Any, vocabulary: int, stop_tokens: frozenset[int]) -> None:
        """`vocabulary`: the number of logits, which may be more than the tokenizer has tokens.

        Raises BadGrammar where xgrammar cannot read the tokenizer.
        """
        try:
            info = xgrammar.TokenizerInfo.from_huggingface(
                tokenizer, vocab_size=vocabulary, stop_token_ids=sorted(stop_tokens) or None
            )
        except Exception as error:  # whatever it meets in a kind of tokenizer that it does not know
            raise BadGrammar(f"this model's tokenizer is unknown to xgrammar: {error}") from error
        self._vocabulary = vocabulary
        self._compiler = xgrammar.GrammarCompiler(
            info, max_threads=COMPILER_THREADS, cache_limit_bytes=CACHE_BYTES
        )

    def json(self) -> Grammar:
        """Any JSON object."""
        return self.schema({"type": "object"})

    def schema(self, schema: Any, *, compact: bool = False) -> Grammar:
        """JSON that a schema describes; raises BadGrammar. `compact`: without whitespace."""
        written = schema if isinstance(schema, str) else json.dumps(schema)
        return self._compiled(
            written,
            lambda: self._compiler.compile_json_schema(
                written, any_whitespace=not compact, max_whitespace_cnt=None if compact else MAX_WHITESPACE
            ),
        )

    def regex(self, pattern: str) -> Grammar:
        """Text that a regular expression describes; raises BadGrammar."""
        return self._compiled(pattern, lambda: self._compiler.compile_regex(pattern))

    def choice(self, texts: list[str]) -> Grammar:
        """One of some texts; raises BadGrammar."""
        return self.ebnf("root ::= " + " | ".join(json.dumps(text, ensure_ascii=False) for text in texts))

    def ebnf(self, text: str) -> Grammar:
        """Text that a grammar in EBNF describes; raises BadGrammar."""
        return self._compiled(text, lambda: self._compiler.compile_grammar(text))

    def _compiled(self, source: str, compile_it: Callable[[], Any]) -> Grammar:
        if len(source) > MAX_SOURCE:
            raise BadGrammar(f"it has {len(source)} characters, {MAX_SOURCE} are the most")
        try:
            return Grammar(compile_it(), self._vocabulary)
        except Exception as error:  # xgrammar raises RuntimeError, ValueError and its own
            reason = str(error).strip().splitlines()[-1] if str(error) else repr(error)
            raise BadGrammar(_PLACE.sub("", reason)) from error
