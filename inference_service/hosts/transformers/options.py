"""The command line of a transformers host, as backends/transformers.py builds it, and its parsed options."""

import argparse
import json
from dataclasses import dataclass
from typing import NoReturn

from inference_service.engines.base import HostSpec
from inference_service.hosts.transformers.generation.engine import Engine, EngineOptions
from inference_service.hosts.transformers.generation.weights import Placement
from inference_service.hosts.transformers.openai.detokenizer import TokenTexts
from inference_service.hosts.transformers.openai.serving import Served


@dataclass(frozen=True)
class HostOptions:
    """`reasons`: the model writes its reasoning between tags, to be separated from its answer."""

    engine: EngineOptions
    reasons: bool


def parse_options(spec: HostSpec) -> HostOptions:
    parser = _Parser("transformers host")
    parser.add_argument("--device", choices=("cpu", "cuda", "mps"), required=True)
    parser.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), required=True)
    parser.add_argument("--spread", action="store_true")
    parser.add_argument("--int8", action="store_true")
    parser.add_argument("--kv-cache-bytes", type=int, required=True)
    parser.add_argument("--max-model-len", type=int)
    parser.add_argument("--max-num-seqs", type=int, required=True)
    parser.add_argument("--sampling-defaults", type=json.loads, default={})
    parser.add_argument("--reasons", action="store_true")
    parser.add_argument("--no-prefix-caching", action="store_true")
    given = parser.parse_args(list(spec.arguments))
    place = Placement(given.device, given.dtype, spread=given.spread, int8=given.int8)
    return HostOptions(
        EngineOptions(
            place,
            given.kv_cache_bytes,
            given.max_model_len,
            given.max_num_seqs,
            given.sampling_defaults,
            shares_prefixes=not given.no_prefix_caching,
        ),
        reasons=given.reasons,
    )


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """Raise instead of exiting: a swap request to a running host is parsed here, too."""
        raise ValueError(f"{self.prog}: {message}")


def serve(engine: Engine, spec: HostSpec, options: HostOptions) -> Served:
    """What the host serves: the engine under the model's name, with its defaults."""
    return Served(engine, spec.model, spec.default_max_tokens, options.reasons, TokenTexts(engine.tokenizer))
