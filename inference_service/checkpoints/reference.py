"""Names of a revision of a model, of an engine that runs it, and of an adapter on an engine."""

from dataclasses import dataclass
from typing import Self

_MARK = "@"


@dataclass(frozen=True)
class Reference:
    """`model@revision`, the unique name of an engine or of an adapter on one.

    `model@revision+8` is an engine that takes LoRA adapters of up to rank 8, `model@revision.3` the third
    adapter loaded on any engine. Clients may use `model@revision`; a model's name contains no `@`.
    """

    model: str
    revision: str
    adapter_rank: int = 0
    number: int = 0

    def __str__(self) -> str:
        rank = f"+{self.adapter_rank}" if self.adapter_rank else ""
        number = f".{self.number}" if self.number else ""
        return f"{self.model}{_MARK}{self.revision}{rank}{number}"

    @classmethod
    def parse(cls, text: str) -> Self | None:
        """Parses a reference from a client or a host; rank and number stay part of the revision.

        None for a name without a revision.
        """
        model, mark, revision = text.partition(_MARK)
        return cls(model, revision) if mark else None


def model_of(reference: str) -> str:
    """The model name that clients use: everything before the revision."""
    return reference.partition(_MARK)[0]
