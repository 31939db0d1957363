"""A failing store and a killed process: the exact revision or a clear error, never anything else.

Every fault is one of a proxy in front of a real GCS server, and must really have fired.
"""

import asyncio
import hashlib
import random
import signal
import threading
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, replace
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from inference_service.config import Backend, Settings
from inference_service.errors import ObjectReplaced, ServiceError
from inference_service.machine.device import Device, DeviceKind
from inference_service.storage.bucket.catalog import Catalog
from inference_service.storage.bucket.documents import Documents
from inference_service.storage.bucket.gcs import GcsStore
from inference_service.storage.bucket.model import models_in
from inference_service.storage.model import Checkpoint, Model
from inference_service.storage.preflight import Preflight
from inference_service.storage.registry import Registry
from inference_service.storage.snapshots.layout import MANIFEST, Layout
from inference_service.storage.snapshots.page_lock import PageLock
from inference_service.storage.snapshots.transfer import TransferConfig
from inference_service.storage.snapshots.verify import Verifier
from tests.fixtures.bucket import Bucket, new_bucket
from tests.fixtures.caches import QUICK, open_snapshots
from tests.fixtures.fault_proxy import PIECE_BYTES, Fault, FaultProxy, Kind, fault_proxy
from tests.fixtures.sync_process import READ_SECONDS, outcome, start_sync, sums_of

KIB = 1 << 10
RANDOM = random.Random(7)
CONTENTS = {
    "config.json": b"{}",
    "tokenizer.json": RANDOM.randbytes(40 * KIB),
    "model-00001-of-00002.safetensors": RANDOM.randbytes(900 * KIB),
    "model-00002-of-00002.safetensors": RANDOM.randbytes(500 * KIB + 7),
    "empty.json": b"",
}
SUMS = {name: hashlib.sha256(content).hexdigest() for name, content in CONTENTS.items()}
TOTAL = sum(map(len, CONTENTS.values()))
SHARD = "model-00001"
KILLS_PER_FAULT = 5
# More than all connections together can have on their way uncounted.
LAST_BYTES = 2 * QUICK.connections * PIECE_BYTES


@dataclass(frozen=True)
class Place:
    """A bucket with the model `m`, seen through the proxy."""

    bucket: Bucket
    proxy: FaultProxy

    def store(self) -> GcsStore:
        return GcsStore(self.bucket.name, read_seconds=READ_SECONDS)


@pytest.fixture
def place(gcs_url: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    with new_bucket(gcs_url, f"faults-{uuid.uuid4().hex}") as bucket, fault_proxy(gcs_url) as proxy:
        for name, content in CONTENTS.items():
            bucket.put(f"models/m/{name}", content)
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", proxy.url)
        yield Place(bucket, proxy)


# Faults that pass: with them, the sync gets the exact revision all the same.
PASSING = [
    Fault(Kind.RETURN_503, times=3),
    Fault(Kind.RETURN_429, times=3),
    Fault(Kind.RETURN_503_AFTER, after=256 * KIB, times=4, match=SHARD),
    Fault(Kind.BROKEN_STREAM, after=30 * KIB, times=3, match=SHARD),
    Fault(Kind.RESET, after=0, times=3),
    Fault(Kind.RESET, after=30 * KIB, times=3, match=SHARD),
    Fault(Kind.STALL, after=20 * KIB, times=2, seconds=2 * READ_SECONDS, match=SHARD),
    Fault(Kind.DRIP, after=20 * KIB, times=2, seconds=600, match=SHARD),
    Fault(Kind.CAP, after=500 * KIB, times=100),
    Fault(Kind.DRIP_HEAD, times=2, seconds=20, match=SHARD),
    Fault(Kind.CORRUPT, after=10 * KIB, match=SHARD),
    Fault(Kind.CORRUPT_AFTER_RESUME, after=10 * KIB, match=SHARD),
]
# Faults that stay: with them, the sync ends in an error that says what is wrong.
LASTING = [
    (Fault(Kind.RETURN_503, times=10_000), "StoreUnavailable", "503"),
    (Fault(Kind.RESET, times=10_000), "StoreUnavailable", "models/m/"),
    (Fault(Kind.CORRUPT, times=10_000, match=SHARD), "SnapshotCorrupt", SHARD),
    (Fault(Kind.WRONG_CRC, times=10_000, match=SHARD), "SnapshotCorrupt", "the store holds 00000000"),
    (Fault(Kind.FORBID_OBJECT, times=10_000, match=SHARD), "StoreForbidden", "storage.objects.get"),
    (Fault(Kind.STALL, times=10_000, seconds=0.6, match=SHARD), "StoreUnavailable", SHARD),
]


LASTING_KINDS = [Kind.FORBID_OBJECT, Kind.WRONG_CRC, Kind.REPLACE_GENERATION, Kind.IGNORE_RANGE]


def named(value: object) -> str | None:
    return f"{value.kind.value}@{value.after}" if isinstance(value, Fault) else None


def renewed(fault: Fault) -> Fault:
    return Fault(fault.kind, fault.after, fault.times, fault.match, fault.seconds, fault.act)


def snapshots(cache: Path) -> list[Path]:
    """Every directory that counts as a snapshot."""
    return [path.parent for path in cache.rglob(MANIFEST)]


def assert_only_exact(cache: Path) -> None:
    for snapshot in snapshots(cache):
        assert sums_of(snapshot) == SUMS


async def sync_m(place: Place, cache: Path, config: TransferConfig = QUICK) -> Path:
    store = place.store()
    model = models_in(store.list("models/"), "models/")["m"]
    return (await open_snapshots(store, cache, config=config).snapshot(model)).path


def sync_that_is_killed(place: Place, cache: Path, result: Path, count: int) -> None:
    """Fetch until `count` bytes have gone out, fewer than a fetch needs: the alarm is there first."""
    victims: list[ForkServerProcess] = []
    started = threading.Event()

    def kill() -> None:
        assert started.wait(20)
        victims[0].kill()

    place.proxy.alarm_after(count, kill)
    victims.append(start_sync(place.proxy.url, place.bucket.name, cache, result))
    started.set()
    victims[0].join()
    assert victims[0].exitcode == -signal.SIGKILL


@pytest.mark.parametrize("fault", PASSING, ids=named)
async def test_a_fault_that_passes(place: Place, tmp_path: Path, fault: Fault) -> None:
    fault = renewed(fault)
    place.proxy.faults = [fault]
    async with asyncio.timeout(30):
        assert sums_of(await sync_m(place, tmp_path)) == SUMS
    assert fault.fired > 0


@pytest.mark.parametrize(("fault", "error", "words"), LASTING, ids=named)
async def test_a_fault_that_stays(place: Place, tmp_path: Path, fault: Fault, error: str, words: str) -> None:
    fault = renewed(fault)
    place.proxy.faults = [fault]
    with pytest.raises(ServiceError, match=words) as caught:
        await sync_m(place, tmp_path)
    assert type(caught.value).__name__ == error
    assert fault.fired > 0
    assert snapshots(tmp_path) == []
    place.proxy.clear()
    assert sums_of(await sync_m(place, tmp_path)) == SUMS, "and once it is over, nothing is in the way"


async def test_both_sums_of_a_corrupt_object_are_told(place: Place, tmp_path: Path) -> None:
    place.proxy.faults = [Fault(Kind.WRONG_CRC, times=100, match=SHARD)]
    with pytest.raises(ServiceError, match=r"crc32c [0-9a-f]{8} over 921600 bytes, the store holds 00000000"):
        await sync_m(place, tmp_path)


async def test_what_has_arrived_is_not_fetched_again(place: Place, tmp_path: Path) -> None:
    place.proxy.faults = [Fault(Kind.RETURN_503, times=10_000, match="model-00002")]
    with pytest.raises(ServiceError):
        # It is given up only after a while: the other files have arrived by then.
        await sync_m(place, tmp_path, replace(QUICK, first_delay=0.4, longest_delay=0.4))
    place.proxy.clear()
    assert sums_of(await sync_m(place, tmp_path)) == SUMS
    # A span that is handed over may come twice.
    assert place.proxy.media_bytes < TOTAL


async def test_a_leftover_that_was_damaged_on_the_disk_is_not_believed(place: Place, tmp_path: Path) -> None:
    place.proxy.faults = [Fault(Kind.RETURN_503, times=10_000, match="model-00002")]
    with pytest.raises(ServiceError):
        await sync_m(place, tmp_path)
    (leftover,) = (tmp_path / "m").glob(".incomplete-*")
    shard = leftover / "model-00001-of-00002.safetensors"
    shard.write_bytes(bytes(len(CONTENTS[shard.name])))
    place.proxy.clear()
    assert sums_of(await sync_m(place, tmp_path)) == SUMS


@pytest.mark.parametrize("journal", [b"", b"not json\n[1, 2]\n", b'["../../x", 0, 5, 1]\n["a", -4, 9, 0]\n'])
async def test_a_journal_of_nonsense_is_no_harm(place: Place, tmp_path: Path, journal: bytes) -> None:
    store = place.store()
    model = models_in(store.list("models/"), "models/")["m"]
    leftover = tmp_path / "m" / f".incomplete-{model.revision}-xxxxxx"
    leftover.mkdir(parents=True)
    (leftover / ".journal").write_bytes(journal)
    assert sums_of(await sync_m(place, tmp_path)) == SUMS


@pytest.mark.parametrize("fault", [None, *PASSING], ids=named)
def test_kill_9_at_random_points_and_then_a_restart(
    place: Place, tmp_path: Path, fault: Fault | None
) -> None:
    """With each fault five kills: altogether more than fifty."""
    chance = random.Random(str(fault))
    fired = 0
    for number in range(KILLS_PER_FAULT):
        cache, result = tmp_path / f"cache-{number}", tmp_path / f"result-{number}"
        cache.mkdir()
        place.proxy.clear()
        place.proxy.faults = [] if fault is None else [renewed(fault)]
        sync_that_is_killed(place, cache, result, chance.randrange(TOTAL - LAST_BYTES))
        assert_only_exact(cache)
        again = start_sync(place.proxy.url, place.bucket.name, cache, result)
        again.join()
        assert outcome(result) == SUMS
        assert_only_exact(cache)
        fired += sum(each.fired for each in place.proxy.faults)
    assert fault is None or fired > 0


@pytest.mark.parametrize(
    "kind", [Kind.FORBID_OBJECT, Kind.WRONG_CRC, Kind.REPLACE_GENERATION, Kind.IGNORE_RANGE]
)
def test_kill_9_and_then_a_restart_into_a_fault_that_stays(place: Place, tmp_path: Path, kind: Kind) -> None:
    """An error while the fault is there, the exact revision once it is gone."""
    chance = random.Random(kind)
    for number in range(KILLS_PER_FAULT):
        cache, result = tmp_path / f"cache-{number}", tmp_path / f"result-{number}"
        cache.mkdir()
        place.proxy.clear()
        sync_that_is_killed(place, cache, result, chance.randrange(TOTAL // 2))
        fault = Fault(kind, times=10_000, match="model-00002", act=lambda: put_again(place, "model-00002"))
        place.proxy.faults = [fault]
        again = start_sync(place.proxy.url, place.bucket.name, cache, result)
        again.join()
        assert fault.fired > 0
        assert "error" in outcome(result), outcome(result)
        assert snapshots(cache) == []
        place.proxy.clear()
        last = start_sync(place.proxy.url, place.bucket.name, cache, result)
        last.join()
        assert outcome(result) == SUMS
        assert_only_exact(cache)


def put_again(place: Place, match: str) -> None:
    """The same content at another generation."""
    for name, content in CONTENTS.items():
        if match in name:
            place.bucket.put(f"models/m/{name}", content)


def test_two_processes_on_one_directory_and_one_is_killed(place: Place, tmp_path: Path) -> None:
    results = [tmp_path / "one", tmp_path / "two"]
    cache = tmp_path / "cache"
    cache.mkdir()
    one = start_sync(place.proxy.url, place.bucket.name, cache, results[0])
    place.proxy.alarm_after(TOTAL // 2, one.kill)
    two = start_sync(place.proxy.url, place.bucket.name, cache, results[1])
    one.join()
    two.join()
    assert outcome(results[1]) == SUMS
    assert_only_exact(cache)
    assert sorted(path.name for path in (cache / "m").iterdir()) == [
        path.name for path in snapshots(cache)
    ], "nothing else is left"


def test_two_processes_fetch_a_revision_once(place: Place, tmp_path: Path) -> None:
    results = [tmp_path / "one", tmp_path / "two"]
    cache = tmp_path / "cache"
    cache.mkdir()
    processes = [start_sync(place.proxy.url, place.bucket.name, cache, result) for result in results]
    for process in processes:
        process.join()
    assert [outcome(result) for result in results] == [SUMS, SUMS]
    assert TOTAL <= place.proxy.media_bytes < 2 * TOTAL, "a span that is handed over may come twice"


def test_without_working_locks_the_result_is_as_right(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fcntl.flock", lambda descriptor, operation: None)
    # Four at once are slow: no connection of theirs is to be taken for one that stalls.
    store = GcsStore(place.bucket.name, read_seconds=30)
    config = replace(QUICK, stall_seconds=30)
    model = models_in(store.list("models/"), "models/")["m"]
    syncs = [open_snapshots(store, tmp_path, config=config) for _ in range(4)]
    errors: list[BaseException] = []

    def ensure(number: int) -> None:
        try:
            syncs[number].ensure(model)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=ensure, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert_only_exact(tmp_path)
    assert len(snapshots(tmp_path)) == 1


async def test_an_object_that_is_replaced_between_listing_and_fetch(place: Place, tmp_path: Path) -> None:
    changed = {**CONTENTS, "model-00001-of-00002.safetensors": RANDOM.randbytes(900 * KIB)}

    def replace() -> None:
        for name, content in changed.items():
            place.bucket.put(f"models/m/{name}", content)

    fault = Fault(Kind.REPLACE_GENERATION, act=replace, match="model-00002")
    place.proxy.faults = [fault]
    store = place.store()
    catalog = Catalog(store, "models/")
    registry = registry_of(catalog, store, tmp_path)
    model = await servable(registry, "m")
    with pytest.raises(ObjectReplaced):
        await registry.fetch(model)
    assert fault.fired == 1
    snapshot = await registry.fetch(await servable(registry, "m"))
    assert snapshot.revision != model.revision
    assert sums_of(snapshot.path) == {
        name: hashlib.sha256(content).hexdigest() for name, content in changed.items()
    }, "the new revision, and nothing of the old"
    registry.release(snapshot)


async def test_a_client_that_names_the_revision_gets_no_other(place: Place, tmp_path: Path) -> None:
    fault = Fault(
        Kind.REPLACE_GENERATION,
        act=lambda: place.bucket.put(f"models/m/{SHARD}-of-00002.safetensors", b"new"),
        match="model-00001",
    )
    place.proxy.faults = [fault]
    store = place.store()
    catalog = Catalog(store, "models/")
    registry = registry_of(catalog, store, tmp_path)
    revision = (await catalog.find("m")).revision
    model = await servable(registry, f"m@{revision}")
    with pytest.raises(ServiceError, match="was replaced or deleted"):
        await registry.fetch(model)
    assert fault.fired == 1
    assert snapshots(tmp_path) == []


faults = st.builds(
    Fault,
    kind=st.sampled_from([kind for kind in Kind if kind is not Kind.REPLACE_GENERATION]),
    after=st.sampled_from([0, 1, 10 * KIB, 256 * KIB, 700 * KIB]),
    times=st.sampled_from([1, 2, 5, 50]),
    match=st.sampled_from(["", SHARD, "model-00002", "tokenizer", "config"]),
    seconds=st.just(0.05),
)


def schedules(count: int) -> settings:
    return settings(
        max_examples=count,
        deadline=None,
        derandomize=True,
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    )


@schedules(25)
@given(plan=st.lists(faults, max_size=4))
async def test_any_schedule_of_faults(
    place: Place, tmp_path_factory: pytest.TempPathFactory, plan: list[Fault]
) -> None:
    await survives(place, tmp_path_factory, plan)


@pytest.mark.slow
@schedules(400)
@given(plan=st.lists(faults, max_size=4))
async def test_many_schedules_of_faults(
    place: Place, tmp_path_factory: pytest.TempPathFactory, plan: list[Fault]
) -> None:
    await survives(place, tmp_path_factory, plan)


async def survives(place: Place, tmp_path_factory: pytest.TempPathFactory, plan: list[Fault]) -> None:
    """Every fetch ends with the exact snapshot or with none, and the next one is not held up."""
    cache = tmp_path_factory.mktemp("cache")
    place.proxy.clear()
    place.proxy.faults = [renewed(fault) for fault in plan]
    try:
        assert sums_of(await sync_m(place, cache)) == SUMS
    except ServiceError:
        assert snapshots(cache) == []
    place.proxy.clear()
    assert sums_of(await sync_m(place, cache)) == SUMS, "what a failure leaves is in nobody's way"


async def servable(registry: Registry, name: str) -> Model:
    """The model of that name, not examined: the faults are for what comes after."""
    model = (await registry.find(name)).model
    assert isinstance(model, Checkpoint)
    return model


def registry_of(catalog: Catalog, store: GcsStore, cache: Path) -> Registry:
    device = Device(DeviceKind.CPU, "test")
    snapshots = open_snapshots(store, cache)
    preflight = Preflight(Documents(store), Settings(), device, Backend.FAKE, lambda model, count: None)
    return Registry(catalog, preflight, snapshots, Layout(cache), Verifier(PageLock(0)))
