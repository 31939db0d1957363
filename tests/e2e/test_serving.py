"""serving.json on a real engine: what it says wins over the environment for its model."""

import openai
import pytest

from tests.e2e.engines import Engine
from tests.fixtures.bucket import Bucket
from tests.fixtures.checkpoints import Checkpoints
from tests.fixtures.service_process import ServiceProcess

SERVING = b"""{
    "max_model_len": 256, "max_num_seqs": 4, "kv_cache_gib": 0.1, "enable_prefix_caching": false,
    "dtype": "bfloat16", "tool_call_parser": "hermes",
    "sampling_defaults": {"temperature": 0, "max_tokens": 5}, "aliases": ["gpt-4o"]
}"""
QUESTION = [{"role": "user", "content": "What is the capital of France?"}]


def test_it_wins_over_the_environment(
    service: ServiceProcess, bucket: Bucket, checkpoints: Checkpoints, engine: Engine
) -> None:
    bucket.upload(checkpoints.base, "models/m")
    bucket.put("models/m/serving.json", SERVING)
    try:
        client = service.openai
        answers = [
            client.chat.completions.create(model="gpt-4o", messages=QUESTION)  # type: ignore[arg-type]
            for _ in range(3)
        ]
        assert {answer.usage.completion_tokens for answer in answers if answer.usage} == {5}
        assert len({answer.choices[0].message.content for answer in answers}) == 1, "temperature 0"
        with pytest.raises(openai.BadRequestError, match="256"):
            client.completions.create(model="m", prompt="word " * 400, max_tokens=1)
        log = service.log.read_text()
        assert "max_seq_len=256" in log
        assert "dtype=torch.bfloat16" in log
        assert "enable_prefix_caching=False" in log
    finally:
        bucket.remove("models/m/")
