"""Weights on their way to the device: prepared in pieces, read ahead into a ring, or as mapped files."""

import random
import threading
from collections import Counter, deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from safetensors.torch import save_file  # noqa: E402

from inference_service.hosts.vllm.weights import read_ahead  # noqa: E402
from inference_service.hosts.vllm.weights.mapped import MappedWeights  # noqa: E402
from inference_service.hosts.vllm.weights.page_lock import PageLockRefused  # noqa: E402
from inference_service.hosts.vllm.weights.prepared import PreparedSnapshot  # noqa: E402
from inference_service.hosts.vllm.weights.read_ahead import ReadAhead, Ring  # noqa: E402
from inference_service.hosts.vllm.weights.source import Way, WeightSource  # noqa: E402

CPU = torch.device("cpu")
KIB = 1 << 10
PAGE = 4 * KIB
SIZES = [10, 3 * KIB, 40 * KIB, 2, 40 * KIB, 40 * KIB, 100 * KIB, 0, 6, 30 * KIB]


class Recorder:
    """A page lock that remembers; the call number `refuse_at` is refused, and each waits for `gate`."""

    def __init__(self, refuse_at: int | None = None) -> None:
        self.locked: dict[int, int] = {}
        self.calls: list[int] = []
        self.refuse_at = refuse_at
        self.gate = threading.Event()
        self.gate.set()
        self.called = threading.Semaphore(0)

    def lock(self, address: int, count: int) -> None:
        self.calls.append(count)
        self.called.release()
        assert self.gate.wait(20)
        if len(self.calls) == self.refuse_at:
            raise PageLockRefused("no more")
        assert address not in self.locked
        self.locked[address] = count

    def unlock(self, address: int) -> None:
        del self.locked[address]


@pytest.fixture
def tensors() -> dict[str, Any]:
    torch.manual_seed(1)
    return {f"t{number}": torch.randn(size // 2).half() for number, size in enumerate(SIZES)}


@pytest.fixture
def weights(tmp_path: Path, tensors: dict[str, Any]) -> MappedWeights:
    """The tensors in two files."""
    files = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    names = list(tensors)
    for file, own in zip(files, (names[:5], names[5:]), strict=True):
        save_file({name: tensors[name] for name in own}, file)
    return MappedWeights(tmp_path, files)


def prepared(weights: MappedWeights, lock: Recorder, piece: int = 64 * KIB) -> PreparedSnapshot:
    snapshot = PreparedSnapshot(weights, lock, piece)
    snapshot.start()
    return snapshot


def wait_until(true: Callable[[], bool]) -> None:
    for _ in range(2000):
        if true():
            return
        threading.Event().wait(0.01)
    raise AssertionError


def test_a_snapshot_is_locked_in_pieces_and_each_tensor_lies_in_one(
    weights: MappedWeights, tensors: dict[str, Any]
) -> None:
    lock = Recorder()
    snapshot = prepared(weights, lock)
    wait_until(lambda: snapshot.status.done)
    assert max(lock.calls) <= 64 * KIB + PAGE
    assert snapshot.status == (sum(SIZES), sum(SIZES), True, None)
    for name, tensor in tensors.items():
        if not tensor.numel():
            continue
        assert snapshot.is_ready(name)
        view = snapshot.view(name, CPU)
        if tensor.numel() * 2 > 64 * KIB:
            assert view is None, "it has several pieces, and this device cannot put it together"
            continue
        assert view is not None
        assert torch.equal(view, tensor)
        start, end = view.data_ptr(), view.data_ptr() + 2 * tensor.numel()
        assert any(at <= start and end <= at + count for at, count in lock.locked.items())
    snapshot.close()
    assert lock.locked == {}
    assert not snapshot.is_ready("t0")


def test_it_is_stopped_after_the_piece_that_is_being_locked(weights: MappedWeights) -> None:
    lock = Recorder()
    lock.gate.clear()
    snapshot = prepared(weights, lock)
    assert lock.called.acquire(timeout=20)
    stopping = threading.Thread(target=snapshot.stop)
    stopping.start()
    lock.gate.set()
    stopping.join(20)
    assert not stopping.is_alive()
    assert len(lock.calls) == len(lock.locked) < 5
    assert 0 < snapshot.status.ready_bytes < sum(SIZES)
    assert (snapshot.is_ready("t0"), snapshot.is_ready("t9")) == (True, False)
    snapshot.close()
    assert lock.locked == {}


def test_what_is_refused_is_read_as_usual(
    weights: MappedWeights, tensors: dict[str, Any], tmp_path: Path
) -> None:
    lock = Recorder(refuse_at=3)
    source = WeightSource(CPU, page_lock=lock, piece_bytes=64 * KIB)
    source.prepare(tmp_path, weights)
    wait_until(lambda: (status := source.status(tmp_path)) is not None and status.done)
    status = source.status(tmp_path)
    assert status is not None
    assert status.refused == "no more"
    assert (len(lock.locked), len(lock.calls)) == (2, 3), "it is not asked again"
    copied_from: Counter[Way] = Counter()
    found = dict(source.tensors(tmp_path, weights, list(tensors), copied_from))
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())
    assert copied_from == {Way.PREPARED: status.ready_bytes, Way.MAPPED: sum(SIZES) - status.ready_bytes}
    source.forget(tmp_path)
    assert source.status(tmp_path) is None
    wait_until(lambda: lock.locked == {})


def test_a_file_that_is_gone_is_no_error_until_it_is_read(weights: MappedWeights, tmp_path: Path) -> None:
    (tmp_path / "b.safetensors").unlink()
    source = WeightSource(CPU, page_lock=Recorder(), piece_bytes=64 * KIB)
    source.prepare(tmp_path, weights)
    wait_until(lambda: (status := source.status(tmp_path)) is not None and status.done)
    status = source.status(tmp_path)
    assert status is not None
    assert "b.safetensors" in str(status.refused)
    assert status.ready_bytes == sum(SIZES[:5])


def test_preparing_again_changes_nothing_and_after_a_refusal_tries_again(
    weights: MappedWeights, tmp_path: Path
) -> None:
    lock = Recorder(refuse_at=2)
    source = WeightSource(CPU, page_lock=lock, piece_bytes=64 * KIB)
    for attempt in range(4):
        source.prepare(tmp_path, weights)
        wait_until(lambda: (status := source.status(tmp_path)) is not None and status.done)
        if attempt == 1:
            pieces = len(lock.calls) - 2
    assert len(lock.calls) == 2 + pieces
    assert len(lock.locked) == pieces
    source.forget(tmp_path)


def test_a_ring_gives_no_place_twice() -> None:
    chance = random.Random(3)
    ring = Ring(torch.zeros(10_000, dtype=torch.uint8))
    held: deque[tuple[int, Any]] = deque()
    refused = 0
    for number in range(20_000):
        count = chance.choice([0, 1, 63, 64, 65, 700, 3000])
        array = ring.take(count)
        if array is None:
            refused += 1
            if held:
                held.popleft()
            continue
        assert len(array) == count
        array[:] = number % 251
        held.append((number % 251, array))
        del array
        if chance.random() < 0.3:
            held.rotate(chance.randrange(3))
            held.pop()
        if number % 50 == 0:
            assert all((array == value).all() for value, array in held)
    assert refused > 100
    held.clear()
    assert ring.take(10_000) is not None
    assert ring.take(10_001) is None


@pytest.mark.parametrize("ring_bytes", [1, 50 * KIB, 90 * KIB, 1 << 20])
@pytest.mark.parametrize("kept", [0, 1, 3, 100])
def test_tensors_are_read_ahead_whatever_the_reader_keeps(
    monkeypatch: pytest.MonkeyPatch,
    weights: MappedWeights,
    tensors: dict[str, Any],
    ring_bytes: int,
    kept: int,
) -> None:
    """Modules keep their tensors until they have all; none of them is overwritten meanwhile."""
    monkeypatch.setattr(read_ahead, "CHUNK_BYTES", 7 * KIB)
    ahead = ReadAhead(weights, Ring(torch.zeros(ring_bytes, dtype=torch.uint8)), threads=3)
    names = [*tensors, *reversed(tensors)]
    keeping: deque[tuple[str, Any]] = deque()
    seen = []
    for name, tensor in ahead.tensors(names):
        seen.append(name)
        keeping.append((name, tensor))
        del tensor
        assert all(torch.equal(each, tensors[name]) for name, each in keeping)
        while len(keeping) > kept:
            keeping.popleft()
    assert seen == names
    if ring_bytes == 1 << 20:
        assert ahead.read_bytes == 2 * sum(SIZES)
    assert not any(thread.name.startswith("read-weights") for thread in threading.enumerate())


def test_a_file_cut_short_meanwhile_is_an_error(weights: MappedWeights, tmp_path: Path) -> None:
    file = tmp_path / "b.safetensors"
    ahead = ReadAhead(weights, Ring(torch.zeros(1 << 20, dtype=torch.uint8)), threads=2)
    with file.open("r+b") as opened:
        opened.truncate(file.stat().st_size - 50 * KIB)
    with pytest.raises(EOFError, match=r"b\.safetensors"):
        list(ahead.tensors(list(weights.contents)))


def test_prepared_and_read_ahead_come_in_one_order(
    weights: MappedWeights, tensors: dict[str, Any], tmp_path: Path
) -> None:
    lock = Recorder(refuse_at=3)
    ring = Ring(torch.zeros(1 << 20, dtype=torch.uint8))
    source = WeightSource(CPU, page_lock=lock, ring=ring, piece_bytes=64 * KIB)
    source.prepare(tmp_path, weights)
    wait_until(lambda: (status := source.status(tmp_path)) is not None and status.done)
    names = random.Random(2).sample(list(tensors), len(tensors))
    copied_from: Counter[Way] = Counter()
    found = list(source.tensors(tmp_path, weights, names, copied_from))
    assert [name for name, _ in found] == names
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in found)
    assert copied_from[Way.PREPARED] > 0
    assert copied_from[Way.PREPARED] + copied_from[Way.READ_AHEAD] == sum(SIZES)
