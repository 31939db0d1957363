"""The HTTP front end of this service with the fake engine: its overhead and its limits.

    python -m benchmarks.front [--quick]

Whole answers against the host's own; streams; three times the admitted load; and the CPU time per streamed
token against plain proxies in front of the same host, in alternating rounds. The client is a process of its
own, and the table shows the CPU usage of each process: on a small machine the client or the host may be the
bottleneck.
"""

import argparse
import resource
import signal
from types import FrameType

from benchmarks.front_parts import (
    FULL,
    QUICK,
    Report,
    many_streams,
    per_token,
    three_times,
    whole_answers,
)
from benchmarks.report import print_result, print_table

ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def run(quick: bool) -> None:
    plan, report = QUICK if quick else FULL, Report()
    # Each stream takes two file descriptors in the service; every process inherits the limit.
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    for part in (whole_answers, many_streams, three_times, per_token):
        part(plan, report)
    print_table(["measured", "value", "target", "CPU, of one core"], report.rows)
    print_result("front", report.ratios, report.figures)


def _end(number: int, _: FrameType | None) -> None:
    """The first signal stops everything that was started; further ones are ignored."""
    for each in ENDING:
        signal.signal(each, signal.SIG_IGN)
    raise SystemExit(128 + number)


if __name__ == "__main__":
    arguments = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    arguments.add_argument("--quick", action="store_true", help="fewer rounds and rates, all of them shorter")
    given = arguments.parse_args()
    for ending in ENDING:
        signal.signal(ending, _end)
    run(given.quick)
