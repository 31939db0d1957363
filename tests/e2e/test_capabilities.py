"""What a client can ask for: the same requests to every engine, the same answers of a kind."""

import json
import math
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import openai
import pytest
from openai.types.chat import ChatCompletion

from tests.e2e.engines import CAPABILITIES, ENGINES, Engine, having, shows, table
from tests.e2e.test_openai_client import BASE, CAPITAL
from tests.fixtures.bucket import Bucket
from tests.fixtures.checkpoints import Checkpoints, base_checkpoint
from tests.fixtures.once import once
from tests.fixtures.service_process import ServiceProcess

ROOT = Path(__file__).parents[2]
TOOLSMITH = "toolsmith"
PROMPTS = [
    *("The capital of France is", "Water boils at", "Once upon a time", "The opposite of hot is"),
    *("Two plus two is", "My favourite colour is", "The sun rises in the", "A dog is a kind of"),
    *("Shakespeare wrote", "The largest planet is", "Bees make", "In the morning I", "Winter is"),
    *("Computers are", "The quick brown fox", "To be or not to", "Music is", "He opened the door and"),
    *("There are seven days in", "She said that"),
]
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather in a city",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "enum": ["Paris", "Rome"]}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}
TIME = {
    "type": "function",
    "function": {
        "name": "time",
        "parameters": {"type": "object", "properties": {}, "additionalProperties": False},
    },
}
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 99},
        "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "minItems": 1, "maxItems": 2},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}


def complete(service: ServiceProcess, prompt: Any, max_tokens: int = 12, **options: Any) -> Any:
    """Greedily unless asked otherwise: a sampled answer may end before `max_tokens`."""
    options.setdefault("temperature", 0)
    own = {name: options.pop(name) for name in list(options) if name in OWN}
    return service.openai.completions.create(
        model=options.pop("model", BASE), prompt=prompt, max_tokens=max_tokens, extra_body=own, **options
    )


# Fields that the openai client does not know.
OWN = frozenset(
    {
        *("top_k", "min_p", "repetition_penalty", "min_tokens", "ignore_eos", "stop_token_ids"),
        *("structured_outputs", "include_stop_str_in_output", "response_format"),
    }
)


def chat(service: ServiceProcess, content: str, **options: Any) -> ChatCompletion:
    return service.openai.chat.completions.create(  # type: ignore[no-any-return]
        model=options.pop("model", BASE), messages=[{"role": "user", "content": content}], **options
    )


def text_of(answer: Any) -> str:
    return str(answer.choices[0].text)


def at_once(calls: list[Callable[[], Any]]) -> list[Any]:
    with ThreadPoolExecutor(len(calls)) as pool:
        return [future.result() for future in [pool.submit(call) for call in calls]]


def test_the_docs_show_the_table() -> None:
    assert table() in (ROOT / "docs" / "engines.md").read_text()


def test_every_capability_is_shown_by_a_test() -> None:
    tests = "".join(file.read_text() for file in Path(__file__).parent.glob("test_*.py"))
    assert [name for name in CAPABILITIES if f'@shows("{name}")' not in tests] == []
    assert having("answers") == ["vllm", "transformers"]
    assert having("requests") == list(ENGINES)


# requests, streaming


@shows("requests")
def test_prompts_of_each_kind(service: ServiceProcess) -> None:
    one = complete(service, "Once")
    assert one.usage.completion_tokens == 12
    assert one.usage.total_tokens == one.usage.prompt_tokens + 12
    told = chat(service, CAPITAL, max_completion_tokens=5)
    assert told.choices[0].message.role == "assistant"
    assert told.usage is not None
    assert told.usage.completion_tokens <= 5
    assert told.model == BASE


@shows("answers")
def test_lists_of_prompts_are_answered_in_their_order(service: ServiceProcess) -> None:
    alone = [text_of(complete(service, prompt, temperature=0)) for prompt in PROMPTS[:4]]
    together = complete(service, PROMPTS[:4], temperature=0)
    assert [choice.index for choice in together.choices] == [0, 1, 2, 3]
    assert [choice.text for choice in together.choices] == alone
    ids = [[504, 3575, 282, 4649, 314]]  # The capital of France is
    assert text_of(complete(service, ids, temperature=0)) == alone[0]


@shows("streaming")
def test_a_stream_is_the_whole_answer_in_parts(service: ServiceProcess) -> None:
    chunks = list(complete(service, "Once", 20, stream=True, stream_options={"include_usage": True}))
    assert len(chunks) > 3, "a busy engine brings several tokens in one"
    assert chunks[-1].usage.completion_tokens == 20
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]][-1] == "length"
    parts = list(
        service.openai.chat.completions.create(
            model=BASE,
            messages=[{"role": "user", "content": CAPITAL}],
            stream=True,
            temperature=0,
            max_tokens=6,
        )
    )
    assert "".join(part.choices[0].delta.content or "" for part in parts)


@shows("streaming")
@pytest.mark.engine("vllm", "transformers")
def test_usage_in_each_part_where_that_is_wished(service: ServiceProcess) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    chunks = list(complete(service, "Once", 20, stream=True, stream_options=options))
    running = [chunk.usage.completion_tokens for chunk in chunks]
    assert running == sorted(running)
    assert running[0] < running[-1] == 20


@shows("answers")
def test_a_streams_text_is_the_whole_answers(service: ServiceProcess) -> None:
    for prompt in PROMPTS[:3]:
        whole = text_of(complete(service, prompt, 24, temperature=0))
        parts = complete(service, prompt, 24, temperature=0, stream=True)
        assert "".join(part.choices[0].text for part in parts) == whole


# answers: against transformers' own generate


GENERATE = """
import json, sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
directory, prompts = sys.argv[1], json.loads(sys.argv[2])
tokenizer = AutoTokenizer.from_pretrained(directory)
model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
found = []
for prompt in prompts:
    ids = tokenizer(prompt, return_tensors="pt")
    out = model.generate(**ids, do_sample=False, max_new_tokens=12)
    found.append(tokenizer.decode(out[0, ids["input_ids"].shape[1]:], skip_special_tokens=True))
print(json.dumps(found))
"""


@pytest.fixture(scope="session")
def generated(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, checkpoints: Checkpoints
) -> list[str]:
    """What plain `generate` makes of each prompt, one after the other."""
    command = [sys.executable, "-c", GENERATE, str(checkpoints.base), json.dumps(PROMPTS)]

    def generate() -> Any:
        ended = subprocess.run(command, capture_output=True, text=True, check=True)
        return json.loads(ended.stdout.splitlines()[-1])

    found: list[str] = once(request, tmp_path_factory, "generated", generate)
    return found


@shows("answers")
def test_twenty_prompts_together_are_answered_as_by_plain_generate(
    service: ServiceProcess, generated: list[str]
) -> None:
    told = complete(service, PROMPTS, 12, temperature=0)
    assert [choice.text for choice in told.choices] == generated


@shows("answers")
def test_a_schema_a_seed_and_logprobs_in_one_batch(service: ServiceProcess) -> None:
    """Each gets what it asked for, and what it would get alone."""

    def schema() -> dict[str, Any]:
        wish = {"type": "json_schema", "json_schema": {"name": "person", "schema": PERSON}}
        told = chat(service, "Describe a person.", response_format=wish, temperature=0, max_tokens=96)
        found: dict[str, Any] = json.loads(told.choices[0].message.content or "")
        return found

    def seeded() -> str:
        return text_of(complete(service, "Once", 24, seed=11, temperature=1.0))

    def likely() -> list[float]:
        told = complete(service, PROMPTS[0], 8, temperature=0, logprobs=3)
        return [round(each, 2) for each in told.choices[0].logprobs.token_logprobs]

    alone = [schema(), seeded(), likely()]
    noise = threading.Thread(target=lambda: complete(service, "Noise", 60, temperature=1.5))
    noise.start()
    together = at_once([schema, seeded, likely])
    noise.join()
    assert together == alone
    assert set(alone[0]) == {"name", "age", "tags"}


# sampling


@shows("sampling")
def test_the_narrowest_choice_is_the_greedy_one(service: ServiceProcess) -> None:
    greedy = text_of(complete(service, "Once", temperature=0))
    for narrow in ({"top_k": 1}, {"top_p": 0.0001}, {"min_p": 1.0}):
        assert text_of(complete(service, "Once", temperature=1.5, **narrow)) == greedy, narrow


@shows("sampling")
def test_top_k_keeps_to_the_likeliest(service: ServiceProcess) -> None:
    told = complete(service, "The", 1, temperature=2, top_k=3, n=40, logprobs=3)
    allowed = set(told.choices[0].logprobs.top_logprobs[0])
    assert {choice.text for choice in told.choices} <= allowed
    assert len({choice.text for choice in told.choices}) > 1


@shows("sampling")
def test_a_bias_forces_and_forbids(service: ServiceProcess) -> None:
    forced = complete(service, "Once", 4, temperature=0, logit_bias={"260": 100}, logprobs=0)
    assert set(forced.choices[0].logprobs.tokens) == {" the"}
    first = complete(service, "Once", 1, temperature=0, logprobs=1)
    token = token_of(text_of(first))
    other = complete(service, "Once", 1, temperature=0, logit_bias={str(token): -100})
    assert text_of(other) != text_of(first)


def vocabulary() -> dict[str, int]:
    """The demo model's tokens, a space written as Ġ."""
    found: dict[str, int] = json.loads((base_checkpoint() / "tokenizer.json").read_text())["model"]["vocab"]
    return found


def token_of(text: str) -> int:
    return vocabulary()[text.replace(" ", "Ġ")]


def whitespace_tokens() -> list[str]:
    return [str(token) for text, token in vocabulary().items() if not text.strip("ĠĊĉč")]


@shows("sampling")
def test_penalties_end_a_repetition(service: ServiceProcess) -> None:
    prompt = "a b c a b c a b c a b c"
    plain = text_of(complete(service, prompt, 16, temperature=0))
    assert plain.count(" c") > 10
    for penalty in ({"repetition_penalty": 1.8}, {"frequency_penalty": 2.0}, {"presence_penalty": 2.0}):
        text = text_of(complete(service, prompt, 16, temperature=0, **penalty))
        assert text.count(" c") < plain.count(" c"), penalty


@shows("sampling")
def test_min_tokens_holds_the_end_off(service: ServiceProcess) -> None:
    told = chat(service, CAPITAL, temperature=0, extra_body={"min_tokens": 30}, max_tokens=40)
    assert told.usage is not None
    assert told.usage.completion_tokens >= 30


@shows("sampling")
@pytest.mark.parametrize(
    ("field", "value"),
    [("min_p", 3), ("repetition_penalty", -1), ("logit_bias", {"99999999": 1}), ("stop_token_ids", ["a"])],
)
def test_values_out_of_range_are_refused(service: ServiceProcess, field: str, value: Any) -> None:
    answer = service.http.post("/v1/completions", json={"model": BASE, "prompt": "x", field: value})
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["type"] == "invalid_request_error"


@shows("seed")
def test_equal_seeds_give_equal_answers(service: ServiceProcess) -> None:
    one, same, other = (
        text_of(complete(service, "My favourite thing is", 24, temperature=1.0, seed=seed))
        for seed in (5, 5, 6)
    )
    assert one == same != other
    beside = at_once(
        [lambda: text_of(complete(service, "My favourite thing is", 24, temperature=1.0, seed=5))]
        + [lambda: text_of(complete(service, "Another", 24, temperature=1.0))] * 3
    )
    assert beside[0] == one


@shows("n")
def test_several_answers(service: ServiceProcess) -> None:
    told = complete(service, "My favourite thing is", 8, temperature=1.0, n=4, seed=3)
    assert [choice.index for choice in told.choices] == [0, 1, 2, 3]
    assert len({choice.text for choice in told.choices}) > 1
    assert told.usage.completion_tokens == 32
    again = complete(service, "My favourite thing is", 8, temperature=1.0, n=4, seed=3)
    assert [choice.text for choice in again.choices] == [choice.text for choice in told.choices]
    parts = complete(service, "My favourite thing is", 8, temperature=1.0, n=4, seed=3, stream=True)
    texts = dict.fromkeys(range(4), "")
    for part in parts:
        texts[part.choices[0].index] += part.choices[0].text
    assert list(texts.values()) == [choice.text for choice in told.choices]


# stop, characters


@shows("stop")
@pytest.mark.parametrize("length", [1, 3, 7])
def test_a_stop_string_never_shows(service: ServiceProcess, length: int) -> None:
    """One that begins in the middle of a token and ends in another's."""
    whole = text_of(complete(service, "Once upon a time", 40, temperature=0))
    stop = whole[21 : 21 + length]
    expected = whole[: whole.index(stop)]
    told = complete(service, "Once upon a time", 40, temperature=0, stop=[stop, "never there"])
    assert (text_of(told), told.choices[0].finish_reason) == (expected, "stop")
    parts = list(complete(service, "Once upon a time", 40, temperature=0, stop=stop, stream=True))
    assert "".join(part.choices[0].text for part in parts) == expected
    assert parts[-1].choices[0].finish_reason == "stop"


@shows("stop")
def test_what_only_looks_like_a_stop_is_shown(service: ServiceProcess) -> None:
    whole = text_of(complete(service, "Once upon a time", 40, temperature=0))
    almost = whole[10:20] + "\x00"
    parts = complete(service, "Once upon a time", 40, temperature=0, stop=almost, stream=True)
    assert "".join(part.choices[0].text for part in parts) == whole


@shows("stop")
def test_a_stop_token_ends_and_a_stop_string_may_be_kept(service: ServiceProcess) -> None:
    whole = text_of(complete(service, "Once upon a time", 40, temperature=0))
    kept = complete(service, "Once upon a time", 40, temperature=0, stop=",", include_stop_str_in_output=True)
    assert text_of(kept) == whole[: whole.index(",") + 1]
    token = token_of(",")
    ended = complete(service, "Once upon a time", 40, temperature=0, stop_token_ids=[token])
    assert ended.choices[0].finish_reason == "stop"
    assert whole.startswith(text_of(ended))


@shows("characters")
def test_characters_of_several_tokens_come_whole(service: ServiceProcess) -> None:
    """Emoji and Chinese are two to four tokens each for this tokenizer."""
    text = "🦊🚀你好世界, naïve café — ✓"
    grammar = {"choice": [text]}
    whole = text_of(complete(service, "Say:", 64, temperature=0, structured_outputs=grammar))
    assert whole == text
    parts = complete(service, "Say:", 64, temperature=0, structured_outputs=grammar, stream=True)
    pieces = [part.choices[0].text for part in parts]
    assert "".join(pieces) == text
    assert not any("�" in piece for piece in pieces)
    assert len(pieces) > 3


# logprobs, echo


@shows("logprobs")
def test_log_probabilities_of_chat(service: ServiceProcess) -> None:
    told = chat(service, CAPITAL, temperature=0, logprobs=True, top_logprobs=4, max_tokens=8)
    logprobs = told.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content
    text = "".join(token.token for token in logprobs.content)
    assert (told.choices[0].message.content or "") == text.removesuffix("<|im_end|>")
    for token in logprobs.content:
        assert len(token.top_logprobs) == 4
        assert token.logprob == pytest.approx(token.top_logprobs[0].logprob, abs=1e-5), "greedy"
        assert bytes(token.bytes or ()).decode() == token.token
        assert sum(math.exp(each.logprob) for each in token.top_logprobs) <= 1.0001


@shows("logprobs")
def test_log_probabilities_of_a_stream_are_those_of_the_whole(service: ServiceProcess) -> None:
    whole = complete(service, "Once upon a time", 10, temperature=0, logprobs=2).choices[0].logprobs
    parts = complete(service, "Once upon a time", 10, temperature=0, logprobs=2, stream=True)
    streamed = [part.choices[0].logprobs for part in parts if part.choices[0].logprobs]
    assert [token for each in streamed for token in each.tokens] == whole.tokens
    found = [value for each in streamed for value in each.token_logprobs]
    assert found == pytest.approx(whole.token_logprobs, abs=1e-3)


@shows("echo")
def test_a_prompts_own_log_probabilities(service: ServiceProcess) -> None:
    """Each is what the model says of the next token after the prompt so far."""
    prompt = "The capital of France is Paris."
    told = complete(service, prompt, 1, temperature=0, echo=True, logprobs=2).choices[0]
    assert told.text.startswith(prompt)
    tokens, logprobs = told.logprobs.tokens, told.logprobs.token_logprobs
    assert logprobs[0] is None
    assert "".join(tokens) == told.text
    for number in (1, 4, len(tokens) - 2):
        before = "".join(tokens[:number])
        bias = {str(token_of(tokens[number])): 100}
        next_one = complete(service, before, 1, temperature=0, logprobs=0, logit_bias=bias).choices[0]
        assert next_one.text == tokens[number]
        assert next_one.logprobs.token_logprobs[0] == pytest.approx(logprobs[number], abs=2e-3)


@shows("echo")
def test_the_prompt_alone_and_a_long_one(service: ServiceProcess) -> None:
    alone = complete(service, "The capital of France", 0, echo=True, logprobs=1).choices[0]
    assert (alone.text, len(alone.logprobs.tokens)) == ("The capital of France", 4)
    long = complete(service, [5] * 1500, 1, echo=True, logprobs=1, temperature=0)
    assert len(long.choices[0].logprobs.token_logprobs) == 1501
    assert long.usage.completion_tokens == 1


@shows("echo")
def test_several_answers_of_one_token_after_the_prompt(service: ServiceProcess) -> None:
    """Each draws numbers of its own, as they do without the prompt."""
    prompt = "My favourite number is"
    fields = {"n": 6, "seed": 11, "temperature": 1.5, "logprobs": 0}
    alone = [each.text for each in complete(service, prompt, 1, **fields).choices]
    echoed = complete(service, prompt, 1, echo=True, **fields)
    assert [each.text for each in echoed.choices] == [prompt + text for text in alone]
    assert len(set(alone)) > 1
    assert echoed.usage.completion_tokens == 6


# json, tools


@shows("json")
def test_json_of_each_kind(service: ServiceProcess) -> None:
    told = chat(
        service,
        "A JSON object, please.",
        response_format={"type": "json_object"},
        temperature=0,
        max_tokens=48,
    )
    content = told.choices[0].message.content or ""
    assert content.lstrip().startswith("{")
    if told.choices[0].finish_reason == "stop":
        assert isinstance(json.loads(content), dict)
    wish = {"type": "json_schema", "json_schema": {"name": "person", "schema": PERSON}}
    for asked in ("A person", "Describe Bob."):
        told = chat(service, asked, response_format=wish, temperature=0, max_tokens=96)
        person = json.loads(told.choices[0].message.content or "")
        assert set(person) == {"name", "age", "tags"}
        assert 0 <= person["age"] <= 99
        assert 1 <= len(person["tags"]) <= 2


@shows("json")
@pytest.mark.parametrize(
    ("grammar", "fits"),
    [
        ({"regex": "[a-c]{5}"}, lambda text: len(text) == 5 and set(text) <= set("abc")),
        ({"choice": ["yes", "no"]}, lambda text: text in ("yes", "no")),
        ({"grammar": 'root ::= "x" ("y" | "z")'}, lambda text: text in ("xy", "xz")),
        ({"json": {"type": "integer", "minimum": 5, "maximum": 7}}, lambda text: 5 <= int(text) <= 7),
    ],
    ids=["regex", "choice", "grammar", "json"],
)
def test_structured_outputs(
    service: ServiceProcess, grammar: dict[str, Any], fits: Callable[[str], bool]
) -> None:
    text = text_of(complete(service, "Say:", 12, temperature=1.0, structured_outputs=grammar))
    assert fits(text), text


@shows("json")
@pytest.mark.parametrize(
    "wish",
    [
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "no"}}}},
        {"response_format": {"type": "poem"}},
        {"structured_outputs": {"regex": "(["}},
        {"structured_outputs": {"grammar": "root ::= nowhere"}},
    ],
    ids=["schema", "format", "regex", "grammar"],
)
def test_a_malformed_grammar_is_refused_and_harms_nobody(
    service: ServiceProcess, wish: dict[str, Any]
) -> None:
    body = {"model": BASE, "messages": [{"role": "user", "content": "x"}], "max_tokens": 4, **wish}
    answer = service.http.post("/v1/chat/completions", json=body)
    assert answer.status_code == 400, answer.text
    assert complete(service, "Once", 2).usage.completion_tokens == 2


@pytest.fixture(scope="module")
def toolsmith(bucket: Bucket, checkpoints: Checkpoints) -> Iterator[str]:
    """A model whose template has a place for tools; too small to use them, so a grammar chooses its words."""
    template = (ROOT / "tests" / "fixtures" / "tool_template.jinja").read_bytes()
    changed = {"chat_template.jinja": template, "serving.json": b'{"tool_call_parser": "hermes"}'}
    bucket.upload(checkpoints.base, f"models/{TOOLSMITH}", changed)
    yield TOOLSMITH
    bucket.remove(f"models/{TOOLSMITH}/")


def strict(tool: dict[str, Any]) -> dict[str, Any]:
    """Without it vLLM lets the model write what it likes, with it nothing else, whatever the request says."""
    return {**tool, "function": {**tool["function"], "strict": True}}


def call_tools(service: ServiceProcess, *, is_strict: bool = False, **options: Any) -> Any:
    return chat(
        service,
        "What is the weather?",
        model=TOOLSMITH,
        tools=[strict(WEATHER), strict(TIME)] if is_strict else [WEATHER, TIME],
        temperature=0,
        max_tokens=120,
        **options,
    )


@shows("tools")
def test_a_tool_that_the_client_names_or_demands(service: ServiceProcess, toolsmith: str) -> None:
    dense: Any = {
        "logit_bias": dict.fromkeys(whitespace_tokens(), -100)
    }  # or a small model writes nothing else
    named = call_tools(
        service, is_strict=True, tool_choice={"type": "function", "function": {"name": "weather"}}, **dense
    )
    (call,) = named.choices[0].message.tool_calls
    assert call.function.name == "weather"
    assert json.loads(call.function.arguments)["city"] in ("Paris", "Rome")
    demanded = call_tools(service, is_strict=True, tool_choice="required", parallel_tool_calls=False, **dense)
    (call,) = demanded.choices[0].message.tool_calls
    assert call.function.name in ("weather", "time")
    assert demanded.choices[0].finish_reason == "tool_calls"


CALL = '<tool_call>{"name": "weather", "arguments": {"city": "Rome"}}</tool_call>'


@shows("tools")
@pytest.mark.parametrize("before", ["", "Let me look.\n"])
def test_a_call_that_the_model_writes_by_itself(service: ServiceProcess, toolsmith: str, before: str) -> None:
    forced = {"structured_outputs": {"choice": [before + CALL]}}
    told = call_tools(service, extra_body=forced)
    (call,) = told.choices[0].message.tool_calls
    assert (call.function.name, json.loads(call.function.arguments)) == ("weather", {"city": "Rome"})
    assert (told.choices[0].message.content or "").strip() == before.strip()
    assert told.choices[0].finish_reason == "tool_calls"
    parts = [part.choices[0] for part in call_tools(service, extra_body=forced, stream=True)]
    content = "".join(part.delta.content or "" for part in parts)
    assert "<tool_call>" not in content
    assert content.strip() == before.strip()
    calls = [call for part in parts for call in part.delta.tool_calls or []]
    assert "".join(call.function.name or "" for call in calls) == "weather"
    assert json.loads("".join(call.function.arguments or "" for call in calls)) == {"city": "Rome"}
    assert parts[-1].finish_reason == "tool_calls"


@shows("tools")
def test_tools_that_cannot_be_used_are_refused(service: ServiceProcess, toolsmith: str) -> None:
    with pytest.raises(openai.BadRequestError):
        call_tools(service, tool_choice={"type": "function", "function": {"name": "nobody"}})
    plain = chat(service, "x", model=TOOLSMITH, tools=[WEATHER], tool_choice="none", max_tokens=4)
    assert not plain.choices[0].message.tool_calls


# cancellation, death


@shows("cancellation")
def test_clients_that_leave_free_their_places(service: ServiceProcess) -> None:
    complete(service, "Once", 1)
    body = {"model": BASE, "prompt": "Once", "max_tokens": 1500, "ignore_eos": True, "stream": True}
    with ExitStack() as streams:
        asked = [
            streams.enter_context(service.http.stream("POST", "/v1/completions", json=body)) for _ in "123"
        ]
        chunks = [response.iter_bytes() for response in asked]  # kept: dropping one would close its response
        for each in chunks:
            next(each)
        service.wait_until(lambda: service.engine(BASE)["running"] == 3, 10)
    service.wait_until(lambda: service.engine(BASE)["running"] == 0, 5)
    service.wait_until(lambda: service.engine(BASE)["leases"] == 0, 5)


@shows("metrics")
def test_stats_tell_the_backend(service: ServiceProcess, engine: Engine) -> None:
    complete(service, "Once", 1)
    told = service.engine(BASE)
    assert told["notes"] == []
    assert told["running"] == 0
    if engine.name == "transformers":
        assert told["backend"] == "transformers"
