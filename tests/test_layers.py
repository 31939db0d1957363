"""Floors and fences: imports go down only, and heavy packages stay where they belong."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "inference_service"
# Room (or top-level module) -> floor. A module imports from its own room and from lower floors.
FLOORS = {
    "errors": 0,
    "config": 0,
    "logs": 0,
    "metrics": 0,
    "models": 0,
    "engines": 1,
    "storage": 2,
    "pool": 3,
    "api": 5,
    "app": 6,
    "commands": 6,
    "__main__": 7,
}
# Package -> the only places that may import it.
FENCES = {
    "fastapi": ("api/", "app.py", "hosts/"),
    "starlette": ("api/", "app.py", "hosts/"),
    "google": ("storage/gcs.py",),
    "requests": ("storage/gcs.py",),
    "urllib3": ("storage/gcs.py",),
    "torch": ("hosts/",),
    "vllm": ("hosts/",),
    "transformers": ("hosts/",),
    "prometheus_client": ("metrics.py",),
    "aiohttp": ("engines/hosted.py",),
    "pynvml": ("engines/device.py", "engines/memory.py"),
}
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


def test_hosts_know_the_engine_room_only() -> None:
    for file in (PACKAGE / "hosts").rglob("*.py"):
        for name in imports(file):
            if name.startswith("inference_service"):
                assert room(name) in ("engines", "hosts")


def test_tokens_and_http_are_apart() -> None:
    """What runs the model knows no HTTP, what speaks HTTP knows no torch."""
    for file in (PACKAGE / "hosts" / "generation").glob("*.py"):
        assert not any(
            name.startswith(("fastapi", "starlette", "inference_service.hosts.openai"))
            for name in imports(file)
        )
    for file in (PACKAGE / "hosts" / "openai").glob("*.py"):
        assert not any(name.split(".")[0] == "torch" for name in imports(file))


def test_nothing_in_the_service_imports_hosts() -> None:
    for file in MODULES:
        if "hosts" not in file.parts:
            assert not any(name.startswith("inference_service.hosts") for name in imports(file))


def test_the_scheduler_is_pure() -> None:
    pure = ("scheduler", "room", "views")
    allowed = {
        *("collections.abc", "dataclasses", "enum"),
        *("inference_service.engines.base", "inference_service.pool.events"),
        *(f"inference_service.pool.{name}" for name in pure),
    }
    for name in pure:
        assert set(imports(PACKAGE / "pool" / f"{name}.py")) <= allowed


def test_the_service_never_loads_an_engine_library() -> None:
    code = (
        "import sys, inference_service.app, inference_service.__main__;"
        "print([m for m in ('torch', 'vllm', 'transformers') if m in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
