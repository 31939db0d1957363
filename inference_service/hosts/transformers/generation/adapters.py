"""LoRA adapters on one model, through PEFT: several are in its layers, one at a time is in use."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from transformers.utils import logging


class Adapters:
    """Known by the name under which they are served. To be used by the model's thread, or in its place."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self._names: dict[str, str] = {}
        self._layers: list[BaseTunerLayer] = []
        self._in_use: str | None = None

    def __contains__(self, name: str) -> bool:
        return name in self._names

    def add(self, name: str, number: int, directory: Path) -> None:
        """Read an adapter; raises what PEFT raises, and lets the model answer as before then."""
        inner = f"adapter{number}"
        try:
            with _without_warnings():
                loading = self._model.load_adapter(str(directory), adapter_name=inner, hotswap=False)
            missing = sorted(key for key in loading.missing_keys if f".{inner}." in f"{key}.")
            if missing:
                # PEFT would go on as if it were no adapter at all.
                raise ValueError(f"the adapter lacks {len(missing)} of its weights, among them {missing[0]}")
        except BaseException:
            self._withdraw(inner)
            raise
        self._names[name] = inner
        self._look_again()

    def remove(self, name: str) -> None:
        inner = self._names.pop(name, None)
        if inner is not None:
            self._withdraw(inner)

    def clear(self) -> None:
        """Leave the model as its checkpoint has it, without PEFT's layers around its own."""
        for name in list(self._names):
            self.remove(name)
        for path, layer in list(self._model.named_modules()):
            if isinstance(layer, BaseTunerLayer):
                self._model.set_submodule(path, layer.get_base_layer())
        self._layers = []

    def enter(self, name: str | None) -> None:
        """Let the next step use an adapter, or none; one that is not there raises KeyError."""
        if name == self._in_use or not self._layers:
            return
        for layer in self._layers:
            if name is not None:
                layer.set_adapter(self._names[name])
            layer.enable_adapters(name is not None)
        self._in_use = name

    def _withdraw(self, inner: str) -> None:
        if inner in getattr(self._model, "peft_config", {}):
            with _without_warnings():
                self._model.delete_adapter(inner)
        self._look_again()

    def _look_again(self) -> None:
        """Reading and removing an adapter change which one is in use."""
        self._layers = [layer for layer in self._model.modules() if isinstance(layer, BaseTunerLayer)]
        for layer in self._layers:
            layer.enable_adapters(False)
        self._in_use = None


@contextmanager
def _without_warnings() -> Iterator[None]:
    """PEFT asks at the second adapter whether several are meant, and tells which it makes the active one;
    transformers misses the weights of those that are there already."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Already found a `peft_config`")
            warnings.filterwarnings("ignore", message="Adapter .* was active which is now deleted")
            yield
    finally:
        logging.set_verbosity(verbosity)
