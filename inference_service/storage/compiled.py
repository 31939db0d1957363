"""Compiled artefacts of engines, shared between machines (COMPILE_CACHE).

Each key has a directory of its own, in which vLLM and Triton keep what they compile, and a tar file of it in
the cache. It is pulled beside the weights, before the first engine of that key on this machine, and pushed
when a load has compiled something. It is code that engines run: whoever may write there runs code here.

A failure costs a compilation, never a load.
"""

import asyncio
import logging
import os
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from inference_service.storage.bucket.artefacts import Artefacts

logger = logging.getLogger(__name__)

# Below LOCAL_MODEL_CACHE; no model's name begins with a dot.
KEPT_COMPILED = ".compiled"
FAILED = "failed"

# Relative path and size of every file.
_Contents = frozenset[tuple[str, int]]


class CompileCache:
    """The artefacts in `cache`, with a copy below LOCAL_MODEL_CACHE.

    `key` is the name of a swap key's artefacts on this machine; `report` is called with what has happened:
    pulled, missing, pushed or failed.
    """

    def __init__(
        self, cache: Artefacts, root: Path, key: Callable[[str], str], report: Callable[[str], None]
    ) -> None:
        self._cache = cache
        self._root = root / KEPT_COMPILED
        self._key = key
        self._report = report
        self._threads = ThreadPoolExecutor(2, thread_name_prefix="compiled")
        # Those that failed are tried again with the next load.
        self._pulls: dict[str, asyncio.Future[bool]] = {}
        # What the cache has, as far as is known.
        self._shared: dict[str, _Contents] = {}

    async def pull(self, swap_key: str) -> Path:
        """The directory for what engines with this swap key compile, once what the cache has is there."""
        loop, key = asyncio.get_running_loop(), self._key(swap_key)
        if key not in self._pulls:
            self._pulls[key] = loop.run_in_executor(self._threads, self._work, self._pull, key)
        pull = self._pulls[key]
        if not await asyncio.shield(pull) and self._pulls.get(key) is pull:
            del self._pulls[key]
        return self._root / key

    async def push(self, directory: Path) -> None:
        """Share what has been compiled in a directory that `pull` has returned."""
        loop = asyncio.get_running_loop()
        await loop.run_in_executor(self._threads, self._work, self._push, directory.name)

    def _work(self, work: Callable[[str], str | None], key: str) -> bool:
        """Whether it succeeded."""
        try:
            outcome = work(key)
        except Exception as error:
            logger.warning(
                "COMPILE_CACHE: %s; engines of this architecture (%s) compile for themselves", error, key
            )
            outcome = FAILED
        if outcome is not None:
            logger.info("compiled artefacts %s", outcome, extra={"key": key})
            self._report(outcome)
        return outcome != FAILED

    def _pull(self, key: str) -> str:
        found = self._merge(key)
        if found is None:
            return "missing"
        self._shared[key] = found
        return "pulled"

    def _push(self, key: str) -> str | None:
        directory = self._root / key
        if not directory.is_dir() or _contents(directory) == self._shared.get(key, frozenset()):
            return None
        self._merge(key)  # what another machine has pushed meanwhile
        contents = _contents(directory)
        with self._room() as room:
            packed = room / "packed.tar"
            with tarfile.open(packed, "w") as tar:
                for name, _ in sorted(contents):
                    tar.add(directory / name, name, recursive=False)
            self._cache.put(_file(key), packed)
        self._shared[key] = contents
        return "pushed"

    def _merge(self, key: str) -> _Contents | None:
        """Add the files that the cache has and the directory has not; returns the former, None if none."""
        with self._room() as room:
            if not self._cache.get(_file(key), room / "packed.tar"):
                return None
            unpacked = room / "unpacked"
            with tarfile.open(room / "packed.tar") as tar:
                tar.extractall(unpacked, filter="data")
            contents = _contents(unpacked)
            for name, _ in contents:
                target = self._root / key / name
                if not target.exists():
                    target.parent.mkdir(parents=True, exist_ok=True)
                    (unpacked / name).replace(target)
            return contents

    @contextmanager
    def _room(self) -> Iterator[Path]:
        """A temporary directory on the same file system."""
        self._root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".incoming-", dir=self._root) as room:
            yield Path(room)


def _file(key: str) -> str:
    return f"{key}.tar"


def _contents(directory: Path) -> _Contents:
    """Every file below, without those that are being written (and links, which no archive may bring)."""
    found = set()
    for parent, _, names in os.walk(directory):
        for name in names:
            path = Path(parent, name)
            if path.is_file() and not path.is_symlink() and ".tmp" not in name and not name.endswith(".lock"):
                found.add((str(path.relative_to(directory)), path.stat().st_size))
    return frozenset(found)
