"""The whole service under mixed load and every trouble at once, until the time is up.

    python -m benchmarks.soak [--duration SECONDS] [--seed NUMBER] [--log FILE]

ENGINE=fake, a bucket of eight models of which four are in trouble, two slots. Every answer is checked word by
word; every error has to be explained by what was done (explanations.py), and whatever the service's process
holds has to come back. Exit code 1 where that is not so.
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
    """The first signal unwinds everything that was started; further ones change nothing."""
    for each in ENDING:
        signal.signal(each, signal.SIG_IGN)
    raise SystemExit(128 + number)


if __name__ == "__main__":
    arguments = argparse.ArgumentParser(prog="benchmarks.soak", description=__doc__.split("\n")[0])
    arguments.add_argument("--duration", type=float, default=600.0, help="seconds under load")
    arguments.add_argument("--seed", type=int, default=1, help="of the dice that decide what happens")
    arguments.add_argument("--log", type=Path, help="keep the service's log there")
    given = arguments.parse_args()
    for ending in ENDING:
        signal.signal(ending, _end)
    sys.exit(0 if report(asyncio.run(soak(given.duration, given.seed, given.log))) else 1)
