"""The engines of the suite, what each can do, and the table of it that the docs show.

A test names the capability that it shows, with `@shows("seed")`, and runs on each engine that has it; without
one it runs on the real ones.
"""

from dataclasses import dataclass

import pytest


@dataclass(frozen=True)
class Engine:
    """`processes` of one host; `settings` that make its answers comparable; `load_seconds` at least."""

    name: str
    processes: int
    load_seconds: float
    settings: dict[str, str]


ENGINES = {
    engine.name: engine
    for engine in (
        Engine("vllm", 2, 4.0, {}),
        # One stream and many compute alike in float32 only.
        Engine("transformers", 1, 1.0, {"DTYPE": "float32"}),
        Engine("fake", 1, 0.0, {"FAKE_TOKENS_PER_SECOND": "100"}),
    )
}
REAL = ("vllm", "transformers")

CAPABILITIES = {
    "requests": "chat and completions, prompts as text, lists and token ids, usage",
    "streaming": "server-sent events, usage in the last one",
    "cancellation": "a client that leaves frees its place at once",
    "adapters": "LoRA adapters beside their base",
    "swap": "other weights into the live engine",
    "death": "a killed engine fails its requests with an error and is replaced",
    "answers": "the model's own answers: in float32 those of transformers' `generate`, many together too",
    "sampling": "temperature, top_p, top_k, min_p, penalties, logit_bias, min_tokens",
    "seed": "equal seeds give equal answers, whoever runs beside, in float32",
    "n": "several answers to one request",
    "stop": "stop strings and tokens, none of which shows in a stream",
    "characters": "characters of several tokens come whole",
    "logprobs": "logprobs and top_logprobs",
    "echo": "the prompt with its own log probabilities (lm-eval)",
    "json": "response_format json_object and json_schema; regex, choice and EBNF in structured_outputs",
    "tools": "tools and tool_choice, streamed as well",
    "metrics": "health, statistics, metrics",
}
_WORDS = "the fake answers with fixed words"
LACKS = {
    ("fake", name): _WORDS
    for name in (
        *("answers", "sampling", "seed", "n", "stop", "characters", "logprobs", "echo", "json", "tools"),
    )
}


def having(capability: str) -> list[str]:
    return [name for name in ENGINES if (name, capability) not in LACKS]


def shows(capability: str) -> pytest.MarkDecorator:
    assert capability in CAPABILITIES, capability
    return pytest.mark.capability(capability)


def table() -> str:
    """Markdown: capabilities down, engines across."""
    lines = [f"| | {' | '.join(ENGINES)} |", f"|---|{'---|' * len(ENGINES)}"]
    for name, meaning in CAPABILITIES.items():
        marks = ["no" if (engine, name) in LACKS else "yes" for engine in ENGINES]
        lines.append(f"| **{name}**: {meaning} | {' | '.join(marks)} |")
    return "\n".join(lines)
