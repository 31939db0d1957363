"""Download a model from a bucket: this service against common tools, through the emulator, and against cp.

    python -m benchmarks.sync [--quick]

First with every connection capped (one stream of a store is slow, many add up), then uncapped. Every time
includes verifying the crc32c of every file against the listing. Files go to memory (/dev/shm), to measure the
network and the CPU, not this machine's disk. Last, the same model from a directory (file://), against cp.
"""

import argparse
import base64
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from urllib.parse import quote

import google_crc32c

from benchmarks import directory_copy
from benchmarks.gcs import BUCKET, Capped, capped, emulator, upload
from benchmarks.report import median, print_result, print_table, say, spread

PREFIX = "models/big"
SHARDS = 4
SMALL = {
    "config.json": 2_000,
    "tokenizer.json": 2 << 20,
    "tokenizer_config.json": 4_000,
    "vocab.json": 800_000,
}
CAP = 25_000_000
ROUNDS = 3
COPIES = 5
WORKERS = 8
CHUNK_BYTES = 32 << 20


@dataclass(frozen=True)
class Run:
    """One download: seconds, and the bytes by which the process grew beyond its idle size."""

    seconds: float
    grown_bytes: int = 0


def run(quick: bool) -> None:
    shard = (64 if quick else 256) << 20
    rounds = 1 if quick else ROUNDS
    files = {
        f"model-{number:05}-of-{SHARDS:05}.safetensors": shard for number in range(1, SHARDS + 1)
    } | SMALL
    total = sum(files.values())
    _touch_memory(total)
    say(f"uploading {total / 1e6:.0f} MB in {len(files)} files to the emulator")
    with emulator() as url:
        upload(url, {f"{PREFIX}/{name}": size for name, size in files.items()})
        with capped(url, CAP) as slow:
            one, ours, connections = _capped(slow, rounds, min(shard, 128 << 20), total)
        tools = _uncapped(url, rounds)
    copies = directory_copy.run(SHARDS, shard, max(rounds, COPIES))
    _report(total, one, ours, connections, tools, copies)


def _touch_memory(count: int) -> None:
    """Touch the memory: the first use in a virtual machine is slow, and must not be measured."""
    with tempfile.NamedTemporaryFile(dir="/dev/shm") as file:
        for _ in range(count // CHUNK_BYTES):
            file.write(bytes(CHUNK_BYTES))


def _capped(slow: Capped, rounds: int, one_bytes: int, total: int) -> tuple[list[float], list[float], int]:
    """Bytes per second of one stream and of this service, and the number of its connections."""
    one, ours, connections = [], [], 0
    for number in range(rounds):
        one.append(one_bytes / _child("one_stream", slow.url, one_bytes).seconds)
        slow.connections()
        ours.append(total / _child("this_service", slow.url).seconds)
        connections = slow.connections()
        say(
            f"capped, round {number + 1}: one stream {one[-1] / 1e6:.0f} MB/s, this service "
            f"{ours[-1] / 1e6:.0f} MB/s over {connections} connections"
        )
    return one, ours, connections


def _uncapped(url: str, rounds: int) -> dict[str, list[Run]]:
    tools: dict[str, list[Run]] = {name: [] for name in TOOLS if name != "one_stream"}
    for number in range(rounds):
        order = list(tools) if number % 2 == 0 else list(tools)[::-1]
        for name in order:
            tools[name].append(_child(name, url))
            say(f"uncapped, round {number + 1}, {name}: {tools[name][-1].seconds:.2f} s")
    return tools


def _report(
    total: int,
    one: list[float],
    ours: list[float],
    connections: int,
    tools: dict[str, list[Run]],
    copies: tuple[list[float], list[float]],
) -> None:
    over_one = [mine / single for mine, single in zip(ours, one, strict=True)]
    over_cap = [mine / (connections * CAP) for mine in ours]
    seconds = {name: [run.seconds for run in runs] for name, runs in tools.items()}
    mine = seconds.pop("this_service")
    best = min(seconds, key=lambda name: median(seconds[name]))
    over_best = [theirs / own for own, theirs in zip(mine, seconds[best], strict=True)]
    grown = max(run.grown_bytes for run in tools["this_service"])
    rows = [["capped", "one stream", f"{median(one) / 1e6:.0f}", spread(over_one)]]
    rows += [["capped", f"sum of the {connections} caps", f"{connections * CAP / 1e6:.0f}", spread(over_cap)]]
    for name, theirs in seconds.items():
        ratios = [other / own for own, other in zip(mine, theirs, strict=True)]
        rows.append(["uncapped", name, f"{total / median(theirs) / 1e6:.0f}", spread(ratios)])
    rows.append(["uncapped", "this service", f"{total / median(mine) / 1e6:.0f}", ""])
    over_cp = [own / cp for own, cp in zip(*copies, strict=True)]
    rows.append(["directory", "cp", f"{median(copies[1]) / 1e6:.0f}", spread(over_cp)])
    rows.append(["directory", "this service", f"{median(copies[0]) / 1e6:.0f}", ""])
    print_table(["connections", "against", "MB/s", "ours/theirs (min-max)"], rows)
    print(f"this service grew by at most {grown / 1e6:.0f} MB while downloading {total / 1e6:.0f} MB")
    figures = {
        "rounds": len(one),
        "bytes": total,
        "connections": connections,
        "best_tool": best,
        "grown_megabytes": round(grown / 1e6),
    }
    medians = {
        "over_one_stream": median(over_one),
        "over_cap_sum": median(over_cap),
        "over_best_tool": median(over_best),
        "over_cp": median(over_cp),
    }
    print_result("sync", medians, figures)


def _child(tool: str, url: str, one_bytes: int = 0) -> Run:
    """One download in its own process, so that none inherits another's memory or connections."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as room:
        command = [sys.executable, "-m", "benchmarks.sync", "--child", tool, room, str(one_bytes)]
        environment = os.environ | {
            "STORAGE_EMULATOR_HOST": url,
            "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
            "GOOGLE_CLOUD_PROJECT": "test",
        }
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True, text=True)
        return Run(**json.loads(done.stdout.splitlines()[-1]))


def child(tool: str, room: Path, one_bytes: int) -> None:
    with TOOLS[tool](room, one_bytes) as download:
        idle = _forget_peak()
        started = time.perf_counter()
        download()
        seconds = time.perf_counter() - started
    print(json.dumps(asdict(Run(seconds, _peak_bytes() - idle))))


Download = Callable[[], None]


@contextmanager
def this_service(room: Path, _: int) -> Iterator[Download]:
    from inference_service.storage.bucket.gcs import GcsStore
    from inference_service.storage.bucket.model import models_in
    from inference_service.storage.snapshots.cache import Disk
    from inference_service.storage.snapshots.layout import Layout
    from inference_service.storage.snapshots.snapshots import SnapshotStore

    store, layout = GcsStore(BUCKET), Layout(room)
    model = models_in(store.list("models/"), "models/")["big"]
    snapshots = SnapshotStore(store, layout, Disk(layout, 1 << 50))
    yield lambda: snapshots.ensure(model)


@contextmanager
def one_stream(room: Path, one_bytes: int) -> Iterator[Download]:
    name = f"{PREFIX}/{_shard(1)}"
    target = str(room / "one")
    ranged = ["--range", f"0-{one_bytes - 1}"]
    yield lambda: _run_curl([*ranged, "-o", target, _media_url(name)])


@contextmanager
def parallel_curl(room: Path, _: int) -> Iterator[Download]:
    listed = _listed()

    def download() -> None:
        parts = [
            (name, start, min(start + CHUNK_BYTES, size))
            for name, (size, _) in listed.items()
            for start in range(0, size, CHUNK_BYTES)
        ]
        for name in listed:
            (room / _base(name)).touch()

        def part(item: tuple[str, int, int]) -> Path:
            name, start, end = item
            path = room / f"{_base(name)}.{start:012}"
            _run_curl(["--range", f"{start}-{end - 1}", "-o", str(path), _media_url(name)])
            return path

        with ThreadPoolExecutor(WORKERS) as pool:
            for (name, _, _), path in zip(parts, pool.map(part, parts), strict=True):
                with (room / _base(name)).open("ab") as whole, path.open("rb") as piece:
                    shutil.copyfileobj(piece, whole, 1 << 20)
                path.unlink()
        _verify(room, listed)

    yield download


@contextmanager
def curl_files(room: Path, _: int) -> Iterator[Download]:
    """`curl --parallel`: one connection per file."""
    listed = _listed()

    def download() -> None:
        arguments = ["--parallel", "--parallel-max", str(WORKERS)]
        for name in listed:
            arguments += ["-o", str(room / _base(name)), _media_url(name)]
        _run_curl(arguments)
        _verify(room, listed)

    yield download


@contextmanager
def gcsfs_get(room: Path, _: int) -> Iterator[Download]:
    import gcsfs

    system = gcsfs.GCSFileSystem(token="anon", endpoint_url=os.environ["STORAGE_EMULATOR_HOST"])  # noqa: S106
    listed = _listed()

    def download() -> None:
        system.get(f"{BUCKET}/{PREFIX}/", f"{room}/", recursive=True)
        _verify(room, listed)

    yield download


@contextmanager
def transfer_manager(room: Path, _: int) -> Iterator[Download]:
    from google.auth.credentials import AnonymousCredentials
    from google.cloud import storage
    from google.cloud.storage import transfer_manager as manager

    client = storage.Client(project="test", credentials=AnonymousCredentials())
    listed = _listed()

    def download() -> None:
        for name, (size, _) in listed.items():
            blob = client.bucket(BUCKET).blob(name)
            path = str(room / _base(name))
            if size < CHUNK_BYTES:
                blob.download_to_filename(path, checksum=None)
            else:
                manager.download_chunks_concurrently(
                    blob, path, chunk_size=CHUNK_BYTES, max_workers=4, crc32c_checksum=False
                )
        _verify(room, listed)

    yield download


TOOLS = {
    "this_service": this_service,
    "one_stream": one_stream,
    "gcsfs_get": gcsfs_get,
    "transfer_manager": transfer_manager,
    "curl_files": curl_files,
    "curl_ranges": parallel_curl,
}


def _listed() -> dict[str, tuple[int, int]]:
    """Size and crc32c of every object of the model, from the listing."""
    from google.auth.credentials import AnonymousCredentials
    from google.cloud import storage

    client = storage.Client(project="test", credentials=AnonymousCredentials())
    blobs = list(client.bucket(BUCKET).list_blobs(prefix=f"{PREFIX}/"))
    return {blob.name: (blob.size, int.from_bytes(base64.b64decode(blob.crc32c), "big")) for blob in blobs}


def _verify(room: Path, listed: dict[str, tuple[int, int]]) -> None:
    for name, (size, expected) in listed.items():
        total = 0
        with (room / _base(name)).open("rb", buffering=0) as file:
            while chunk := file.read(1 << 20):
                total = google_crc32c.extend(total, chunk)
        if total != expected or (room / _base(name)).stat().st_size != size:
            raise RuntimeError(f"{name} is damaged")


def _shard(number: int) -> str:
    return f"model-{number:05}-of-{SHARDS:05}.safetensors"


def _base(name: str) -> str:
    return name.rpartition("/")[2]


def _media_url(name: str) -> str:
    endpoint = os.environ["STORAGE_EMULATOR_HOST"]
    return f"{endpoint}/download/storage/v1/b/{BUCKET}/o/{quote(name, safe='')}?alt=media"


def _run_curl(arguments: list[str]) -> None:
    curl = shutil.which("curl")
    if curl is None:
        raise RuntimeError("curl is required for this benchmark: install it")
    subprocess.run([curl, "--silent", "--no-progress-meter", "--fail", *arguments], check=True)


def _forget_peak() -> int:
    """Reset the peak (proc(5), clear_refs). Returns the resident bytes now."""
    Path("/proc/self/clear_refs").write_text("5")
    return _status_bytes("VmRSS")


def _peak_bytes() -> int:
    return _status_bytes("VmHWM")


def _status_bytes(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


if __name__ == "__main__":
    arguments = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    arguments.add_argument("--quick", action="store_true", help="a quarter of the bytes, one round")
    arguments.add_argument("--child", nargs=3, metavar=("TOOL", "DIRECTORY", "BYTES"), help=argparse.SUPPRESS)
    given = arguments.parse_args()
    if given.child:
        child(given.child[0], Path(given.child[1]), int(given.child[2]))
    else:
        run(given.quick)
