"""Many adapters in one batch: each token gets its own adapter's product and nobody else's."""

import random

import pytest

torch = pytest.importorskip("torch")

from inference_service.hosts.vllm.lora_batch import FEW_TOKENS, Batch  # noqa: E402

SLOTS, RANK, INPUTS, OUTPUTS = 6, 4, 24, 16


def owners(*counts: int, shuffled: bool = True) -> list[int]:
    """So many tokens of each slot; the first count is of no slot at all."""
    found = [slot - 1 for slot, count in enumerate(counts) for _ in range(count)]
    if shuffled:
        random.Random(7).shuffle(found)
    return found


@pytest.mark.parametrize(
    "slots",
    [
        pytest.param([], id="no token"),
        pytest.param(owners(9), id="nobody has one"),
        pytest.param(owners(0, 12), id="all have one"),
        pytest.param(owners(3, 12), id="some have one"),
        pytest.param(owners(0, 1, 1, 1, 1, 1, 1), id="one token each"),
        pytest.param(owners(2, 1, 3, 0, 2), id="a few tokens each, one slot idle"),
        pytest.param(owners(0, 3, 3, 3, shuffled=False), id="as many each"),
        pytest.param(owners(0, 0, 2), id="few of one alone"),
        pytest.param(owners(5, 40, 1, 2, FEW_TOKENS, FEW_TOKENS - 1), id="many of some, few of others"),
        pytest.param(owners(5, 40, 1, 2, 9, shuffled=False), id="one after the other"),
    ],
)
def test_each_token_gets_its_own_adapter(slots: list[int]) -> None:
    torch.manual_seed(3)
    inputs = torch.randn(len(slots), INPUTS)
    before = torch.randn(len(slots), 2 * OUTPUTS)
    down, up = torch.randn(SLOTS, RANK, INPUTS), torch.randn(SLOTS, OUTPUTS, RANK)
    outputs = before.clone()
    # Half of the outputs, as those of one projection among several.
    Batch(slots).add(outputs[:, OUTPUTS:], inputs, (down, up), 0.5)
    expected = before.clone()
    for row, slot in enumerate(slots):
        if slot >= 0:
            expected[row, OUTPUTS:] += 0.5 * (up[slot] @ (down[slot] @ inputs[row]))
    torch.testing.assert_close(outputs, expected, atol=1e-4, rtol=1e-5)
    untouched = [row for row, slot in enumerate(slots) if slot < 0]
    assert torch.equal(outputs[untouched], before[untouched])


def test_a_batch_of_half_precision_adds_to_full_precision() -> None:
    slots = owners(1, 2, 1, 20)
    inputs = torch.ones(len(slots), INPUTS, dtype=torch.bfloat16)
    up = torch.ones(SLOTS, OUTPUTS, INPUTS, dtype=torch.bfloat16)
    outputs = torch.zeros(len(slots), OUTPUTS)
    Batch(slots).add(outputs, inputs, (up,))
    assert outputs[:, 0].tolist() == [0.0 if slot < 0 else float(INPUTS) for slot in slots]
