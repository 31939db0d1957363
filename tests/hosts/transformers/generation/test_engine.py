"""The transformers engine without HTTP: batches, cancellation, adapters, swaps, one at a time."""

import asyncio
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GenerationConfig
from transformers.generation.continuous_batching.cache import PagedAttentionMemoryHandler

from inference_service.hosts.transformers.generation.checkpoint import BadCheckpointError
from inference_service.hosts.transformers.generation.continuous_batching import (
    PAGE_TOKENS,
    ContinuousBatching,
)
from inference_service.hosts.transformers.generation.engine import Engine, EngineFailed
from inference_service.hosts.transformers.generation.sequence import Failure, SamplingParams, Sequence, Token
from inference_service.hosts.transformers.generation.sequential import Sequential
from inference_service.hosts.transformers.generation.weights import MissingWeightsError
from tests.fixtures.tiny import CONTEXT, Tiny
from tests.hosts.transformers.conftest import Start, options

PROMPTS = [[7 * number + row for number in range(3 + 5 * row)] for row in range(1, 13)]


def plain(
    directory: Path, prompts: list[list[int]], tokens: int, adapter: Path | None = None
) -> list[list[int]]:
    """What `generate` makes of each, one after the other."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    if adapter is not None:
        model = PeftModel.from_pretrained(model, str(adapter))
    wish = GenerationConfig(do_sample=False, max_new_tokens=tokens, pad_token_id=0)
    model.generation_config = GenerationConfig()
    found = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=wish)
        found.append(out[0, len(prompt) :].tolist())
    return found


async def ids(engine: Engine, prompt: list[int], tokens: int, adapter: str | None = None) -> list[int]:
    return [token.id for token in await run(engine, prompt, SamplingParams(tokens, temperature=0), adapter)]


async def run(
    engine: Engine, prompt: list[int], params: SamplingParams, adapter: str | None = None, grammar: Any = None
) -> list[Token]:
    news: asyncio.Queue[Token | Failure] = asyncio.Queue()
    engine.submit(prompt, params, news.put_nowait, adapter=adapter, grammar=grammar)
    tokens: list[Token] = []
    while not tokens or tokens[-1].finish is None:
        token = await news.get()
        assert isinstance(token, Token), token
        tokens.append(token)
    return tokens


async def test_many_together_are_answered_as_each_alone(start: Start, tiny: Tiny) -> None:
    engine = start(tiny.llama)
    assert isinstance(engine.runner, ContinuousBatching)
    together = await asyncio.gather(*(ids(engine, prompt, 20) for prompt in PROMPTS))
    assert list(together) == plain(tiny.llama, PROMPTS, 20)
    assert engine.runner.running == 0


async def test_a_cache_too_small_for_all_holds_none_up_and_loses_nothing(start: Start, tiny: Tiny) -> None:
    """Twelve sequences of up to 140 tokens, room for 256: some are put off and read anew."""
    engine = start(tiny.llama, cache_bytes=256 * 512, max_model_len=256)
    assert engine.max_model_len == 256
    together = await asyncio.gather(*(ids(engine, prompt, 80) for prompt in PROMPTS))
    assert list(together) == plain(tiny.llama, PROMPTS, 80)


async def test_a_cache_that_does_not_fit_is_made_smaller(
    start: Start, tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As transformers counts, with what a step needs beside it; many still run together."""
    monkeypatch.setattr(PagedAttentionMemoryHandler, "get_available_memory", lambda memory: 16 << 20)
    engine = start(tiny.llama, cache_bytes=4 << 20)
    assert isinstance(engine.runner, ContinuousBatching)
    assert 1024 < engine.runner.size.tokens < 8192
    assert f"cache_tokens={engine.runner.size.tokens}," in str(engine)
    together = await asyncio.gather(*(ids(engine, prompt, 20) for prompt in PROMPTS))
    assert list(together) == plain(tiny.llama, PROMPTS, 20)


async def test_a_cache_too_small_for_a_context_is_none(
    start: Start, tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One at a time the model has all of its context."""
    monkeypatch.setattr(PagedAttentionMemoryHandler, "get_available_memory", lambda memory: 1 << 20)
    engine = start(tiny.llama)
    assert isinstance(engine.runner, Sequential)
    assert engine.max_model_len == CONTEXT
    assert await ids(engine, PROMPTS[0], 5) == plain(tiny.llama, PROMPTS[:1], 5)[0]


async def test_prompts_that_are_scored_together_take_the_room_of_one(
    start: Start, tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = start(tiny.llama)
    at_once = most = 0
    score = engine._score

    def counted(*arguments: Any) -> Any:
        nonlocal at_once, most
        at_once += 1
        most = max(most, at_once)
        try:
            return score(*arguments)
        finally:
            at_once -= 1

    monkeypatch.setattr(engine, "_score", counted)
    await asyncio.gather(*(engine.score(PROMPTS[row], None, 1, []) for row in range(8)))
    assert most == 1


async def test_a_prompt_longer_than_a_step(start: Start, tiny: Tiny) -> None:
    engine = start(tiny.llama, cache_bytes=1 << 20)
    prompt = [(31 * number) % 4000 for number in range(CONTEXT - 20)]
    assert await ids(engine, prompt, 8) == plain(tiny.llama, [prompt], 8)[0]


def used_pages(runner: ContinuousBatching) -> int:
    """The pages of the cache that sequences hold."""
    allocators = runner._manager.batch_processor.cache.cache_allocators.values()
    return max(sum(map(len, list(allocator.block_table.values()))) for allocator in allocators)


async def test_cancelled_sequences_give_their_pages_back_at_once(start: Start, tiny: Tiny) -> None:
    engine = start(tiny.llama, sequences=4)
    assert isinstance(engine.runner, ContinuousBatching)
    before = used_pages(engine.runner)
    news: asyncio.Queue[Any] = asyncio.Queue()
    endless = SamplingParams(400, temperature=0)
    # Four run, four wait.
    sequences = [engine.submit(prompt, endless, news.put_nowait) for prompt in PROMPTS[:8]]
    await news.get()
    assert used_pages(engine.runner) > before
    for sequence in sequences:
        engine.runner.cancel(sequence)
    assert engine.runner.running == 0
    for _ in range(100):
        if used_pages(engine.runner) == before:
            break
        await asyncio.sleep(0.01)
    assert used_pages(engine.runner) == before
    # What is cancelled says nothing any more, and does not hold the next up.
    while not news.empty():
        news.get_nowait()
    assert await ids(engine, PROMPTS[0], 5) == plain(tiny.llama, PROMPTS[:1], 5)[0]
    assert news.empty()


async def test_pages_of_equal_beginnings_are_shared(start: Start, tiny: Tiny) -> None:
    engine = start(tiny.llama)
    prompt = list(range(3 * PAGE_TOKENS + 5))
    first = await ids(engine, prompt, 6)
    steps = engine.runner.steps
    assert await ids(engine, prompt, 6) == first
    assert engine.runner.steps > steps


async def test_adapters_take_turns_with_their_base(start: Start, tiny: Tiny) -> None:
    engine = start(tiny.llama)
    for number, directory in enumerate(tiny.adapters, start=1):
        await engine.add_adapter(f"a@{number}", number, directory)
    expected = {
        None: plain(tiny.llama, PROMPTS[:3], 12),
        "a@1": plain(tiny.llama, PROMPTS[:3], 12, tiny.adapters[0]),
        "a@2": plain(tiny.llama, PROMPTS[:3], 12, tiny.adapters[1]),
    }
    assert expected[None] != expected["a@1"] != expected["a@2"]
    asked = [(name, row) for name in expected for row in range(3)]
    found = await asyncio.gather(*(ids(engine, PROMPTS[row], 12, name) for name, row in asked))
    for (name, row), got in zip(asked, found, strict=True):
        assert got == expected[name][row], (name, row)
    await engine.remove_adapter("a@1")
    assert "a@1" not in engine.adapters
    assert await ids(engine, PROMPTS[0], 12, "a@2") == expected["a@2"][0]
    assert await ids(engine, PROMPTS[0], 12) == expected[None][0]


async def test_a_broken_adapter_leaves_the_model_as_it_was(start: Start, tiny: Tiny, tmp_path: Path) -> None:
    engine = start(tiny.llama)
    broken = tmp_path / "broken"
    shutil.copytree(tiny.adapters[0], broken)
    (broken / "adapter_model.safetensors").write_bytes(b"nothing")
    with pytest.raises(Exception, match=r".+"):
        await engine.add_adapter("a@1", 1, broken)
    assert "a@1" not in engine.adapters
    assert await ids(engine, PROMPTS[0], 8) == plain(tiny.llama, PROMPTS[:1], 8)[0]
    await engine.add_adapter("a@2", 2, tiny.adapters[0])
    assert await ids(engine, PROMPTS[0], 8, "a@2") == plain(tiny.llama, PROMPTS[:1], 8, tiny.adapters[0])[0]


@pytest.mark.parametrize("int8", [False, True])
async def test_a_swap_brings_what_a_fresh_engine_brings(start: Start, tiny: Tiny, int8: bool) -> None:
    engine = start(tiny.llama, int8=int8)
    before = await ids(engine, PROMPTS[5], 12)
    weight_check = await engine.weight_check()
    await engine.add_adapter("a@1", 1, tiny.adapters[0])
    await ids(engine, PROMPTS[5], 4, "a@1")
    await engine.swap(tiny.other, options(int8=int8))
    fresh = start(tiny.other, int8=int8)
    assert await ids(engine, PROMPTS[5], 12) == await ids(fresh, PROMPTS[5], 12) != before
    assert await engine.weight_check() == await fresh.weight_check() != weight_check
    await engine.swap(tiny.llama, options(int8=int8))
    assert await engine.weight_check() == weight_check
    assert await ids(engine, PROMPTS[5], 12) == before, "nothing is left in the pages either"


async def test_the_log_probabilities_of_a_prompt(start: Start, tiny: Tiny) -> None:
    """Read in pieces, and beside sequences that run."""
    engine = start(tiny.llama)
    prompt = [(31 * number) % 4000 for number in range(500)]
    running = asyncio.gather(*(ids(engine, each, 60) for each in PROMPTS[:3]))
    told, (following,) = await engine.score(prompt, None, 3, [SamplingParams(1, temperature=0, logprobs=2)])
    await running
    model = AutoModelForCausalLM.from_pretrained(tiny.llama, dtype=torch.float32)
    with torch.no_grad():
        expected = torch.log_softmax(model(torch.tensor([prompt])).logits[0], dim=-1)
    assert [token.id for token in told] == prompt[1:]
    for row, token in enumerate(told):
        assert token.logprob == pytest.approx(float(expected[row, token.id]), abs=1e-4)
        assert token.top[0][1] == pytest.approx(float(expected[row].max()), abs=1e-4)
    assert following.id == int(expected[-1].argmax())
    assert len(following.top) == 2


async def test_an_architecture_that_cannot_share_a_batch_is_served_alone(start: Start, tiny: Tiny) -> None:
    engine = start(tiny.neo)
    assert isinstance(engine.runner, Sequential)
    assert engine.limitation is not None
    assert "one at a time" in engine.limitation
    assert "GPTNeo" in engine.limitation
    together = await asyncio.gather(*(ids(engine, prompt, 6) for prompt in PROMPTS[:4]))
    assert list(together) == plain(tiny.neo, PROMPTS[:4], 6)
    told, _ = await engine.score(PROMPTS[3], None, 1, [])
    assert len(told) == len(PROMPTS[3]) - 1
    await engine.weight_check()


async def test_each_layer_is_progress_where_one_runs_at_a_time(start: Start, tiny: Tiny) -> None:
    """A prompt is one forward there, also one that is only scored while others wait."""
    engine = start(tiny.neo)
    before = engine.runner.steps
    await engine.score(PROMPTS[3], None, 1, [])
    assert engine.runner.steps == before + 2, "its layers"
    await ids(engine, PROMPTS[3], 3)
    assert engine.runner.steps == before + 2 + 3 * 2


async def test_what_is_cancelled_alone_ends_and_lets_the_next_run(start: Start, tiny: Tiny) -> None:
    engine = start(tiny.neo)
    news: asyncio.Queue[Any] = asyncio.Queue()
    sequences = [
        engine.submit(PROMPTS[0], SamplingParams(450, temperature=0), news.put_nowait) for _ in range(3)
    ]
    await news.get()
    for sequence in sequences:
        engine.runner.cancel(sequence)
    assert await asyncio.wait_for(ids(engine, PROMPTS[1], 3), 5) == plain(tiny.neo, PROMPTS[1:2], 3)[0]


async def test_weights_that_are_missing_are_no_random_numbers(tiny: Tiny, tmp_path: Path) -> None:
    cut = tmp_path / "cut"
    shutil.copytree(tiny.llama, cut)
    tensors = load_file(cut / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, cut / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(MissingWeightsError, match="up_proj"):
        Engine(cut, options())


async def test_a_dead_thread_fails_its_sequences_and_says_so(start: Start, tiny: Tiny) -> None:
    engine = start(tiny.llama)

    def broken(**_: Any) -> None:
        raise RuntimeError("the forward pass broke")

    engine.model.forward = broken
    with pytest.raises(EngineFailed, match="forward pass broke"):
        [token async for token in engine.generate(PROMPTS[0], SamplingParams(4))]
    for _ in range(200):
        if not engine.runner.is_alive():
            break
        await asyncio.sleep(0.01)
    assert not engine.runner.is_alive()
    assert engine.runner.running == 0


async def test_a_prompt_whose_client_leaves_is_read_no_further(start: Start, tiny: Tiny) -> None:
    engine = start(tiny.neo)
    news: asyncio.Queue[Any] = asyncio.Queue()
    running = engine.submit(PROMPTS[0], SamplingParams(450, temperature=0), news.put_nowait)
    await news.get()
    prompt_logprobs = asyncio.ensure_future(engine.score(PROMPTS[1], None, 1, []))
    await asyncio.sleep(0.05)  # it waits for the model, which the other holds
    prompt_logprobs.cancel()
    with pytest.raises(asyncio.CancelledError):
        await prompt_logprobs
    assert engine.runner.running == 1, "the other has not ended meanwhile"
    engine.runner.cancel(running)


@pytest.mark.parametrize("name", ["llama", "neo"])
async def test_one_sequences_failure_is_its_own(start: Start, tiny: Tiny, name: str) -> None:
    """SamplingParams that raise, and a grammar that ends where the end of the text does not end it."""
    engine = start(getattr(tiny, name))
    grammar = await asyncio.to_thread(engine.grammars.choice, ["yes", "no"])
    beside = asyncio.ensure_future(run(engine, PROMPTS[0], SamplingParams(30, temperature=0)))
    whole = await run(engine, PROMPTS[1], SamplingParams(20, temperature=0), grammar=grammar)
    assert engine.tokenizer.decode([token.id for token in whole], skip_special_tokens=True) in ("yes", "no")
    forced = SamplingParams(20, temperature=0, min_tokens=15, stop_tokens=engine.stop_tokens)
    long = await run(engine, PROMPTS[1], forced, grammar=grammar)
    assert len(long) < 15, "nothing beyond the grammar"
    news: asyncio.Queue[Any] = asyncio.Queue()
    engine.submit(
        PROMPTS[1], SamplingParams(9, min_tokens=5, stop_tokens=frozenset({10**9})), news.put_nowait
    )
    failure = await news.get()
    assert isinstance(failure, Failure)
    assert failure.refused
    assert len(await beside) == 30
    assert engine.runner.is_alive()
    assert engine.runner.running == 0


async def test_adapters_take_turns_where_the_cache_has_no_room_for_all(start: Start, tiny: Tiny) -> None:
    """Running sequences of one hold the whole cache while others wait."""
    engine = start(tiny.llama, cache_bytes=256 * 512, max_model_len=256)
    for number, directory in enumerate(tiny.adapters, start=1):
        await engine.add_adapter(f"a@{number}", number, directory)
    names = (None, "a@1", "a@2")
    asked = [(names[row % 3], [(row * 31 + number) % 4000 for number in range(150)]) for row in range(18)]
    found = await asyncio.gather(*(ids(engine, prompt, 24, name) for name, prompt in asked))
    assert all(len(each) == 24 for each in found)
    alone = [await ids(engine, prompt, 24, name) for name, prompt in asked[:6]]
    assert found[:6] == alone


async def test_prompts_are_read_one_after_the_other(start: Start, tiny: Tiny) -> None:
    """Whose adapter is in use is of no concern to the other's numbers."""
    engine = start(tiny.llama)
    await engine.add_adapter("a@1", 1, tiny.adapters[0])
    prompt = [(31 * number) % 4000 for number in range(400)]

    async def read(adapter: str | None) -> list[float | None]:
        told, _ = await engine.score(prompt, adapter, 1, [])
        return [token.logprob for token in told]

    expected = {name: await read(name) for name in (None, "a@1")}
    assert expected[None] != expected["a@1"]
    names = [None, "a@1"] * 6
    for name, found in zip(names, await asyncio.gather(*map(read, names)), strict=True):
        assert found == expected[name], name


async def test_adapters_that_come_at_once_can_all_go_again(start: Start, tiny: Tiny) -> None:
    engine = start(tiny.llama)
    for _ in range(3):
        added = enumerate(tiny.adapters * 2, start=1)
        await asyncio.gather(*(engine.add_adapter(f"a@{number}", number, path) for number, path in added))
        found = await asyncio.gather(*(ids(engine, PROMPTS[0], 6, f"a@{number}") for number in range(1, 5)))
        assert found[0] == found[2] != found[1] == found[3]
        await asyncio.gather(*(engine.remove_adapter(f"a@{number}") for number in (4, 2, 1, 3)))
        assert not getattr(engine.model, "peft_config", {})


CROWD = [[(row * 31 + number) % 4000 for number in range(60)] for row in range(4)]


async def crowd(engine: Engine, news: list[asyncio.Queue[Any]]) -> list[Sequence]:
    """Sequences that fill a cache of 256 tokens, at the moment when some are put off."""
    sequences = [
        engine.submit(prompt, SamplingParams(190, temperature=0), each.put_nowait)
        for prompt, each in zip(CROWD, news, strict=True)
    ]
    scheduler = engine.runner._manager.batch_processor.scheduler  # type: ignore[attr-defined]
    for _ in range(2000):
        if scheduler.block_new_requests:
            return sequences
        await asyncio.sleep(0.002)
    raise AssertionError("none was put off")


async def test_a_swap_lets_in_again_who_comes(start: Start, tiny: Tiny) -> None:
    """Some had been put off when all of them left."""
    engine = start(tiny.llama, cache_bytes=256 * 512, max_model_len=256)
    sequences = await crowd(engine, [asyncio.Queue() for _ in CROWD])
    forget = engine.runner.forget

    def left_meanwhile() -> None:
        for sequence in sequences:
            engine.runner.cancel(sequence)
        forget()

    engine.runner.forget = left_meanwhile  # type: ignore[method-assign]
    await engine.swap(tiny.other, options(cache_bytes=256 * 512, max_model_len=256))
    found = await asyncio.wait_for(ids(engine, PROMPTS[0], 4), 10)
    assert found == plain(tiny.other, PROMPTS[:1], 4)[0]


async def test_who_was_put_off_goes_on_when_the_others_leave(start: Start, tiny: Tiny) -> None:
    """Several that fill the cache between them: the one that is put off outlives the others' clients."""
    engine = start(tiny.llama, cache_bytes=256 * 512, max_model_len=256)
    news: list[asyncio.Queue[Any]] = [asyncio.Queue() for _ in CROWD]
    sequences = await crowd(engine, news)
    scheduler = engine.runner._manager.batch_processor.scheduler  # type: ignore[attr-defined]
    put_off = [number for number, each in enumerate(sequences) if each.name in scheduler.waiting_requests]
    for number, sequence in enumerate(sequences):
        if number not in put_off:
            engine.runner.cancel(sequence)
    assert await asyncio.wait_for(ids(engine, PROMPTS[0], 3), 10) == plain(tiny.llama, PROMPTS[:1], 3)[0]
    for number in put_off:
        tokens: list[Token] = []
        while not tokens or tokens[-1].finish is None:
            tokens.append(await asyncio.wait_for(news[number].get(), 10))
        assert [token.id for token in tokens] == plain(tiny.llama, [CROWD[number]], 190)[0]


async def test_nothing_of_a_sequence_cancelled_in_a_swap_is_left(start: Start, tiny: Tiny) -> None:
    """Its pages hold what the old weights made of its prompt."""
    engine = start(tiny.llama)
    fresh = start(tiny.other)
    prompt = list(range(3 * PAGE_TOKENS + 5))
    expected = await ids(fresh, prompt, 8)
    news: asyncio.Queue[Any] = asyncio.Queue()
    sequence = engine.submit(prompt, SamplingParams(400, temperature=0), news.put_nowait)
    await news.get()
    forget = engine.runner.forget

    def left_meanwhile() -> None:
        engine.runner.cancel(sequence)
        forget()

    engine.runner.forget = left_meanwhile  # type: ignore[method-assign]
    await engine.swap(tiny.other, options())
    assert await ids(engine, prompt, 8) == expected


async def test_an_adapters_pages_are_never_the_bare_models(start: Start, tiny: Tiny) -> None:
    """Also where its client leaves in the middle of a step."""
    engine = start(tiny.llama)
    await engine.add_adapter("a@1", 1, tiny.adapters[0])
    prompt = list(range(3 * PAGE_TOKENS))
    expected = plain(tiny.llama, [[*prompt, 7]], 8)[0]
    for length in range(1, PAGE_TOKENS + 2):
        news: asyncio.Queue[Any] = asyncio.Queue()
        sequence = engine.submit(prompt, SamplingParams(400, temperature=0), news.put_nowait, adapter="a@1")
        for _ in range(length):
            await news.get()
        with engine.runner.exclusive():
            engine.runner.cancel(sequence)
    assert await ids(engine, [*prompt, 7], 8) == expected


async def test_a_sequence_whose_adapter_has_gone_fails_alone(start: Start, tiny: Tiny) -> None:
    engine = start(tiny.llama)
    await engine.add_adapter("a@1", 1, tiny.adapters[0])
    news: asyncio.Queue[Any] = asyncio.Queue()
    engine.submit(PROMPTS[0], SamplingParams(400, temperature=0), news.put_nowait, adapter="a@1")
    await news.get()
    beside = asyncio.ensure_future(ids(engine, PROMPTS[1], 30))
    await engine.remove_adapter("a@1")
    while not isinstance(failure := await asyncio.wait_for(news.get(), 5), Failure):
        pass
    assert "a@1" in failure.reason
    assert await beside == plain(tiny.llama, PROMPTS[1:2], 30)[0]


async def test_an_adapter_without_its_weights_is_refused(start: Start, tiny: Tiny, tmp_path: Path) -> None:
    engine = start(tiny.llama)
    cut = tmp_path / "cut"
    shutil.copytree(tiny.adapters[0], cut)
    tensors = load_file(cut / "adapter_model.safetensors")
    del tensors[next(name for name in tensors if "layers.1.self_attn.v_proj" in name)]
    save_file(tensors, cut / "adapter_model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="lacks 1 of its weights"):
        await engine.add_adapter("a@1", 1, cut)
    assert await ids(engine, PROMPTS[0], 8) == plain(tiny.llama, PROMPTS[:1], 8)[0]


def with_generation(model: Path, room: Path, **fields: Any) -> Path:
    changed = room / "changed"
    shutil.copytree(model, changed)
    (changed / "generation_config.json").write_text(json.dumps(fields))
    return changed


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("eos_token_id", "a"),
        ("eos_token_id", [2, "b"]),
        ("top_p", 5),
        ("repetition_penalty", 0),
        ("top_k", 10**400),
    ],
)
def test_defaults_that_cannot_be_are_named(tiny: Tiny, tmp_path: Path, field: str, value: Any) -> None:
    with pytest.raises(BadCheckpointError, match=f"generation_config.json: {field}"):
        Engine(with_generation(tiny.llama, tmp_path, **{field: value}), options())


async def test_ends_outside_the_vocabulary_end_nothing(start: Start, tiny: Tiny, tmp_path: Path) -> None:
    engine = start(with_generation(tiny.llama, tmp_path, eos_token_id=[7, 10**8, -1], top_k=3))
    assert engine.stop_tokens == {2, 7}
    assert engine.defaults["top_k"] == 3
