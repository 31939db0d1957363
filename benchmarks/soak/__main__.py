"""Run the whole service under mixed load and every fault at once, for a given time.

    python -m benchmarks.soak [--duration SECONDS] [--seed NUMBER] [--log FILE]

ENGINE=fake, two slots, and a bucket of eight models, four of them faulty. Every answer is checked word by
word. Every error must be explained by a deed of the soak (explanations.py), and the service's process must
give back what it took under load. Otherwise the exit code is 1.
"""

import argparse
import asyncio
import signal
import sys
from pathlib import Path
from types import FrameType

from benchmarks.soak.report import report
from benchmarks.soak.scenario import soak

ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def _end(number: int, _: FrameType | None) -> None:
    """The first signal stops everything that was started; further ones are ignored."""
    for each in ENDING:
        signal.signal(each, signal.SIG_IGN)
    raise SystemExit(128 + number)


if __name__ == "__main__":
    arguments = argparse.ArgumentParser(prog="benchmarks.soak", description=__doc__.split("\n")[0])
    arguments.add_argument("--duration", type=float, default=600.0, help="seconds under load")
    arguments.add_argument("--seed", type=int, default=1, help="of the random number generator")
    arguments.add_argument("--log", type=Path, help="write the service's log to this file")
    given = arguments.parse_args()
    for ending in ENDING:
        signal.signal(ending, _end)
    sys.exit(0 if report(asyncio.run(soak(given.duration, given.seed, given.log))) else 1)
