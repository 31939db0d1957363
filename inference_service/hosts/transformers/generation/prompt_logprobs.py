"""The log probabilities of a prompt's own tokens, computed in chunks between the steps of generation."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import DynamicCache

from inference_service.hosts.transformers.generation.runner import Runner
from inference_service.hosts.transformers.generation.sampling import likeliest
from inference_service.hosts.transformers.generation.sequence import Token

# Of one chunk's logits; the log probabilities take as much again.
LOGITS_BYTES = 96 << 20
MAX_PIECE_TOKENS = 512
MIN_PIECE_TOKENS = 16


class NotWanted(Exception):
    """The client has disconnected."""


@torch.no_grad()  # type: ignore[untyped-decorator]
def score(  # noqa: PLR0913  (each is one fact of the request)
    runner: Runner,
    enter: Callable[[str | None], None],
    prompt: list[int],
    adapter: str | None,
    top: int,
    *,
    in_pieces: bool,
    vocabulary: int,
    unwanted: threading.Event,
) -> tuple[list[Token], torch.Tensor]:
    """The log probability of each prompt token but the first, and the logits [1, vocabulary] after the last.

    Blocks. `in_pieces`: whether the model can continue from a KV cache. Raises NotWanted before the next
    chunk once `unwanted` is set.
    """
    size = LOGITS_BYTES // (4 * vocabulary)
    size = max(MIN_PIECE_TOKENS, min(MAX_PIECE_TOKENS, size)) if in_pieces else len(prompt)
    past = DynamicCache() if size < len(prompt) else None
    tokens: list[Token] = []
    logits = torch.empty(0)
    for start in range(0, len(prompt), size):
        piece = prompt[start : start + size]
        with runner.exclusive() as model, plain_attention(model):
            if unwanted.is_set():
                raise NotWanted
            enter(adapter)
            logits = forward(model, piece, past)
        targets = prompt[start + 1 : start + len(piece) + 1]
        scored = likeliest(logits[: len(targets)], targets, top)
        tokens += [Token(token, *found) for token, found in zip(targets, scored, strict=True)]
    return tokens, logits[-1:]


@torch.no_grad()  # type: ignore[untyped-decorator]
def forward(model: Any, tokens: list[int], past: Any = None) -> torch.Tensor:
    """Logits, float32 [tokens, vocabulary], without the paged cache."""
    ids = torch.tensor([tokens], device=model.device)
    logits: torch.Tensor = model(input_ids=ids, past_key_values=past, use_cache=past is not None).logits
    return logits[0].float()


@contextmanager
def plain_attention(model: Any) -> Iterator[None]:
    """Paged eager attention rejects a forward without pages."""
    paged = model.config._attn_implementation
    if not str(paged).startswith("paged|"):
        yield
        return
    model.set_attn_implementation(paged.removeprefix("paged|"))
    try:
        yield
    finally:
        model.set_attn_implementation(paged)
