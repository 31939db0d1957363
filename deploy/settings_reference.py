"""Write docs/configuration.md and .env.example from the settings themselves.

    python -m deploy.settings_reference

A test holds both files equal to what this writes.
"""

import textwrap
from enum import Enum
from pathlib import Path
from typing import Any

from inference_service.config import Settings

ROOT = Path(__file__).parents[1]
REFERENCE = ROOT / "docs" / "configuration.md"
EXAMPLE = ROOT / ".env.example"
WIDTH = 118

GROUPS = {
    "Models and the bucket": (
        *("gcs_bucket", "gcs_model_prefix", "catalog_ttl", "preload_models"),
        *("local_model_cache", "disk_cache_gib", "host_cache_gib"),
    ),
    "Engines": (
        *("engine", "dtype", "max_model_len", "max_cached_models", "max_sleeping", "weight_swap"),
        *("max_adapters", "max_cpu_adapters", "gpu_memory_utilization", "tensor_parallel_size"),
        *("engine_eager", "cuda_graph_sizes", "compile_cache", "load_format", "warm_launcher"),
        *("load_timeout", "engine_stall_timeout", "model_idle_ttl"),
    ),
    "Requests and waiting": (
        *("max_concurrent_requests", "max_queued_requests", "queue_timeout", "request_timeout"),
        *("cold_start_grace", "fairness_wait", "min_residency", "default_max_tokens", "default_temperature"),
    ),
    "Network and access": ("listen_address", "port", "admin_api_key", "admin_open"),
    "Operation": ("drain_timeout", "log_format", "log_level"),
    "Development": ("local_dev", "cpu_int8", "fake_tokens_per_second"),
}

INTRODUCTION = """# Configuration

Settings are environment variables, or lines of a `.env` file in the working directory
([.env.example](../.env.example) has all of them). A value that is not allowed stops the start with one line
that says what is allowed. An empty value means unset. What [serving.json](models.md#servingjson) says about
a model wins over these settings.

Google credentials are Application Default Credentials; `STORAGE_EMULATOR_HOST` points at an emulator.

This page is written by `python -m deploy.settings_reference`.
"""


def default_of(name: str) -> str:
    """The default as one would write it in the environment; empty if the setting is unset."""
    value: Any = Settings.model_fields[name].default
    match value:
        case None | ():
            return ""
        case bool():
            return str(value).lower()
        case Enum():
            return str(value.value)
    return str(value)


def reference() -> str:
    """The content of docs/configuration.md."""
    return "\n".join([INTRODUCTION, *(_section(title, names) for title, names in GROUPS.items())])


def example() -> str:
    """The content of .env.example."""
    lines = [
        "# Every setting with its default. Copy to .env, uncomment and change what you need.",
        "# An empty value means unset.",
    ]
    for title, names in GROUPS.items():
        lines += ["", f"## {title}"]
        for name in names:
            described = textwrap.wrap(_description(name), WIDTH, initial_indent="# ", subsequent_indent="# ")
            lines += ["", *described, f"# {name.upper()}={default_of(name)}"]
    return "\n".join([*lines, ""])


def _section(title: str, names: tuple[str, ...]) -> str:
    rows = [_row(name) for name in names]
    return "\n".join([f"## {title}", "", "| Variable | Default | Meaning |", "|---|---|---|", *rows, ""])


def _row(name: str) -> str:
    default = default_of(name)
    return f"| `{name.upper()}` | {f'`{default}`' if default else ''} | {_description(name)} |"


def _description(name: str) -> str:
    return Settings.model_fields[name].description or ""


if __name__ == "__main__":
    REFERENCE.write_text(reference())
    EXAMPLE.write_text(example())
