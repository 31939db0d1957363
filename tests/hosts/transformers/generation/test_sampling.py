"""From logits to tokens, against plain arithmetic."""

import math
from collections import Counter
from typing import Any

import pytest
import torch

from inference_service.hosts.transformers.generation.sampling import choose
from inference_service.hosts.transformers.generation.sequence import Finish, SamplingParams, Sequence

LOGITS = torch.tensor([2.0, 1.0, 0.5, -1.0, -3.0])


def sequence(prompt: list[int] | None = None, **params: Any) -> Sequence:
    return Sequence("s", prompt or [0], SamplingParams(100, **params), lambda news: None)


def draws(count: int, **params: Any) -> Counter[int]:
    one = sequence(seed=1, **params)
    return Counter(choose(LOGITS.unsqueeze(0), [one])[0].id for _ in range(count))


def shares(logits: torch.Tensor) -> list[float]:
    found: list[float] = torch.softmax(logits, dim=-1).tolist()
    return found


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_draws_follow_the_distribution(temperature: float) -> None:
    found = draws(4000, temperature=temperature)
    for token, share in enumerate(shares(LOGITS / temperature)):
        assert found[token] / 4000 == pytest.approx(share, abs=0.03)


def test_top_k_top_p_and_min_p_cut_the_tail() -> None:
    first, second, third, *_ = shares(LOGITS)
    assert set(draws(500, temperature=1, top_k=2)) == {0, 1}
    assert set(draws(500, temperature=1, top_p=first + second - 0.01)) == {0, 1}
    assert set(draws(500, temperature=1, top_p=first + second + 0.01)) == {0, 1, 2}
    assert set(draws(500, temperature=1, min_p=third / first + 0.01)) == {0, 1}
    assert set(draws(500, temperature=1, top_p=0.0)) == {0}
    ratio = draws(4000, temperature=1, top_k=2)
    assert ratio[0] / 4000 == pytest.approx(first / (first + second), abs=0.03), "what is left is whole again"


def test_each_row_has_its_own_params() -> None:
    rows = [
        sequence(temperature=0),
        sequence(temperature=0, logit_bias={4: 100.0}),
        sequence(temperature=1, top_k=1),
        sequence(temperature=0, logprobs=2),
        sequence(temperature=0, min_tokens=1, stop_tokens=frozenset({0})),
    ]
    tokens = choose(LOGITS.expand(5, -1).clone(), rows)
    assert [token.id for token in tokens] == [0, 4, 0, 0, 1]
    assert [token.logprob is None for token in tokens] == [True, True, True, False, True]
    assert [token for token, _ in tokens[3].top] == [0, 1]
    assert [logprob for _, logprob in tokens[3].top] == pytest.approx(
        [math.log(each) for each in shares(LOGITS)[:2]]
    )


def test_log_probabilities_are_those_before_any_wish() -> None:
    (token,) = choose(LOGITS.unsqueeze(0), [sequence(temperature=0, logit_bias={3: 50.0}, logprobs=1)])
    assert token.id == 3
    assert token.logprob == pytest.approx(math.log(shares(LOGITS)[3]))
    assert token.top[0][0] == 0


def test_penalties_look_at_what_was_generated_and_repetition_at_the_prompt() -> None:
    frequent = sequence(temperature=0, frequency_penalty=0.6)
    assert [choose(LOGITS.unsqueeze(0), [frequent])[0].id for _ in range(4)] == [0, 0, 1, 0]
    present = sequence(temperature=0, presence_penalty=1.2)
    assert [choose(LOGITS.unsqueeze(0), [present])[0].id for _ in range(3)] == [0, 1, 0]
    repeated = sequence(prompt=[0], temperature=0, repetition_penalty=2.5)
    assert choose(LOGITS.unsqueeze(0), [repeated])[0].id == 1


def test_equal_seeds_draw_alike_whoever_is_beside() -> None:
    alone = sequence(temperature=1, seed=7)
    expected = [choose(LOGITS.unsqueeze(0), [alone])[0].id for _ in range(20)]
    again, other = sequence(temperature=1, seed=7), sequence(temperature=1)
    rows = LOGITS.expand(2, -1).clone()
    assert [choose(rows, [other, again])[1].id for _ in range(20)] == expected
    negative = sequence(temperature=1, seed=-7)
    assert [choose(LOGITS.unsqueeze(0), [negative])[0].id for _ in range(20)] != expected


def test_the_last_token_says_why() -> None:
    stopped = sequence(temperature=0, stop_tokens=frozenset({0}))
    assert choose(LOGITS.unsqueeze(0), [stopped])[0].finish is Finish.STOP
    short = Sequence("s", [0], SamplingParams(2, temperature=0), lambda news: None)
    assert [choose(LOGITS.unsqueeze(0), [short])[0].finish for _ in range(2)] == [None, Finish.LENGTH]


def test_the_logits_are_left_as_they_are() -> None:
    rows = LOGITS.unsqueeze(0).clone()
    choose(rows, [sequence(temperature=0.5, top_p=0.5, logit_bias={1: 3.0}, frequency_penalty=1.0)])
    assert torch.equal(rows, LOGITS.unsqueeze(0))


@pytest.mark.parametrize("other", [{"top_p": 0.9}, {"top_k": 3}, {"min_p": 0.01}, {"temperature": 0.0}])
def test_a_seed_draws_the_same_whoever_runs_beside_it(other: dict[str, Any]) -> None:
    logits = torch.tensor([-1.0, 0.5, 2.0, -3.0, 1.0])
    alone, accompanied = sequence(seed=5), sequence(seed=5)
    beside = sequence(seed=1, **other)
    for _ in range(200):
        (expected,) = choose(logits.unsqueeze(0), [alone])
        _, found = choose(logits.expand(2, -1), [beside, accompanied])
        assert found.id == expected.id
