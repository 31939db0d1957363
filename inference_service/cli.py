"""`inference-service models` and `inference-service pull MODEL`: the bucket from a terminal.

The same settings, catalog and snapshots as the service's; no engine, no server.
"""

import asyncio
import json
import sys
import threading
from datetime import UTC
from typing import TextIO

from tqdm import tqdm

from inference_service.backends.base import BackendMissing, choose_backend
from inference_service.config import Backend, EngineChoice, Settings
from inference_service.errors import readable_bytes
from inference_service.machine.device import Device, DeviceKind, find_device
from inference_service.storage.bucket.catalog import Catalog
from inference_service.storage.bucket.documents import Documents
from inference_service.storage.bucket.model import DescribedModel, ListedModel
from inference_service.storage.bucket.store import Store
from inference_service.storage.model import Model
from inference_service.storage.preflight import Preflight
from inference_service.storage.registry import Registry, open_store
from inference_service.storage.snapshots.cache import Disk, open_cache
from inference_service.storage.snapshots.layout import Layout
from inference_service.storage.snapshots.page_lock import PageLock
from inference_service.storage.snapshots.snapshots import SnapshotStore
from inference_service.storage.snapshots.verify import Verifier

BAR_SECONDS = 0.1
LINE_SECONDS = 5.0


def list_models(settings: Settings, output: TextIO, *, as_json: bool) -> None:
    """Print the catalog; raises ServiceError."""
    catalog = Catalog(open_store(settings.gcs_bucket), settings.gcs_model_prefix)
    models = asyncio.run(catalog.described())
    if as_json:
        output.writelines(f"{json.dumps(_entry(model))}\n" for model in models)
        return
    if not models:
        output.write(f"No models below {settings.gcs_model_prefix or '/'} in {settings.gcs_bucket}.\n")
        return
    rows = [("NAME", "KIND", "SIZE", "REVISION", "CREATED", "BASE", "STATUS"), *map(_row, models)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        line = "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        output.write(f"{line.rstrip()}\n")


def pull(settings: Settings, name: str, output: TextIO) -> None:
    """Fetch a model into LOCAL_MODEL_CACHE and print where it lies; raises ServiceError."""
    store = open_store(settings.gcs_bucket)
    layout, disk = open_cache(settings.local_model_cache, settings.disk_cache_gib)
    snapshots = SnapshotStore(store, layout, disk)
    model = asyncio.run(_servable(_registry(settings, store, layout, disk, snapshots), name))
    _fetch(snapshots, model.described)
    output.write(f"{layout.snapshot(model.name, model.revision)}\n")
    base = model.engine_model
    if base is not model and not layout.snapshot(base.name, base.revision).exists():
        sys.stderr.write(f"{model.name} is an adapter of {base.name}, which is not here: pull it too.\n")


async def _servable(registry: Registry, name: str) -> Model:
    """The model of that name, checked before anything is downloaded; raises ServiceError."""
    return await registry.examine((await registry.find(name)).model)


def _registry(
    settings: Settings, store: Store, layout: Layout, disk: Disk, snapshots: SnapshotStore
) -> Registry:
    """The bucket's models, checked for everything that does not depend on the serving device."""
    documents = Documents(store)
    catalog = Catalog(store, settings.gcs_model_prefix, documents=documents)
    anywhere = Device(DeviceKind.CPU, "any", memory_bytes=0)
    preflight = Preflight(documents, settings, anywhere, _backend(settings), disk.check_fits, snapshots.kept)
    return Registry(catalog, preflight, snapshots, layout, Verifier(PageLock(0)))


def _backend(settings: Settings) -> Backend:
    """The backend that serves on this machine; if none is installed, the one that would be chosen."""
    try:
        return choose_backend(settings.engine, find_device(), int8=settings.quantizes)
    except BackendMissing:
        return Backend.VLLM if settings.engine is EngineChoice.AUTO else Backend(settings.engine.value)


def _fetch(snapshots: SnapshotStore, model: ListedModel) -> None:
    ended = threading.Event()
    drawing = threading.Thread(target=_draw, args=(snapshots, model, ended), daemon=True)
    drawing.start()
    try:
        snapshots.ensure(model)
    finally:
        ended.set()
        drawing.join()


def _draw(snapshots: SnapshotStore, model: ListedModel, ended: threading.Event) -> None:
    """Progress on stderr during the fetch: a bar on a terminal, else a line now and then."""
    if sys.stderr.isatty():
        _draw_bar(snapshots, model, ended)
        return
    while not ended.wait(LINE_SECONDS):
        for progress in snapshots.progress():
            rate = readable_bytes(progress.bytes_per_second)
            sys.stderr.write(
                f"{model.name}: {progress.percent} % of {readable_bytes(model.bytes)}, {rate}/s\n"
            )


def _draw_bar(snapshots: SnapshotStore, model: ListedModel, ended: threading.Event) -> None:
    with tqdm(
        desc=model.name, total=model.bytes, unit="B", unit_scale=True, unit_divisor=1024, file=sys.stderr
    ) as bar:
        latest = None
        while not ended.wait(BAR_SECONDS):
            latest = next(iter(snapshots.progress()), latest)
            if latest is not None:
                bar.update(latest.done - bar.n)
        if latest is not None:
            bar.update(latest.done - bar.n)


def _entry(model: ListedModel) -> dict[str, object]:
    return {
        "name": model.name,
        "kind": model.kind,
        "size": model.bytes,
        "revision": model.revision,
        "created": model.created.astimezone(UTC).isoformat(timespec="seconds"),
        "base": _base_name(model),
        "aliases": model.serving.aliases if isinstance(model, DescribedModel) else (),
        "unservable": model.unservable,
    }


def _row(model: ListedModel) -> tuple[str, ...]:
    created = model.created.astimezone(UTC).strftime("%Y-%m-%d %H:%M")
    status = "ok" if model.unservable is None else f"cannot be served: {model.unservable}"
    size = readable_bytes(model.bytes)
    return (model.name, model.kind, size, model.revision, created, _base_name(model) or "-", status)


def _base_name(model: ListedModel) -> str | None:
    """An adapter's base, as the adapter names it."""
    return model.base_name if isinstance(model, DescribedModel) else None
