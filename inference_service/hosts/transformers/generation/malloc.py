"""Return freed memory to the system at once.

glibc keeps it: after large blocks were freed, it allocates new ones from its heaps. There weights and their
packed copies, of nearly the same size, do not fit into each other's gaps.
"""

import ctypes
import sys
from collections.abc import Iterable, Iterator
from typing import Any

TRIM_BYTES = 128 << 20


def give_back() -> None:
    """Return what the allocator keeps of freed weights; glibc may keep as much as a whole model."""
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)


def layers_one_by_one(model: Any, kind: type) -> Iterator[tuple[str, Any]]:
    """Yield path and layer of exactly this kind; the caller replaces each layer before the next."""
    paths = [path for path, layer in model.named_modules() if type(layer) is kind]
    replaced = 0
    for path in paths:
        layer = model.get_submodule(path)
        replaced += _bytes(layer.parameters())
        yield path, layer
        del layer
        if replaced > TRIM_BYTES:
            replaced = 0
            give_back()


def _bytes(weights: Iterable[Any]) -> int:
    return sum(weight.numel() * weight.element_size() for weight in weights)
