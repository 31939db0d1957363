"""The titles of host processes, which ps, top and nvidia-smi show: each names the model that it serves."""

import os
import re

# Only the command line's own memory is overwritten, so that /proc/PID/environ stays readable.
os.environ.setdefault("SPT_NOENV", "1")

import setproctitle

FORKED = "forked"
SPAWNED = "spawned"
_PREFIX = "inference-service: "
_VLLM = "VLLM::"
_MODEL = re.compile(rf"(?<={_PREFIX})[^ :]+")


def title_of(model: str) -> str:
    """The title of a process that serves `model`, or the beginning of it."""
    return f"{_PREFIX}{model}"


def title_host(model: str, origin: str) -> None:
    """Title this process; `origin` says how it was made."""
    setproctitle.setproctitle(f"{title_of(model)} ({origin})")


def retitle(model: str) -> None:
    """Name another model in this process's title, if it names one: its weights were swapped."""
    setproctitle.setproctitle(_MODEL.sub(model, setproctitle.getproctitle(), count=1))


def title_child() -> None:
    """Name the model in the title of a process that vLLM has started and titled itself.

    vLLM reads the prefix of its titles when it is imported, which a forked host did before it had a model.
    """
    title, prefix = setproctitle.getproctitle(), os.environ.get("VLLM_PROCESS_NAME_PREFIX")
    if prefix and title.startswith(_VLLM):
        setproctitle.setproctitle(f"{prefix}::{title.removeprefix(_VLLM)}")
