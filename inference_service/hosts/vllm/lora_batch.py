"""Apply many adapters to one batch: tokens are grouped by adapter, those without one are skipped.

For the CPU, where one matrix product of many tokens is far cheaper than many of one token. PyTorch only.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

# Adapters with fewer tokens than this in a batch share one batched product.
FEW_TOKENS = 8
Rows: TypeAlias = slice | Tensor


@dataclass(frozen=True)
class _FewEach:
    """Adapters with few tokens each, as one batched product: `slots` x `width` tokens, some of them padding.

    `rows`: the token at each place; `real`: the places that are not padding, None if there is no padding;
    `targets`: the tokens of the real places.
    """

    slots: Rows
    width: int
    rows: Tensor
    real: Tensor | None
    targets: Tensor

    @classmethod
    def of(cls, tokens: dict[int, list[int]]) -> "_FewEach":
        width = max(map(len, tokens.values()))
        places = [
            rows[place] if place < len(rows) else -1 for rows in tokens.values() for place in range(width)
        ]
        real = [place for place, row in enumerate(places) if row >= 0]
        return cls(
            _rows(list(tokens)),
            width,
            torch.tensor([max(0, row) for row in places]),
            None if len(real) == len(places) else torch.tensor(real),
            torch.tensor([places[place] for place in real]),
        )

    def add(self, outputs: Tensor, inputs: Tensor, chain: Sequence[Tensor], scale: float) -> None:
        product = inputs.index_select(0, self.rows).unflatten(0, (-1, self.width))
        for matrices in chain:
            product = torch.bmm(product, matrices[self.slots].transpose(1, 2))
        product = product.flatten(0, 1)
        if self.real is not None:
            product = product.index_select(0, self.real)
        outputs.index_add_(0, self.targets, product.to(outputs.dtype), alpha=scale)


class Batch:
    """The tokens of a batch, grouped by adapter."""

    def __init__(self, slots: Sequence[int]) -> None:
        """`slots`: the adapter slot of each token, negative for none."""
        tokens: dict[int, list[int]] = {}
        for row, slot in enumerate(slots):
            if slot >= 0:
                tokens.setdefault(slot, []).append(row)
        few = {slot: tokens[slot] for slot in sorted(tokens) if len(tokens[slot]) < FEW_TOKENS}
        if len(few) < 2:
            few = {}
        self._few = _FewEach.of(few) if few else None
        self._many = [(slot, _rows(rows)) for slot, rows in tokens.items() if slot not in few]

    def add(self, outputs: Tensor, inputs: Tensor, chain: Sequence[Tensor], scale: float = 1.0) -> None:
        """Add to `outputs` (tokens x outputs) the `inputs` (tokens x inputs) times each token's own matrices.

        These are applied in the order of `chain`, whose elements have the shape slots x outputs x inputs.
        """
        for slot, rows in self._many:
            product = inputs[rows]
            for matrices in chain:
                product = product @ matrices[slot].T
            if isinstance(rows, slice):
                outputs[rows].add_(product, alpha=scale)
            else:
                outputs.index_add_(0, rows, product.to(outputs.dtype), alpha=scale)
        if self._few is not None:
            self._few.add(outputs, inputs, chain, scale)


def _rows(numbers: list[int]) -> Rows:
    """A slice, which copies nothing, if the numbers are consecutive."""
    first, last = numbers[0], numbers[-1]
    return slice(first, last + 1) if last - first == len(numbers) - 1 else torch.tensor(numbers)
