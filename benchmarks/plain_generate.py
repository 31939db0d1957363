"""transformers' plain `generate` in a process of its own, which times itself on order.

    python -m benchmarks.plain_generate CHECKPOINT DTYPE

Reads orders from its standard input, one JSON object a line (`prompts`, `tokens`, `together`), and answers
each with the tokens and the seconds that it took.
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
        order = json.loads(line)
        batches = [order["prompts"]] if order["together"] else [[prompt] for prompt in order["prompts"]]
        started = time.perf_counter()
        count = sum(_generate(model, tokenizer, batch, order["tokens"]) for batch in batches)
        print(json.dumps({"tokens": count, "seconds": time.perf_counter() - started}), flush=True)


@torch.no_grad()  # type: ignore[untyped-decorator]
def _generate(model: Any, tokenizer: Any, prompts: list[str], tokens: int) -> int:
    """The number of tokens generated; the end of a text is no reason to stop."""
    inputs = tokenizer(prompts, return_tensors="pt", padding=True)
    wish = GenerationConfig(do_sample=False, max_new_tokens=tokens, pad_token_id=tokenizer.pad_token_id)
    found = model.generate(**inputs, generation_config=wish)
    return int((found.shape[1] - inputs["input_ids"].shape[1]) * len(prompts))


if __name__ == "__main__":
    main()
