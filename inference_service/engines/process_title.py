"""The titles of host processes, shown by ps, top and nvidia-smi: each names the model that it serves."""

import os
import re

# Overwrite only the memory of the command line, so that /proc/PID/environ stays readable.
os.environ.setdefault("SPT_NOENV", "1")

import setproctitle

FORKED = "forked"
SPAWNED = "spawned"
_PREFIX = "inference-service: "
_VLLM = "VLLM::"
_MODEL = re.compile(rf"(?<={_PREFIX})[^ :]+")


def title_of(model: str) -> str:
    """The title of a process that serves `model`, shortened if necessary."""
    return f"{_PREFIX}{model}"


def title_host(model: str, origin: str) -> None:
    """Set this process's title; `origin` says how it was started."""
    setproctitle.setproctitle(f"{title_of(model)} ({origin})")


def retitle(model: str) -> None:
    """Put another model into this process's title, if it names one, after a swap."""
    setproctitle.setproctitle(_MODEL.sub(model, setproctitle.getproctitle(), count=1))


def title_child() -> None:
    """Put the model into the title of a process that vLLM started and titled itself.

    vLLM reads the prefix of its titles at import, before a forked host has a model.
    """
    title, prefix = setproctitle.getproctitle(), os.environ.get("VLLM_PROCESS_NAME_PREFIX")
    if prefix and title.startswith(_VLLM):
        setproctitle.setproctitle(f"{prefix}::{title.removeprefix(_VLLM)}")
