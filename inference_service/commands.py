"""`inference-service models` and `inference-service pull MODEL`: the bucket from a terminal.

The same settings, catalog and sync as the service's; no engine, no server.
"""

import asyncio
import json
import sys
import threading
from datetime import UTC
from typing import TextIO

from tqdm import tqdm

from inference_service.config import Settings
from inference_service.storage.catalog import Catalog
from inference_service.storage.disk import open_cache
from inference_service.storage.model import Model
from inference_service.storage.registry import open_store
from inference_service.storage.store import Store
from inference_service.storage.sync import Sync

BAR_SECONDS = 0.2
_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


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
    """Fetch a model into LOCAL_MODEL_CACHE and print where it lies; raises ServiceError and OSError."""
    store = open_store(settings.gcs_bucket)
    model = asyncio.run(Catalog(store, settings.gcs_model_prefix).resolve(name))
    path = _pull(settings, store, model)
    output.write(f"{path}\n")


def _pull(settings: Settings, store: Store, model: Model) -> str:
    layout, disk = open_cache(settings)
    sync = Sync(store, layout, disk)
    ended = threading.Event()
    bar = threading.Thread(target=_draw, args=(sync, model, ended), daemon=True)
    bar.start()
    try:
        sync.ensure(model)
    finally:
        ended.set()
        bar.join()
    return str(layout.snapshot(model.name, model.revision))


def _draw(sync: Sync, model: Model, ended: threading.Event) -> None:
    """A bar on stderr while the fetch is under way; nothing where that is no terminal."""
    with tqdm(
        desc=model.name,
        total=model.bytes,
        unit="B",
        unit_scale=True,
        unit_divisor=1024,
        file=sys.stderr,
        disable=None,
    ) as bar:
        while not ended.wait(BAR_SECONDS):
            for progress in sync.progress():
                bar.update(progress.done - bar.n)
        bar.update(model.bytes - bar.n)


def _entry(model: Model) -> dict[str, object]:
    return {
        "name": model.name,
        "kind": model.kind,
        "size": model.bytes,
        "revision": model.revision,
        "created": model.created.astimezone(UTC).isoformat(timespec="seconds"),
        "base": model.base,
        "aliases": model.serving.aliases,
        "unservable": model.unservable,
    }


def _row(model: Model) -> tuple[str, ...]:
    created = model.created.astimezone(UTC).strftime("%Y-%m-%d %H:%M")
    status = "ok" if model.unservable is None else f"cannot be served: {model.unservable}"
    size = _readable(model.bytes)
    return (model.name, model.kind, size, model.revision, created, model.base or "-", status)


def _readable(count: float) -> str:
    """`1536` -> `1.5 KiB`."""
    for unit in _UNITS[:-1]:
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} {_UNITS[-1]}"
