"""Names: which models the bucket holds, and which one a client means.

A client may write a name with slashes or hyphens: `org/model` and `org-model` are one model.
`model@revision` names one revision of it, an alias (serving.json) another name. model.py defines what
a model is; snapshots/ fetches it.
"""

import asyncio
import logging
import math
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor

from inference_service.checkpoints.reference import Reference
from inference_service.errors import ModelNotFound, ModelNotServable, ObjectReplaced, StoreError
from inference_service.storage.bucket.documents import Documents
from inference_service.storage.bucket.model import (
    NO_BASE,
    DescribedModel,
    ListedModel,
    ModelKind,
    canonical_name,
    describe,
    described_as,
    models_in,
)
from inference_service.storage.bucket.store import Store

logger = logging.getLogger(__name__)

LISTING_SECONDS = 30.0
# A name that the cached listing lacks may have just been uploaded. It is looked up in a listing that begins
# after the request arrived, as the bucket itself would answer, but unknown names cause no more listings than
# this.
MISS_LISTING_SECONDS = 1.0
# An older revision may serve instead of an unservable one; its clients must not wait for listings.
UNSERVABLE_LISTING_SECONDS = 2.0
READS_AT_ONCE = 4


class RevisionNotFound(ModelNotFound):
    """The bucket holds another revision of the model, `newest`."""

    def __init__(self, name: str, newest: DescribedModel, revision: str) -> None:
        super().__init__(name, f"The bucket holds revision {newest.revision} of it.")
        self.newest = newest
        self.revision = revision


class Catalog:
    """The listing of the prefix as models, reused for `ttl` seconds, refreshed once at a time.

    The models' own documents (aliases, an adapter's base, the shards of an index) are read after the listing,
    and at once for a requested model.
    """

    def __init__(
        self,
        store: Store,
        prefix: str,
        ttl: float = LISTING_SECONDS,
        documents: Documents | None = None,
    ) -> None:
        self._store = store
        self._prefix = prefix
        self._ttl = ttl
        self._documents = documents or Documents(store)
        self._models: dict[str, ListedModel] = {}
        self._aliases: dict[str, str] = {}
        self._conflicts: dict[str, tuple[str, ...]] = {}
        # By base; None: not computed for this listing yet.
        self._adapters: dict[str, list[DescribedModel]] | None = None
        self._folded: dict[str, str] = {}
        # When the newest listing began, when the last one ended, and when one was last invalidated.
        self._listed_at: float | None = None
        self._ended_at = self._forgotten_at = -math.inf
        self._refreshing: asyncio.Task[None] | None = None
        self._reading: asyncio.Task[None] | None = None
        # Separate pools: a hanging listing blocks no document, and no document a listing.
        self._lister = ThreadPoolExecutor(1, thread_name_prefix="list")
        self._readers = ThreadPoolExecutor(READS_AT_ONCE, thread_name_prefix="read")

    @property
    def listed(self) -> list[ListedModel]:
        """All models by name, from the last listing; does not read the store."""
        return list(self._models.values())

    @property
    def conflicts(self) -> dict[str, tuple[str, ...]]:
        """Aliases that name nothing, with the models that claim them."""
        return dict(self._conflicts)

    async def models(self) -> list[ListedModel]:
        """All models by name; raises StoreError."""
        if not self._is_fresh(self._ttl):
            await self._listing()
        return self.listed

    async def described(self) -> list[ListedModel]:
        """As `models`, described as far as their documents can be read."""
        await self.models()
        if self._reading is not None:
            await asyncio.shield(self._reading)
        return self.listed

    def forget(self) -> None:
        """Invalidate the listing: the next request lists again and waits for it."""
        self._forgotten_at = time.monotonic()

    async def find(self, name: str) -> DescribedModel:
        """The model that a client means by `name`, servable or not.

        Raises ModelNotFound, RevisionNotFound and StoreError.
        """
        exact = Reference.parse(canonical_name(name))
        asked = canonical_name(name) if exact is None else exact.model
        wanted = await self._look_for(lambda: self._known(asked))
        if wanted is not None and self._models[wanted].unservable is not None:
            if not self._is_fresh(min(UNSERVABLE_LISTING_SECONDS, self._ttl)):
                await self._listing()
            wanted = self._known(asked)
        elif not self._is_fresh(self._ttl):
            self._refresh()  # A known model never waits for the bucket: a stale listing is renewed behind it.
        if wanted is None:
            claimants = self._conflicts.get(asked)
            hint = f"It is an alias that {' and '.join(claimants)} claim." if claimants else None
            raise ModelNotFound(name, hint)
        model = await self._read(self._models[wanted])
        if exact is not None and model.revision != exact.revision:
            raise RevisionNotFound(name, model, exact.revision)
        return model

    async def look_again(self) -> None:
        """List again after this call, soon; raises StoreError if nothing has ever been listed."""
        called = time.monotonic()
        while not self._listed_since(called):
            await self._next_listing()

    async def base_of(self, adapter: DescribedModel) -> DescribedModel:
        """The checkpoint that an adapter is for, servable or not; raises ModelNotServable and StoreError."""
        if adapter.base_name is None:
            raise ModelNotServable(adapter.name, adapter.unservable or NO_BASE)
        base = adapter.base_name
        name = await self._look_for(lambda: self._base_name(base))
        if name is None and self._known(canonical_name(base)) is not None:
            raise ModelNotServable(
                adapter.name,
                f"its base '{base}' is an adapter itself. Name the checkpoint that both are for in "
                "its serving.json ('base').",
            )
        if name is None:
            raise ModelNotServable(
                adapter.name,
                f"its base '{base}' is not in the bucket. Upload it, or name the one that is meant "
                "in its serving.json ('base').",
            )
        return await self._read(self._models[name])

    async def adapters_of(self, base: DescribedModel) -> list[DescribedModel]:
        """The servable adapters for a checkpoint, as far as they can be read; raises StoreError."""
        if self._adapters is None:
            adapters = [each for each in self.listed if each.kind is ModelKind.ADAPTER]
            unread = [each for each in adapters if not isinstance(each, DescribedModel)]
            found = await asyncio.gather(*(self._read(each) for each in unread), return_exceptions=True)
            for error in found:
                if isinstance(error, BaseException) and not isinstance(error, StoreError):
                    raise error
            self._adapters = self._adapters_by_base()
        return self._adapters.get(base.name, [])

    def _adapters_by_base(self) -> dict[str, list[DescribedModel]]:
        found: dict[str, list[DescribedModel]] = {}
        for each in self.listed:
            if not isinstance(each, DescribedModel) or each.kind is not ModelKind.ADAPTER:
                continue
            if each.unservable is None and each.base_name:
                found.setdefault(self._base_name(each.base_name) or "", []).append(each)
        return found

    def parent(self, adapter: DescribedModel) -> str | None:
        """The name of an adapter's base in the bucket, or as the adapter names it if the bucket has none."""
        named = adapter.base_name
        return None if named is None else self._base_name(named) or named

    def _base_name(self, named: str) -> str | None:
        """The checkpoint that an adapter means: by the whole name, its last part, or either ignoring case."""
        names = [canonical_name(named), named.rstrip("/").rpartition("/")[2]]
        known = [each for name in names if (each := self._known(name)) is not None]
        folded = (self._folded.get(name.casefold()) for name in names)
        known += [name for name in folded if name is not None and name in self._models]
        checkpoints = (name for name in known if self._models[name].kind is ModelKind.CHECKPOINT)
        return next(checkpoints, None)

    def _known(self, name: str) -> str | None:
        return name if name in self._models else self._aliases.get(name)

    async def _look_for(self, known: Callable[[], str | None]) -> str | None:
        """The result of `known`; if it finds nothing, also in a listing that begins after this call."""
        called = time.monotonic()
        while True:
            if known() is None and self._reading is not None:
                await asyncio.shield(self._reading)  # it may be an alias that is being read
            name = known()
            if self._listed_since(called if name is None else -math.inf):
                return name
            await self._next_listing()

    async def _next_listing(self) -> None:
        """The listing in progress or due; else returns when one is due, or another caller has made it."""
        pause = self._ended_at + MISS_LISTING_SECONDS - time.monotonic()
        if pause > 0 and self._refreshing is None and self._listed_since(-math.inf):
            await asyncio.sleep(pause)
        else:
            await self._listing()

    def _is_fresh(self, seconds: float) -> bool:
        """Whether less time has passed since the last listing, failed ones included."""
        return self._listed_since(-math.inf) and time.monotonic() - self._ended_at < seconds

    def _listed_since(self, moment: float) -> bool:
        """Whether the listing began then or later, and was not invalidated."""
        return self._listed_at is not None and self._listed_at >= max(moment, self._forgotten_at)

    async def _listing(self) -> None:
        # Shielded: a client that disconnects must not cancel the listing that others wait for.
        await asyncio.shield(self._refresh())

    def _refresh(self) -> asyncio.Task[None]:
        """The listing in progress, or else a new one."""
        if self._refreshing is None:
            self._refreshing = asyncio.create_task(self._list_anew())
        return self._refreshing

    async def _list_anew(self) -> None:
        loop = asyncio.get_running_loop()
        began = time.monotonic()
        try:
            self._models = await loop.run_in_executor(self._lister, self._list)
            self._adapters = None
            self._folded = {name.casefold(): name for name in self._models}
            self._name_aliases()
        except StoreError as error:
            if not self._models:
                raise
            # Loaded and cached models go on being served while the bucket cannot be reached.
            logger.warning("the old listing is kept: %s", error)
        finally:
            self._refreshing = None
            self._ended_at = time.monotonic()
        self._listed_at = began
        unread = any(not isinstance(model, DescribedModel) for model in self._models.values())
        if self._reading is None and unread:
            self._reading = asyncio.create_task(self._read_all())

    def _list(self) -> dict[str, ListedModel]:
        """Models, with the documents that are known from the previous listing."""
        models = models_in(self._store.list(self._prefix), self._prefix)
        return {name: described_as(model, self._models.get(name)) for name, model in models.items()}

    def _name_aliases(self) -> None:
        known = self._conflicts
        self._aliases, self._conflicts = aliases_of(self._models)
        for alias, names in self._conflicts.items():
            if known.get(alias) != names:
                logger.warning("the alias '%s' is claimed by %s: it names none", alias, " and ".join(names))

    async def _read_all(self) -> None:
        """Read the documents of every model that has not been described yet."""
        limit = asyncio.Semaphore(READS_AT_ONCE)

        async def read(model: ListedModel) -> None:
            async with limit:
                try:
                    await self._read(model)
                except StoreError as error:
                    logger.warning("not read: %s", error, extra={"model": model.name})

        tried: set[tuple[str, str]] = set()
        try:
            # A listing that ends meanwhile adds models.
            while unread := [
                each
                for each in self.listed
                if not isinstance(each, DescribedModel) and (each.name, each.revision) not in tried
            ]:
                tried |= {(each.name, each.revision) for each in unread}
                await asyncio.gather(*(read(model) for model in unread))
        finally:
            self._reading = None
            self._name_aliases()

    async def _read(self, model: ListedModel) -> DescribedModel:
        """The model with what its documents say; raises StoreError."""
        if isinstance(model, DescribedModel):
            return model
        loop = asyncio.get_running_loop()
        try:
            contents = await asyncio.gather(
                *(loop.run_in_executor(self._readers, self._documents.read, d) for d in model.documents)
            )
        except ObjectReplaced:
            self.forget()
            raise
        names = [stored.filename for stored in model.documents]
        contents_by_name = dict(zip(names, contents, strict=True))
        described = await loop.run_in_executor(self._readers, describe, model, contents_by_name)
        current = self._models.get(model.name)  # perhaps of a newer listing
        if current is not None:
            self._models[model.name] = described_as(current, described)
            if model.kind is ModelKind.ADAPTER:
                self._adapters = None
            if described.serving.aliases and self._reading is None:
                self._name_aliases()
        return described


def aliases_of(models: Mapping[str, ListedModel]) -> tuple[dict[str, str], dict[str, tuple[str, ...]]]:
    """Alias -> name of the model; and alias -> the models with conflicting claims.

    A model's own name wins, and an alias that two models claim names none.
    """
    claims: dict[str, set[str]] = {}
    described = [model for model in models.values() if isinstance(model, DescribedModel)]
    for model in described:
        for alias in map(canonical_name, model.serving.aliases):
            if alias != model.name:
                claims.setdefault(alias, {alias} & models.keys()).add(model.name)
    aliases = {alias: next(iter(names)) for alias, names in claims.items() if len(names) == 1}
    conflicts = {alias: tuple(sorted(names)) for alias, names in claims.items() if len(names) > 1}
    return aliases, conflicts
