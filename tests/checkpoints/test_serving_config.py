"""serving.json: every key, and a clear word for everything else."""

import json

import pytest

from inference_service.checkpoints.serving_config import BadServing, Serving, parse_serving

EVERYTHING = {
    "max_model_len": 4096,
    "dtype": "bfloat16",
    "quantization": "fp8",
    "tool_call_parser": "hermes",
    "reasoning_parser": "qwen3",
    "max_num_seqs": 32,
    "kv_cache_gib": 1.5,
    "tensor_parallel_size": 2,
    "enable_prefix_caching": False,
    "sampling_defaults": {"temperature": 0, "top_p": 0.9, "top_k": 20, "min_p": 0.1, "max_tokens": 64},
    "aliases": ["gpt-4o", "team/best"],
    "base": "org/model",
    "pinned": True,
    "preload": True,
    "max_lora_rank": 64,
}


def test_every_key() -> None:
    serving = parse_serving(json.dumps(EVERYTHING).encode())
    assert set(EVERYTHING) == set(Serving.model_fields)
    assert serving.aliases == ("gpt-4o", "team/best")
    assert serving.sampling_defaults.max_tokens == 64
    assert serving.sampling_defaults.generation_config() == {
        "temperature": 0,
        "top_p": 0.9,
        "top_k": 20,
        "min_p": 0.1,
    }


def test_nothing_is_needed() -> None:
    assert parse_serving(b"{}") == Serving()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ('{"max_modle_len": 1}', "unknown key 'max_modle_len'; known keys are max_model_len, dtype"),
        (
            '{"sampling_defaults": {"temp": 1}}',
            "unknown key 'sampling_defaults.temp'; known keys are temperature",
        ),
        ('{"max_model_len": "4096"}', "max_model_len: Input should be a valid integer"),
        ('{"max_model_len": true}', "max_model_len"),
        ('{"max_model_len": 0}', "max_model_len: Input should be greater than or equal to 1"),
        ('{"max_model_len": 1e30}', "max_model_len"),
        ('{"kv_cache_gib": NaN}', "kv_cache_gib"),
        ('{"dtype": "int4"}', "dtype"),
        ('{"aliases": "one"}', "aliases"),
        ('{"aliases": ["a b"]}', "aliases.0"),
        ('{"aliases": ["../x"]}', "aliases.0"),
        ('{"max_lora_rank": 7}', "max_lora_rank"),
        ('{"tool_call_parser": "--trust-remote-code x"}', "tool_call_parser"),
        ('{"pinned": "yes"}', "pinned"),
        ('{"pinned": true, "pinned": false}', "the key 'pinned' is given twice"),
        ("[]", "the file"),
        ("{", "the file"),
        ("", "the file"),
        ("[" * 100_000, "the file"),
        ("\xff", "the file"),
    ],
)
def test_what_is_wrong_is_named(content: str, words: str) -> None:
    with pytest.raises(BadServing) as caught:
        parse_serving(content.encode("latin-1"))
    assert words in str(caught.value)
    assert str(caught.value).startswith("serving.json: ")
