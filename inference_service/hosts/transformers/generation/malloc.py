"""Memory that was freed, given back to the system at once.

glibc keeps it: once large blocks were freed it takes new ones from its heaps, where weights and their packed
copies of nearly the same size do not fit into one another's places.
"""

import ctypes
import sys
from collections.abc import Iterable, Iterator
from typing import Any

TRIM_BYTES = 128 << 20


def give_back() -> None:
    """What the allocator keeps of freed weights, with glibc as much as a model."""
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)


def layers_one_by_one(model: Any, kind: type) -> Iterator[tuple[str, Any]]:
    """The paths of the model's layers of exactly this kind, and each layer to be replaced before the next."""
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
