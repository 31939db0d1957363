"""Text as it comes: characters of several tokens, stop strings of any length, anywhere."""

import itertools
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from inference_service.hosts.transformers.generation.sequence import Finish, Token
from inference_service.hosts.transformers.openai.choice import Choice, TextChunk
from inference_service.hosts.transformers.openai.detokenizer import Detokenizer, StopFinder, TokenTexts
from tests.fixtures.checkpoints import base_checkpoint

TEXTS = ("plain words", "🦊🚀 emoji", "你好世界", "naïve café — ✓ ½", "a\n\n  b\t", "👩‍👩‍👧‍👦 e\u0301")


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(base_checkpoint())


@pytest.mark.parametrize("text", TEXTS)
def test_pieces_are_whole_characters_and_make_up_the_text(tokenizer: Any, text: str) -> None:
    prompt = tokenizer("Say: ").input_ids
    detokenizer = Detokenizer(tokenizer, prompt)
    ids = tokenizer(text, add_special_tokens=False).input_ids
    pieces = [detokenizer.add(token) for token in ids]
    assert "".join(pieces) + detokenizer.finish() == text
    assert not any("�" in piece for piece in pieces)


def test_bytes_that_never_become_a_character_are_not_shown(tokenizer: Any) -> None:
    ids = tokenizer("so 🦊", add_special_tokens=False).input_ids
    detokenizer = Detokenizer(tokenizer, [1])
    assert "".join(map(detokenizer.add, ids[:-1])) + detokenizer.finish() in ("so", "so ")


def test_tokens_as_bytes(tokenizer: Any) -> None:
    texts = TokenTexts(tokenizer)
    for text in TEXTS:
        ids = tokenizer(text, add_special_tokens=False).input_ids
        assert b"".join(map(texts.content, ids)) == text.encode()


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.text("abc", max_size=30), st.lists(st.text("abc", min_size=1, max_size=5), max_size=3), st.data())
def test_nothing_of_a_stop_string_ever_shows(text: str, stops: list[str], data: st.DataObject) -> None:
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=8)))
    parts = [text[start:end] for start, end in itertools.pairwise([0, *cuts, len(text)])]
    finder = StopFinder(stops)
    shown = "".join(finder.add(part) for part in parts) + finder.finish()
    # Where several stop strings overlap, the one that is complete first counts.
    ends = [(text.find(stop) + len(stop), text.find(stop)) for stop in stops if stop in text]
    if not ends:
        assert (shown, finder.found) == (text, False)
        return
    assert finder.found
    assert text.startswith(shown)
    assert not any(stop in shown for stop in stops)
    assert len(shown) >= min(at for _, at in ends)


def test_a_kept_stop_string_is_part_of_the_text() -> None:
    finder = StopFinder(["END"], keep=True)
    assert [finder.add("a E"), finder.add("N"), finder.add("Dx"), finder.finish()] == ["a ", "", "END", ""]


def choice(tokenizer: Any, *stops: str) -> Choice:
    return Choice(0, Detokenizer(tokenizer, [1]), StopFinder(list(stops)))


def test_a_choice_tells_text_and_tokens_together(tokenizer: Any) -> None:
    ids = tokenizer("one two STOP three", add_special_tokens=False).input_ids
    taking = choice(tokenizer, "STOP")
    chunks: list[TextChunk] = []
    for token in ids:
        if not taking.finished:
            chunk = taking.take(Token(token))
            chunks += [] if chunk is None else [chunk]
    assert "".join(chunk.text for chunk in chunks) == "one two "
    assert chunks[-1].finish == "stop"
    assert taking.finished


def test_the_mark_that_ends_an_answer_is_not_its_text(tokenizer: Any) -> None:
    taking = choice(tokenizer)
    chunk = taking.take(Token(tokenizer.eos_token_id, finish=Finish.STOP))
    assert chunk is not None
    assert (chunk.text, chunk.finish, len(chunk.tokens)) == ("", "stop", 1)
    assert taking.tokens == 1


def test_a_stop_string_counts_only_once_it_may() -> None:
    stops = StopFinder(["END"])
    shown = stops.add("an END ", may_end=False) + stops.add("of EN", may_end=False)
    assert shown == "an END of "
    assert stops.add("D there") == ""
    assert stops.found
