"""An engine's last error, in plain words."""

import pytest

from inference_service.engines.error_hints import in_plain_words


@pytest.mark.parametrize(
    ("error", "meaning"),
    [
        ("OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB", "it ran out of memory"),
        ("RuntimeError: [enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: Cannot "
         "allocate memory", "it ran out of memory"),
        ("ValueError: Free memory on device cuda:0 (1.2/22 GiB) on startup is less than", "out of memory"),
        ("ValueError: To serve at least one request with the models's max seq len (8192), 2.0 GiB KV cache "
         "is needed, which is larger than the available KV cache memory", "KV cache is too small"),
        ("SafetensorError: Error while deserializing header: MetadataIncompleteBuffer", "truncated"),
        ("ValueError: Model architectures ['FooForCausalLM'] are not supported for now.", "not supported"),
        ("ValueError: There is no module or parameter named 'x' in LlamaForCausalLM", "do not match"),
        ("ValidationError: 1 validation error for ModelConfig", "its configuration is wrong"),
    ],
)  # fmt: skip
def test_what_it_means_stands_before_the_engines_own_words(error: str, meaning: str) -> None:
    told = in_plain_words(error, 1)
    assert meaning in told
    assert told.endswith(error)


def test_an_error_that_nobody_knows_is_told_as_it_is() -> None:
    assert in_plain_words("KeyError: 'hidden'", 1) == "KeyError: 'hidden'"


@pytest.mark.parametrize(
    ("status", "told"),
    [
        (-9, "SIGKILL, most likely because the system ran out of memory"),
        (-11, "SIGSEGV"),
        (3, "exit code 3"),
    ],
)
def test_a_process_that_said_nothing(status: int, told: str) -> None:
    assert told in in_plain_words(None, status)
