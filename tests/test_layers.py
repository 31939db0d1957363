"""Floors and fences: imports go down only, and heavy packages stay where they belong."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "inference_service"
# Room (or top-level module) -> floor. A module imports from its own room and from lower floors only: rooms of
# the same floor do not know each other.
FLOORS = {
    "errors": 0,
    "config": 0,
    "logs": 0,
    "metrics": 0,
    "machine": 1,
    "checkpoints": 2,
    "scheduler": 2,
    "backends": 3,
    "engines": 4,
    "storage": 4,
    "pool": 5,
    "revisions": 6,
    "api": 7,
    "app": 8,
    "cli": 8,
    "__main__": 9,
}
# Hosts are programs of their own: what they may import of the service.
ROOMS_OF_HOSTS = ("hosts", "engines", "backends", "checkpoints", "machine")
# Package -> the only places that may import it.
FENCES = {
    "fastapi": ("api/", "app.py", "hosts/"),
    "starlette": ("api/", "app.py", "hosts/"),
    "google": ("storage/bucket/gcs.py",),
    "requests": ("storage/bucket/gcs.py",),
    "urllib3": ("storage/bucket/gcs.py",),
    "torch": ("hosts/",),
    "vllm": ("hosts/",),
    "transformers": ("hosts/",),
    "prometheus_client": ("metrics.py",),
    "httptools": ("engines/host_client.py",),
    "pynvml": ("machine/",),
    "fcntl": ("storage/snapshots/locks.py",),
}
# Modules and rooms that only compute: no clock, no file, no task of their own.
PURE = ("scheduler", "checkpoints")
PURE_IMPORTS = frozenset(
    {
        "collections",
        "collections.abc",
        "dataclasses",
        "enum",
        "hashlib",
        "itertools",
        "json",
        "math",
        "pathlib",
        "re",
    }
    | {"struct", "typing", "pydantic"}
)
MODULES = sorted(PACKAGE.rglob("*.py"))


def imports(file: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            yield node.module or ""


def room(dotted: str) -> str:
    """`inference_service.pool.pool` -> `pool`; the package itself -> ``."""
    return [*dotted.split("."), ""][1]


@pytest.mark.parametrize("file", MODULES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_imports_go_down_only(file: Path) -> None:
    own = file.relative_to(PACKAGE).parts[0].removesuffix(".py")
    if own in ("hosts", "__init__"):
        return
    for name in imports(file):
        if name.startswith("inference_service") and room(name) not in ("", own):
            assert FLOORS[room(name)] < FLOORS[own], f"{own} may not import {name}"


@pytest.mark.parametrize("file", MODULES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_fences(file: Path) -> None:
    place = file.relative_to(PACKAGE).as_posix()
    for name in imports(file):
        allowed = FENCES.get(name.split(".")[0])
        assert allowed is None or place.startswith(allowed), f"{place} may not import {name}"


def test_every_room_has_a_floor() -> None:
    rooms = {file.relative_to(PACKAGE).parts[0].removesuffix(".py") for file in MODULES}
    assert rooms == {*FLOORS, "hosts", "__init__"}


def test_hosts_know_the_engine_room_only() -> None:
    for file in (PACKAGE / "hosts").rglob("*.py"):
        for name in imports(file):
            if name.startswith("inference_service"):
                assert room(name) in ROOMS_OF_HOSTS, f"{file} may not import {name}"


def test_tokens_and_http_are_apart() -> None:
    """What runs the model knows no HTTP, what speaks HTTP knows no torch."""
    backend = PACKAGE / "hosts" / "transformers"
    for file in (backend / "generation").glob("*.py"):
        assert not any(
            name.startswith(("fastapi", "starlette", "inference_service.hosts.transformers.openai"))
            for name in imports(file)
        )
    for file in (backend / "openai").glob("*.py"):
        assert not any(name.split(".")[0] == "torch" for name in imports(file))


def test_nothing_in_the_service_imports_hosts() -> None:
    for file in MODULES:
        if "hosts" not in file.parts:
            assert not any(name.startswith("inference_service.hosts") for name in imports(file))


@pytest.mark.parametrize("name", PURE)
def test_pure_rooms(name: str) -> None:
    for file in (PACKAGE / name).glob("*.py"):
        others = {each for each in imports(file) if not each.startswith("inference_service")}
        assert others <= PURE_IMPORTS, file


def test_the_scheduler_reads_alone() -> None:
    for file in (PACKAGE / "scheduler").glob("*.py"):
        assert all(
            name.startswith("inference_service.scheduler") or "." not in name or name == "collections.abc"
            for name in imports(file)
        ), file


def test_the_service_never_loads_an_engine_library() -> None:
    code = (
        "import sys, inference_service.app, inference_service.__main__;"
        "print([m for m in ('torch', 'vllm', 'transformers') if m in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
