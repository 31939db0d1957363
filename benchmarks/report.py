"""The output of every benchmark: a table, and one JSON object as the last line."""

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any


def median(values: Sequence[float]) -> float:
    return round(statistics.median(values), 4)


def percentile(values: Sequence[float], share: float) -> float:
    """Nearest-rank percentile: `share` of the values do not exceed it."""
    return sorted(values)[max(0, math.ceil(share * len(values)) - 1)]


def spread(values: Sequence[float]) -> str:
    """`1.010 (0.980-1.050)`: median, minimum and maximum."""
    return f"{statistics.median(values):.3f} ({min(values):.3f}-{max(values):.3f})"


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    widths = [max(len(row[column]) for row in (header, *rows)) for column in range(len(header))]
    for row in (header, ["-" * width for width in widths], *rows):
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def print_result(bench: str, ratios: Mapping[str, float], figures: Mapping[str, Any]) -> None:
    """Print the last line. Values that could not be measured (infinite) are null."""
    result = {"bench": bench, "ratios": _finite(ratios), "figures": _finite(figures)}
    print(json.dumps(result, allow_nan=False), flush=True)


def _finite(values: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in values.items()
    }


def say(line: str) -> None:
    print(f"  … {line}", flush=True)
