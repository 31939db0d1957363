"""Attention over a packed batch on the CPU: each sequence attends to its own keys only.

transformers' "sdpa" computes every row of a batch against the keys of all sequences and masks the others out,
which multiplies the cost by the number of sequences. The result is the same.
"""

import itertools
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward


def install() -> None:
    """Replace "sdpa" in this process from now on."""
    AttentionInterface.register("sdpa", attend)


def attend(  # noqa: PLR0913  (transformers' signature)
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float | None = None,
    position_bias: torch.Tensor | None = None,
    cache: Any = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """`query` [1, heads, rows, width], `key` [1, key heads, rows, width] -> [1, rows, heads, width]."""
    if cache is None or position_bias is not None or attention_mask is None:
        attended: tuple[torch.Tensor, None] = sdpa_attention_forward(
            module,
            query,
            key,
            value,
            attention_mask,
            scaling=scaling,
            position_bias=position_bias,
            cache=cache,
            **kwargs,
        )
        return attended
    key, value = cache.update(key_states=key, value_states=value, layer_idx=module.layer_idx, kwargs=kwargs)
    queries = query.split(_lengths(kwargs["cu_seq_lens_q"]), dim=2)
    lengths = _lengths(kwargs["cu_seq_lens_k"])
    found = []
    row = column = 0
    for own, keys, values in zip(
        queries, key.split(lengths, dim=2), value.split(lengths, dim=2), strict=True
    ):
        rows, columns = own.shape[2], keys.shape[2]
        mask = attention_mask[..., row : row + rows, column : column + columns]
        found.append(_of_one(own, keys, values, mask, scaling))
        row, column = row + rows, column + columns
    return torch.cat(found, dim=1), None


def _lengths(ends: torch.Tensor) -> list[int]:
    bounds = ends.tolist()
    return [end - start for start, end in itertools.pairwise(bounds)]


def _of_one(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor, scaling: float | None
) -> torch.Tensor:
    """One sequence's rows -> [1, rows, heads, width]."""
    _, heads, rows, _ = query.shape
    key_heads = key.shape[1]
    if rows == 1:
        # It attends to all keys, so query heads that share a key head can be treated as rows.
        grouped = query.reshape(1, key_heads, heads // key_heads, -1)
        found = scaled_dot_product_attention(grouped, key, value, scale=scaling)
        return found.reshape(1, 1, heads, -1)
    found = scaled_dot_product_attention(
        query, key, value, attn_mask=mask, scale=scaling, enable_gqa=heads != key_heads
    )
    return found.transpose(1, 2)
