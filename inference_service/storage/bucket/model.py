"""A model as the bucket shows it: from a listing to models, and what their documents add.

A model is a directory below the prefix that holds `config.json` or safetensors (a checkpoint), or
`adapter_config.json` (an adapter). Its name is its path below the prefix with hyphens for slashes. Pure:
reads nothing.
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
# What serving needs. Pickles and Python files are never fetched: loading either would run them.
_SERVED_SUFFIXES = (".safetensors", ".json", ".jinja", ".txt", ".model", ".tiktoken", ".vocab")
_NOT_SERVED = (SERVING, "trainer_state.json", "training_args.json")


class ModelKind(StrEnum):
    CHECKPOINT = "checkpoint"
    ADAPTER = "adapter"


@dataclass(frozen=True)
class ListedModel:
    """One revision of a model, as a listing of the bucket shows it.

    `objects` are the files that serving needs, `documents` those that describe the model further;
    `unservable` is the reason why it cannot be served, if it cannot.
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
    """A listed model and what its documents say.

    `base_name` is an adapter's base as the adapter names it, `rank` an adapter's own (0 for a checkpoint).
    `problem` is the part of `unservable` that its documents are the reason of.
    """

    serving: Serving = field(default_factory=Serving)
    base_name: str | None = None
    rank: int = 0
    problem: str | None = None


def canonical_name(name: str) -> str:
    """`org/model` -> `org-model`."""
    return name.strip("/").replace("/", "-")


def models_in(objects: list[StoredObject], prefix: str) -> dict[str, ListedModel]:
    """The models that a listing of `prefix` shows, by name."""
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
    """Whether a part of an object's name is a plain name of a file or directory."""
    plain = segment not in ("", ".", "..") and "\\" not in segment and segment.isprintable()
    return plain and len(segment.encode()) <= MAX_SEGMENT_BYTES


def _only(other: ListedModel | None, model: ListedModel) -> ListedModel:
    """Two directories of one name are neither of them served: nobody can say which is meant."""
    if other is None:
        return model
    clash = f"the directories {other.directory} and {model.directory} have the same name; rename one."
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
    """What a directory with these files is; None where it is no model.

    Weights of its own make a checkpoint also of a directory that an adapter's training has left its
    configuration in.
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
            f"the object name {astray!r} would leave its directory or is no file's name; delete that object."
        )
    if not _NAME.fullmatch(canonical_name(directory)):
        return (
            "its name may hold letters, digits, '.', '_' and '-' only, begin with a letter or digit, and "
            f"be at most {MAX_NAME_CHARACTERS} characters long; rename its directory."
        )
    return None


def _by_name(stored: StoredObject) -> str:
    return stored.name


def _is_document(name: str) -> bool:
    return name in (SERVING, ADAPTER_CONFIG) or name.endswith(INDEX)


def _is_served(name: str) -> bool:
    # A name that begins with a dot may be one of the snapshot's own.
    return name.endswith(_SERVED_SUFFIXES) and name not in _NOT_SERVED and not name.startswith(".")


def _why_unservable(kind: ModelKind, names: set[str]) -> str | None:
    if kind is ModelKind.ADAPTER:
        absent = [name for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS) if name not in names]
        return f"the upload is not complete: {absent[0]} is missing." if absent else None
    weights = sorted(name for name in names if name.endswith(WEIGHTS) and _is_served(name))
    if weights:
        missing = _missing_config(names) or _missing_shard(weights) or _missing_tokenizer(names)
        return f"the upload is not complete: {missing} is missing." if missing else None
    pickles = sorted(name for name in names if name.endswith(_PICKLES))
    if pickles:
        return (
            f"its weights are pickles ({pickles[0]}), which run code when they are loaded. "
            "Save it with safe_serialization=True and upload the safetensors files."
        )
    return "it has no *.safetensors file; the upload may not be complete."


def _missing_config(names: set[str]) -> str | None:
    return None if CONFIG in names else CONFIG


def _missing_shard(weights: list[str]) -> str | None:
    """The first shard that the names of the others promise (`model-00001-of-00004.safetensors`)."""
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
    """Twelve hex digits over every file's name, generation and checksum."""
    digest = hashlib.sha256()
    for stored in sorted(files, key=_by_name):
        digest.update(f"{stored.name}\0{stored.generation}\0{stored.crc32c}\n".encode())
    return digest.hexdigest()[:12]


def describe(model: ListedModel, contents: Mapping[str, bytes]) -> DescribedModel:
    """The model with what its documents (content by file name) say, or the reason why it cannot be served."""
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
    """The model with what is known of it, if that is of the same revision."""
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
    """The first shard that the index names and the bucket does not hold."""
    index = parse_object(name, content).get("weight_map")
    if not isinstance(index, dict) or not all(isinstance(shard, str) for shard in index.values()):
        raise BadDocument(f"{name} has no weight_map of file names")
    held = {stored.filename for stored in model.objects}
    missing = sorted(set(index.values()) - held)
    if not missing:
        return None
    return f"the upload is not complete: {_shown(missing[0])} is missing, which {name} names."


def _shown(name: str) -> str:
    """A name that came out of a file, fit for a message and a terminal."""
    plain = name if name.isprintable() else ascii(name)
    return plain if len(plain) <= _SHOWN_CHARACTERS else f"{plain[:_SHOWN_CHARACTERS]}…"
