"""transformers' plain `generate` in its own process, which times itself on request.

    python -m benchmarks.plain_generate CHECKPOINT DTYPE

Reads requests from its standard input, one JSON object per line (`prompts`, `tokens`, `together`). Answers
each with the number of tokens and the seconds.
"""

import json
import sys
import time
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig


def main() -> None:
    directory, dtype = sys.argv[1], sys.argv[2]
    tokenizer = AutoTokenizer.from_pretrained(directory, padding_side="left")
    tokenizer.pad_token = tokenizer.eos_token
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=getattr(torch, dtype)).eval()
    model.generation_config = GenerationConfig()
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        batches = [request["prompts"]] if request["together"] else [[prompt] for prompt in request["prompts"]]
        started = time.perf_counter()
        count = sum(_generate(model, tokenizer, batch, request["tokens"]) for batch in batches)
        print(json.dumps({"tokens": count, "seconds": time.perf_counter() - started}), flush=True)


@torch.no_grad()  # type: ignore[untyped-decorator]
def _generate(model: Any, tokenizer: Any, prompts: list[str], tokens: int) -> int:
    """The number of generated tokens; ignores end-of-text tokens."""
    inputs = tokenizer(prompts, return_tensors="pt", padding=True)
    config = GenerationConfig(do_sample=False, max_new_tokens=tokens, pad_token_id=tokenizer.pad_token_id)
    found = model.generate(**inputs, generation_config=config)
    return int((found.shape[1] - inputs["input_ids"].shape[1]) * len(prompts))


if __name__ == "__main__":
    main()
