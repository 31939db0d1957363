"""One sequence at a time, with transformers' own `generate`: for architectures that cannot be batched.

Runs whatever `generate` supports: recurrent state, custom caches, a model on several devices.
"""

import queue
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, StoppingCriteria
from transformers.generation import StoppingCriteriaList

from inference_service.hosts.transformers.generation.runner import RunnerDead
from inference_service.hosts.transformers.generation.sampling import choose
from inference_service.hosts.transformers.generation.sequence import Failure, Sequence

CLOSE_SECONDS = 5.0


class Sequential:
    """A Runner (see runner.py). `enter` activates an adapter (None: none)."""

    def __init__(self, model: Any, enter: Callable[[str | None], None]) -> None:
        self.steps = 0
        self._model = model
        for layer in layers_of(model):
            layer.register_forward_hook(self._count)
        self._enter = enter
        self._waiting: queue.SimpleQueue[Sequence | None] = queue.SimpleQueue()
        self._running: dict[str, Sequence] = {}
        self._model_lock = threading.Lock()
        self._thread = threading.Thread(target=self._run, name="one-at-a-time", daemon=True)
        self._thread.start()

    @property
    def running(self) -> int:
        return len(self._running)

    def is_alive(self) -> bool:
        return self._thread.is_alive()

    def submit(self, sequence: Sequence) -> None:
        if not self.is_alive():
            raise RunnerDead("the model's thread has ended")
        self._running[sequence.name] = sequence
        self._waiting.put(sequence)

    def cancel(self, sequence: Sequence) -> None:
        sequence.cancelled = True
        self._running.pop(sequence.name, None)

    @contextmanager
    def exclusive(self) -> Iterator[Any]:
        with self._model_lock:
            yield self._model

    def forget(self) -> None:
        """No cache outlives its sequence."""

    def close(self) -> None:
        for sequence in list(self._running.values()):
            self.cancel(sequence)
        self._waiting.put(None)
        self._thread.join(CLOSE_SECONDS)

    def _run(self) -> None:
        while (sequence := self._waiting.get()) is not None:
            try:
                if not sequence.cancelled:
                    with self._model_lock:
                        self._generate(sequence)
            except Exception as error:  # of this sequence; the next may succeed
                sequence.tell(Failure(f"{type(error).__name__}: {error}"))
            finally:
                self._running.pop(sequence.name, None)

    @torch.no_grad()  # type: ignore[untyped-decorator]
    def _generate(self, sequence: Sequence) -> None:
        self._enter(sequence.adapter)
        prompt = torch.tensor([sequence.prompt], device=self._model.device)
        follower = _Follower(sequence, lambda: self._running.pop(sequence.name, None))
        self._model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            generation_config=GenerationConfig(
                do_sample=False, max_new_tokens=sequence.params.max_tokens, pad_token_id=0
            ),
            logits_processor=LogitsProcessorList([follower]),
            stopping_criteria=StoppingCriteriaList([_Ended(follower)]),
        )

    def _count(self, *_: Any) -> None:
        # Per layer, not per token: a long prompt is one forward, which takes minutes on a slow machine.
        self.steps += 1


def layers_of(model: Any) -> list[Any]:
    """The modules that a forward runs in sequence; the model itself if it has none."""
    lists = (module for module in model.modules() if isinstance(module, torch.nn.ModuleList))
    return [layer for each in lists for layer in each] or [model]


class _Follower(LogitsProcessor):  # type: ignore[misc]
    """Chooses the token, and leaves one finite logit for the argmax that follows."""

    def __init__(self, sequence: Sequence, end: Callable[[], Any]) -> None:
        self.ended = False
        self._end = end
        self._sequence = sequence

    @property
    def is_over(self) -> bool:
        """Whether generation must stop."""
        return self.ended or self._sequence.cancelled

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        (token,) = choose(scores.float(), [self._sequence])
        self.ended = token.finish is not None
        self.ended = self.ended or self._sequence.failure is not None
        if self.ended:
            self._end()
        self._sequence.tell(self._sequence.failure or token)
        alone = torch.full_like(scores, torch.finfo(scores.dtype).min)
        alone[0, token.id] = 0.0
        return alone


class _Ended(StoppingCriteria):  # type: ignore[misc]
    def __init__(self, follower: _Follower) -> None:
        self._follower = follower

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        over = self._follower.is_over
        return torch.full((input_ids.shape[0],), over, device=input_ids.device, dtype=torch.bool)
