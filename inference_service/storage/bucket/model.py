"""Models in the bucket: derived from a listing, and described by their documents.

A model is a directory below the prefix with `config.json` or safetensors (a checkpoint), or with
`adapter_config.json` (an adapter). Its name is its path below the prefix, with hyphens for slashes. Pure:
reads no files.
"""

import hashlib
import itertools
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime
from enum import StrEnum

from inference_service.checkpoints.adapter_config import adapter_config
from inference_service.checkpoints.serving_config import BadServing, Serving, parse_serving
from inference_service.storage.bucket.documents import WEIGHTS, BadDocument, oversized, parse_object
from inference_service.storage.bucket.store import StoredObject

SERVING = "serving.json"
ADAPTER_CONFIG = "adapter_config.json"
INDEX = ".safetensors.index.json"
CONFIG = "config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
NO_BASE = "neither its adapter_config.json (base_model_name_or_path) nor its serving.json names its base."
MAX_NAME_CHARACTERS = 200
MAX_SEGMENT_BYTES = 255
MAX_SHARDS = 10_000
_SHOWN_CHARACTERS = 100
_NAME = re.compile(rf"[A-Za-z0-9][A-Za-z0-9._-]{{0,{MAX_NAME_CHARACTERS - 1}}}")
_SHARD = re.compile(r"(?P<stem>.+)-(?P<number>\d{5,6})-of-(?P<count>\d{5,6})\.safetensors")
_TOKENIZERS = frozenset({"tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "tekken.json"})
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
# Files needed for serving. Pickles and Python files are never fetched: loading either would run code.
_SERVED_SUFFIXES = (".safetensors", ".json", ".jinja", ".txt", ".model", ".tiktoken", ".vocab")
_NOT_SERVED = (SERVING, "trainer_state.json", "training_args.json")


class ModelKind(StrEnum):
    CHECKPOINT = "checkpoint"
    ADAPTER = "adapter"


@dataclass(frozen=True)
class ListedModel:
    """One revision of a model in a listing of the bucket.

    `objects` are the files needed for serving, `documents` those that describe the model further;
    `unservable` is the reason why the model cannot be served, if any.
    """

    name: str
    kind: ModelKind
    directory: str
    revision: str
    objects: tuple[StoredObject, ...]
    created: datetime
    unservable: str | None = None
    documents: tuple[StoredObject, ...] = ()

    @property
    def bytes(self) -> int:
        return sum(stored.size for stored in self.objects)


@dataclass(frozen=True)
class DescribedModel(ListedModel):
    """A listed model with the content of its documents.

    `base_name` is the base as the adapter names it, `rank` the adapter's rank (0 for a checkpoint).
    `problem` is the part of `unservable` that comes from the documents.
    """

    serving: Serving = field(default_factory=Serving)
    base_name: str | None = None
    rank: int = 0
    problem: str | None = None


def canonical_name(name: str) -> str:
    """`org/model` -> `org-model`."""
    return name.strip("/").replace("/", "-")


def models_in(objects: list[StoredObject], prefix: str) -> dict[str, ListedModel]:
    """The models in a listing of `prefix`, by name."""
    directories: dict[str, list[StoredObject]] = {}
    astray: dict[str, str] = {}
    for stored in objects:
        segments = stored.name.removeprefix(prefix).split("/")
        safe = list(itertools.takewhile(_is_safe, segments))
        if len(safe) < len(segments):
            astray["/".join(safe)] = stored.name
        else:
            directories.setdefault("/".join(segments[:-1]), []).append(stored)
    models: dict[str, ListedModel] = {}
    for directory, files in sorted(directories.items()):
        model = _model(directory, files, astray.get(directory))
        if model is not None:
            models[model.name] = _only(models.get(model.name), model)
    return dict(sorted(models.items()))


def _is_safe(segment: str) -> bool:
    """Whether a segment of an object name is a plain file or directory name."""
    plain = segment not in ("", ".", "..") and "\\" not in segment and segment.isprintable()
    return plain and len(segment.encode()) <= MAX_SEGMENT_BYTES


def _only(other: ListedModel | None, model: ListedModel) -> ListedModel:
    """If two directories map to one name, neither is served: the name is ambiguous."""
    if other is None:
        return model
    clash = f"the directories {other.directory} and {model.directory} map to the same name. Rename one."
    return replace(model, unservable=clash)


def _model(directory: str, files: list[StoredObject], astray: str | None) -> ListedModel | None:
    names = {stored.filename: stored for stored in files}
    kind = _kind(set(names))
    if kind is None or not directory:
        return None
    served = tuple(sorted((names[name] for name in names if _is_served(name)), key=_by_name))
    documents = tuple(names[name] for name in sorted(names) if _is_document(name))
    too_large = next(filter(None, map(oversized, (*served, *documents))), None)
    listed = ListedModel(
        name=canonical_name(directory),
        kind=kind,
        directory=directory,
        revision=_fingerprint(files),
        objects=served,
        created=max(stored.created for stored in files),
        unservable=_why_misnamed(directory, astray) or too_large or _why_unservable(kind, set(names)),
        documents=() if too_large else documents,
    )
    return listed if listed.documents else _described(listed)


def _kind(names: set[str]) -> ModelKind | None:
    """The kind of model in a directory with these files; None if it is not a model.

    A directory with its own weights is a checkpoint even if training an adapter left its configuration there.
    """
    weights = {name for name in names if name.endswith(WEIGHTS)}
    if ADAPTER_CONFIG in names and not weights - {ADAPTER_WEIGHTS}:
        return ModelKind.ADAPTER
    if weights == {ADAPTER_WEIGHTS}:
        return ModelKind.ADAPTER
    return ModelKind.CHECKPOINT if CONFIG in names or weights else None


def _why_misnamed(directory: str, astray: str | None) -> str | None:
    if astray is not None:
        return (
            f"the object name {astray!r} would leave its directory or is not a valid file name. "
            "Delete that object."
        )
    if not _NAME.fullmatch(canonical_name(directory)):
        return (
            "its name may contain only letters, digits, '.', '_' and '-', must begin with a letter or digit, "
            f"and may have at most {MAX_NAME_CHARACTERS} characters. Rename its directory."
        )
    return None


def _by_name(stored: StoredObject) -> str:
    return stored.name


def _is_document(name: str) -> bool:
    return name in (SERVING, ADAPTER_CONFIG) or name.endswith(INDEX)


def _is_served(name: str) -> bool:
    # Names with a leading dot may collide with the snapshot's own files.
    return name.endswith(_SERVED_SUFFIXES) and name not in _NOT_SERVED and not name.startswith(".")


def _why_unservable(kind: ModelKind, names: set[str]) -> str | None:
    if kind is ModelKind.ADAPTER:
        absent = [name for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS) if name not in names]
        return f"the upload is incomplete: {absent[0]} is missing." if absent else None
    weights = sorted(name for name in names if name.endswith(WEIGHTS) and _is_served(name))
    if weights:
        missing = _missing_config(names) or _missing_shard(weights) or _missing_tokenizer(names)
        return f"the upload is incomplete: {missing} is missing." if missing else None
    pickles = sorted(name for name in names if name.endswith(_PICKLES))
    if pickles:
        return (
            f"its weights are pickles ({pickles[0]}), which can run code when loaded. "
            "Save the model with safe_serialization=True and upload the safetensors files."
        )
    return "it has no *.safetensors file. The upload may be incomplete."


def _missing_config(names: set[str]) -> str | None:
    return None if CONFIG in names else CONFIG


def _missing_shard(weights: list[str]) -> str | None:
    """The first missing shard, as implied by the other names (`model-00001-of-00004.safetensors`)."""
    held = set(weights)
    found = [shard for shard in map(_SHARD.fullmatch, weights) if shard is not None]
    series = {(shard["stem"], shard["count"], len(shard["number"])) for shard in found}
    for stem, count, digits in sorted(series):
        if int(count) > MAX_SHARDS:
            return f"{stem}-{'x' * digits}-of-{count}.safetensors (more than {MAX_SHARDS} shards)"
        for number in range(1, int(count) + 1):
            name = f"{stem}-{number:0{digits}}-of-{count}.safetensors"
            if name not in held:
                return name
    return None


def _missing_tokenizer(names: set[str]) -> str | None:
    return None if names & _TOKENIZERS else "tokenizer.json"


def _fingerprint(files: list[StoredObject]) -> str:
    """Twelve hex digits of a hash over the name, generation and checksum of every file."""
    digest = hashlib.sha256()
    for stored in sorted(files, key=_by_name):
        digest.update(f"{stored.name}\0{stored.generation}\0{stored.crc32c}\n".encode())
    return digest.hexdigest()[:12]


def describe(model: ListedModel, contents: Mapping[str, bytes]) -> DescribedModel:
    """The model with its documents applied (contents by file name), or why it cannot be served."""
    try:
        serving = parse_serving(contents[SERVING]) if SERVING in contents else Serving()
        base_name, rank, problem = serving.base, 0, None
        if ADAPTER_CONFIG in contents and model.kind is ModelKind.ADAPTER:
            adapter = adapter_config(parse_object(ADAPTER_CONFIG, contents[ADAPTER_CONFIG]))
            base_name = base_name or (_shown(adapter.base) if adapter.base else None)
            rank, problem = adapter.rank, adapter.problem or (None if base_name else NO_BASE)
        missing = [_unlisted_shard(model, name, contents[name]) for name in contents if name.endswith(INDEX)]
        problem = problem or next(filter(None, missing), None)
    except (BadServing, BadDocument) as error:
        return _described(model, problem=str(error))
    return _described(model, serving, base_name, rank, problem)


def described_as(model: ListedModel, known: ListedModel | None) -> ListedModel:
    """The model with the description of `known`, if both are of the same revision."""
    if isinstance(model, DescribedModel) or not isinstance(known, DescribedModel):
        return model
    if known.revision != model.revision:
        return model
    return _described(model, known.serving, known.base_name, known.rank, known.problem)


def _described(
    model: ListedModel,
    serving: Serving | None = None,
    base_name: str | None = None,
    rank: int = 0,
    problem: str | None = None,
) -> DescribedModel:
    return DescribedModel(
        model.name,
        model.kind,
        model.directory,
        model.revision,
        model.objects,
        model.created,
        model.unservable or problem,
        model.documents,
        serving or Serving(),
        base_name,
        rank,
        problem,
    )


def _unlisted_shard(model: ListedModel, name: str, content: bytes) -> str | None:
    """Reports the first shard in the index that is missing from the bucket."""
    index = parse_object(name, content).get("weight_map")
    if not isinstance(index, dict) or not all(isinstance(shard, str) for shard in index.values()):
        raise BadDocument(f"{name} has no valid weight_map")
    held = {stored.filename for stored in model.objects}
    missing = sorted(set(index.values()) - held)
    if not missing:
        return None
    return f"the upload is incomplete: {_shown(missing[0])}, listed in {name}, is missing."


def _shown(name: str) -> str:
    """A name read from a file, made safe for messages and terminals."""
    plain = name if name.isprintable() else ascii(name)
    return plain if len(plain) <= _SHOWN_CHARACTERS else f"{plain[:_SHOWN_CHARACTERS]}…"
