"""Compiled artefacts that machines share: what is pulled, pushed and merged, and what no archive may do."""

import io
import tarfile
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from inference_service.storage.bucket.artefacts import Artefacts, open_artefacts
from inference_service.storage.compiled import CompileCache
from tests.fixtures.bucket import new_bucket

Open = Callable[[], Artefacts]


class Machine:
    """One service's side of the cache."""

    def __init__(self, artefacts: Artefacts, room: Path) -> None:
        self.outcomes: Counter[str] = Counter()
        self.cache = CompileCache(artefacts, room, lambda swap: f"key-{swap}", self._report)

    def _report(self, outcome: str) -> None:
        self.outcomes[outcome] += 1


@pytest.fixture(params=["directory", "gcs"])
def shared(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Open:
    if request.param == "directory":
        return lambda: open_artefacts(f"{tmp_path}/not/there/yet")
    url = request.getfixturevalue("gcs_url")
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", url)
    monkeypatch.setenv("GOOGLE_CLOUD_PROJECT", "test")
    bucket = request.getfixturevalue("compiled_bucket")
    return lambda: open_artefacts(f"gs://{bucket}/some/prefix")


@pytest.fixture
def compiled_bucket(gcs_url: str) -> Iterator[str]:
    with new_bucket(gcs_url, f"compiled-{uuid.uuid4().hex}") as bucket:
        yield bucket.name


def files(directory: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()
    }


async def test_what_one_machine_compiles_another_pulls(shared: Open, tmp_path: Path) -> None:
    one, two = (Machine(shared(), tmp_path / name) for name in ("one", "two"))
    directory = await one.cache.pull("a")
    assert one.outcomes == {"missing": 1}
    await one.cache.push(directory)
    assert one.outcomes == {"missing": 1}, "it has compiled nothing yet"
    (directory / "vllm" / "deep").mkdir(parents=True)
    (directory / "vllm" / "deep" / "graph").write_bytes(b"code" * 1000)
    (directory / "triton").mkdir()
    (directory / "triton" / "kernel.so").write_bytes(b"kernel")
    (directory / "triton" / "kernel.tmp.pid_1").write_bytes(b"half")
    await one.cache.push(directory)
    await one.cache.push(directory)
    assert one.outcomes == {"missing": 1, "pushed": 1}
    found = await two.cache.pull("a")
    assert files(found) == {"vllm/deep/graph": b"code" * 1000, "triton/kernel.so": b"kernel"}
    await two.cache.push(found)
    await two.cache.pull("a")
    assert two.outcomes == {"pulled": 1}
    assert await two.cache.pull("b") != found
    assert two.outcomes == {"pulled": 1, "missing": 1}


async def test_machines_that_compile_at_once_lose_nothing(shared: Open, tmp_path: Path) -> None:
    machines = [Machine(shared(), tmp_path / name) for name in ("one", "two", "three")]
    for number, machine in enumerate(machines[:2]):
        directory = await machine.cache.pull("a")
        directory.mkdir(parents=True)
        (directory / f"kernel-{number}").write_bytes(b"code")
    for machine in machines[:2]:
        await machine.cache.push(await machine.cache.pull("a"))
    assert files(await machines[2].cache.pull("a")).keys() == {"kernel-0", "kernel-1"}


def archive(*members: tuple[str, bytes | str]) -> bytes:
    """A tar file; a text is the target of a symbolic link."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as tar:
        for name, content in members:
            member = tarfile.TarInfo(name)
            if isinstance(content, str):
                member.type, member.linkname = tarfile.SYMTYPE, content
                tar.addfile(member)
            else:
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    return packed.getvalue()


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(archive(("../../escaped", b"x")), id="above"),
        pytest.param(archive(("link", "/etc"), ("link/escaped", b"x")), id="through a link"),
        pytest.param(archive(("a", b"x" * 5000))[:2000], id="cut off"),
        pytest.param(b"no archive", id="no archive"),
        pytest.param(b"", id="empty"),
    ],
)
async def test_an_archive_that_is_damaged_or_hostile_costs_a_compilation(
    tmp_path: Path, content: bytes
) -> None:
    (tmp_path / "shared").mkdir()
    (tmp_path / "shared" / "key-a.tar").write_bytes(content)
    machine = Machine(open_artefacts(str(tmp_path / "shared")), tmp_path / "room" / "cache")
    await machine.cache.pull("a")
    assert machine.outcomes == {"failed": 1}
    assert not list(tmp_path.rglob("escaped"))
    assert files(tmp_path / "room") == {}


async def test_a_cache_that_cannot_be_reached_costs_a_compilation(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_bytes(b"not a directory")
    machine = Machine(open_artefacts(str(tmp_path / "file")), tmp_path / "room")
    directory = await machine.cache.pull("a")
    directory.mkdir(parents=True)
    (directory / "kernel").write_bytes(b"code")
    await machine.cache.push(directory)
    assert machine.outcomes == {"failed": 2}
    assert "COMPILE_CACHE" in caplog.text
    assert files(directory) == {"kernel": b"code"}


async def test_a_pull_that_failed_is_tried_again_and_one_that_did_not_is_not(tmp_path: Path) -> None:
    shared = tmp_path / "shared"
    one = Machine(open_artefacts(str(shared)), tmp_path / "one")
    directory = await one.cache.pull("a")
    directory.mkdir(parents=True)
    (directory / "kernel").write_bytes(b"code")
    await one.cache.push(directory)
    archive = (shared / "key-a.tar").read_bytes()
    (shared / "key-a.tar").write_bytes(b"no archive")
    two = Machine(open_artefacts(str(shared)), tmp_path / "two")
    await two.cache.pull("a")
    (shared / "key-a.tar").write_bytes(archive)
    for _ in range(2):
        assert files(await two.cache.pull("a")) == {"kernel": b"code"}
    assert two.outcomes == {"failed": 1, "pulled": 1}
