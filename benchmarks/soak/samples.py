"""Resources of the service's process, sampled in the lulls, and a regression line through each series."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

MIB = 1 << 20
WARM_UP = 0.25
# Memory is flat if its line rises by less than this from the end of the warm-up to the end of the load:
# allocators vary by this much, while a leak grows with every request.
FLAT_MIB = 3.0
# In a shorter soak allocators are still growing: its memory is reported but not judged.
JUDGED_SECONDS = 300.0


@dataclass(frozen=True)
class Sample:
    """The process at `at`; `processes`: the number of its descendants."""

    at: float
    resident_mib: float
    open_files: int
    threads: int
    tasks: int
    processes: int
    leases: int


SERIES = ("resident_mib", "open_files", "threads", "tasks", "processes", "leases")


@dataclass(frozen=True)
class Line:
    """A series after the warm-up, and the regression line through it."""

    first: float
    last: float
    slope_per_hour: float
    rise: float


def line_of(samples: Sequence[Sample], series: str) -> Line:
    """The line through the samples after the warm-up. Flat if there is only one."""
    warm = samples[0].at + WARM_UP * (samples[-1].at - samples[0].at)
    kept = [sample for sample in samples if sample.at >= warm]
    times = [sample.at for sample in kept]
    values = [float(getattr(sample, series)) for sample in kept]
    slope = statistics.linear_regression(times, values).slope if len(set(times)) > 1 else 0.0
    return Line(values[0], values[-1], slope * 3600, slope * (times[-1] - times[0]))
