"""LoRA adapters on one model, through PEFT: several are loaded, one at a time is active."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from transformers.utils import logging


class Adapters:
    """Keyed by served name. Use only in the model's thread, or with exclusive access to the model."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self._names: dict[str, str] = {}
        self._layers: list[BaseTunerLayer] = []
        self._in_use: str | None = None

    def __contains__(self, name: str) -> bool:
        return name in self._names

    def add(self, name: str, number: int, directory: Path) -> None:
        """Load an adapter. Raises what PEFT raises; the model is unchanged then."""
        inner = f"adapter{number}"
        try:
            with _without_warnings():
                loading = self._model.load_adapter(str(directory), adapter_name=inner, hotswap=False)
            missing = sorted(key for key in loading.missing_keys if f".{inner}." in f"{key}.")
            if missing:
                # PEFT would carry on as if there were no adapter.
                raise ValueError(f"the adapter lacks {len(missing)} of its weights, for example {missing[0]}")
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
        """Restore the model to its checkpoint, without PEFT's layers around its own."""
        for name in list(self._names):
            self.remove(name)
        for path, layer in list(self._model.named_modules()):
            if isinstance(layer, BaseTunerLayer):
                self._model.set_submodule(path, layer.get_base_layer())
        self._layers = []

    def enter(self, name: str | None) -> None:
        """Activate an adapter, or none, for the next step. Raises KeyError if it is not loaded."""
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
        """Loading or removing an adapter changes which one is active."""
        self._layers = [layer for layer in self._model.modules() if isinstance(layer, BaseTunerLayer)]
        for layer in self._layers:
            layer.enable_adapters(False)
        self._in_use = None


@contextmanager
def _without_warnings() -> Iterator[None]:
    """PEFT warns that a second adapter may be unintended, and which one it activates; transformers reports
    the weights of adapters that are already loaded as missing."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Already found a `peft_config`")
            warnings.filterwarnings("ignore", message="Adapter .* was active which is now deleted")
            yield
    finally:
        logging.set_verbosity(verbosity)
