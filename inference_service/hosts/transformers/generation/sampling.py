"""From logits to tokens, for sequences with different parameters in one batch.

Parameters apply in vLLM's order: grammar and bias, penalties, temperature, min_p, top_k, top_p. Log
probabilities are those of the raw logits.
"""

import torch

from inference_service.hosts.transformers.generation.sequence import Failure, Sequence, Token

# A lower temperature means greedy sampling.
GREEDY_BELOW = 1e-5
_NEVER = float("-inf")
Likeliest = tuple[tuple[int, float], ...]


def choose(logits: torch.Tensor, sequences: list[Sequence]) -> list[Token]:
    """The next token of each sequence; `logits` float32 [sequences, vocabulary], not modified."""
    scores = _adjusted(logits, sequences)
    chosen = _draw(scores, sequences)
    logprobs = _logprobs(logits, chosen, sequences)
    return [
        sequence.take(token, *of_token)
        for sequence, token, of_token in zip(sequences, chosen, logprobs, strict=True)
    ]


def likeliest(logits: torch.Tensor, tokens: list[int], count: int) -> list[tuple[float, Likeliest]]:
    """For each row of logits: the log probability of one token, and the `count` most likely with theirs."""
    logprobs = torch.log_softmax(logits, dim=-1)
    index = torch.tensor(tokens, device=logits.device).unsqueeze(-1)
    own = logprobs.gather(-1, index).squeeze(-1).tolist()
    top = torch.topk(logprobs, count, dim=-1)
    rows = zip(top.indices.tolist(), top.values.tolist(), strict=True)
    return [
        (logprob, tuple(zip(ids, values, strict=True)))
        for logprob, (ids, values) in zip(own, rows, strict=True)
    ]


def _adjusted(logits: torch.Tensor, sequences: list[Sequence]) -> torch.Tensor:
    changed = [row for row, sequence in enumerate(sequences) if _changes(sequence)]
    if not changed:
        return logits
    scores = logits.clone()
    for row in changed:
        _change_or_fail(scores[row], sequences[row])
    return scores


def _change_or_fail(row: torch.Tensor, sequence: Sequence) -> None:
    """An error in one sequence's parameters fails that sequence, not its neighbours."""
    try:
        _change(row, sequence)
        if not bool(torch.isfinite(row.max())):
            raise ValueError("the request's sampling parameters leave no token to choose")
    except Exception as error:
        sequence.failure = Failure(str(error) or repr(error), refused=True)
        row.zero_()


def _changes(sequence: Sequence) -> bool:
    params = sequence.params
    return bool(
        sequence.matcher is not None
        or params.logit_bias
        or params.penalises
        or len(sequence.output) < params.min_tokens
    )


def _change(row: torch.Tensor, sequence: Sequence) -> None:
    params = sequence.params
    if sequence.matcher is not None:
        row.masked_fill_(~sequence.matcher.allowed().to(row.device), _NEVER)
    if len(sequence.output) < params.min_tokens and params.stop_tokens:
        stops = torch.tensor(sorted(params.stop_tokens), device=row.device)
        longer = row.index_fill(0, stops, _NEVER)
        # A grammar that is complete takes precedence over min_tokens: it allows no more tokens.
        if bool(torch.isfinite(longer.max())):
            row.copy_(longer)
    if params.logit_bias:
        index = torch.tensor(list(params.logit_bias), device=row.device)
        row[index] += torch.tensor(list(params.logit_bias.values()), device=row.device)
    if params.penalises:
        _penalise(row, sequence)


def _penalise(row: torch.Tensor, sequence: Sequence) -> None:
    """The repetition penalty includes the prompt; presence and frequency count generated tokens only."""
    params = sequence.params
    if params.repetition_penalty != 1.0:
        index = torch.tensor(sorted({*sequence.prompt, *sequence.counts}), device=row.device)
        seen = row[index]
        row[index] = torch.where(seen > 0, seen / params.repetition_penalty, seen * params.repetition_penalty)
    if sequence.counts and (params.presence_penalty or params.frequency_penalty):
        index = torch.tensor(list(sequence.counts), device=row.device)
        counts = torch.tensor(list(sequence.counts.values()), device=row.device, dtype=row.dtype)
        row[index] -= params.presence_penalty + params.frequency_penalty * counts


def _draw(scores: torch.Tensor, sequences: list[Sequence]) -> list[int]:
    chosen: list[int] = scores.argmax(dim=-1).tolist()
    drawn = [row for row, sequence in enumerate(sequences) if sequence.params.temperature >= GREEDY_BELOW]
    # Separately: a draw maps to another token if the vocabulary is sorted, and must not depend on the batch.
    ranked = [row for row in drawn if sequences[row].params.ranks]
    for rows in (ranked, [row for row in drawn if row not in ranked]):
        if not rows:
            continue
        own = scores if len(rows) == len(sequences) else scores[torch.tensor(rows, device=scores.device)]
        for row, token in zip(rows, _drawn(own, [sequences[row] for row in rows]), strict=True):
            chosen[row] = token
    return chosen


def _drawn(scores: torch.Tensor, sequences: list[Sequence]) -> list[int]:
    """Inverse transform sampling: one random number per sequence, whatever the device.

    Either all sequences filter by rank, or none.
    """
    params = [sequence.params for sequence in sequences]
    scores = scores / _column([each.temperature for each in params], scores)
    order = None
    if params[0].ranks:
        scores, order = torch.sort(scores, dim=-1, descending=True, stable=True)
    probabilities = torch.softmax(scores, dim=-1)
    if any(each.min_p for each in params):
        floor = probabilities.amax(dim=-1, keepdim=True) * _column([each.min_p for each in params], scores)
        probabilities = _only(probabilities >= floor, probabilities)
    if order is not None:
        ranks = torch.arange(scores.shape[-1], device=scores.device)
        kept = _column([each.top_k or scores.shape[-1] for each in params], scores)
        probabilities = _only(ranks < kept, probabilities)
        before = probabilities.cumsum(dim=-1) - probabilities
        # The most likely token is kept even if top_p is zero.
        within = (before < _column([each.top_p for each in params], scores)) | (ranks == 0)
        probabilities = _only(within, probabilities)
    found = _inverse(probabilities, _column([sequence.draw() for sequence in sequences], scores))
    picked: list[int] = (found if order is None else order.gather(-1, found)).squeeze(-1).tolist()
    return picked


def _inverse(probabilities: torch.Tensor, draws: torch.Tensor) -> torch.Tensor:
    sums = probabilities.cumsum(dim=-1)
    found = torch.searchsorted(sums, draws * sums[:, -1:], right=True)
    # Rounding may push a draw beyond the sum.
    last = probabilities.shape[-1] - 1 - (probabilities > 0).flip(-1).int().argmax(dim=-1, keepdim=True)
    return torch.minimum(found, last)


def _only(mask: torch.Tensor, probabilities: torch.Tensor) -> torch.Tensor:
    left = probabilities * mask
    return left / left.sum(dim=-1, keepdim=True)


def _column(values: list[float] | list[int], like: torch.Tensor) -> torch.Tensor:
    return torch.tensor(values, device=like.device, dtype=like.dtype).unsqueeze(-1)


def _logprobs(
    logits: torch.Tensor, chosen: list[int], sequences: list[Sequence]
) -> list[tuple[float | None, Likeliest]]:
    reported: list[tuple[float | None, Likeliest]] = [(None, ())] * len(sequences)
    wanted = [row for row, sequence in enumerate(sequences) if sequence.params.logprobs is not None]
    if wanted:
        count = max(sequences[row].params.logprobs or 0 for row in wanted)
        found = likeliest(
            logits[torch.tensor(wanted, device=logits.device)], [chosen[row] for row in wanted], count
        )
        for row, (logprob, top) in zip(wanted, found, strict=True):
            reported[row] = (logprob, top[: sequences[row].params.logprobs])
    return reported
