"""What someone with a GPU for ten minutes can measure, without a network.

    python -m benchmarks.gpu [--small] [--seconds 570]

Models of random weights are made first. The steps are ordered by value; each has a time limit, and one that
is not reached is reported as such. `--small` runs all of it with small models, also on the CPU.
"""

import argparse
import sys
import tempfile
from pathlib import Path

from benchmarks.gpu import models as made
from benchmarks.gpu.measure import Bench
from benchmarks.gpu.steps import Result, run, show
from benchmarks.report import print_result, say
from inference_service.machine.device import find_device

ROOMS = ("/dev/shm", tempfile.gettempdir())  # noqa: S108


def main(small: bool, seconds: float) -> int:
    device = find_device()
    memory, disk = (Path(room) for room in ROOMS)
    with tempfile.TemporaryDirectory(dir=memory) as fast, tempfile.TemporaryDirectory(dir=disk) as slow:
        say(f"making models of random weights; {device.name}")
        models = made.make(Path(fast, "bucket"), made.SMALL if small else made.FULL)
        bench = Bench(models, Path(fast), Path(slow), device, small=small)
        try:
            results = run(bench.steps(), seconds, bench.close)
        finally:
            bench.close()
    show(results)
    _print(results, device.name, small=small)
    return int(any(result.status == "failed" for result in results))


def _print(results: list[Result], device: str, *, small: bool) -> None:
    figures = {result.step: {"status": result.status, **result.figures} for result in results}
    ratios = {
        name: value for result in results for name, value in result.figures.items() if name.endswith("_ratio")
    }
    print_result("gpu", ratios, {"device": device, "small": small, **figures})


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--small", action="store_true", help="small models")
    parser.add_argument("--seconds", type=float, default=570.0, help="time for all steps")
    given = parser.parse_args()
    sys.exit(main(given.small, given.seconds))
