"""The outcome of every request: right, left by its client, an explained error, or an unexplained one."""

from collections import Counter

from benchmarks.report import say
from benchmarks.soak.asking import Ask, Outcome, ask
from benchmarks.soak.explanations import explain
from benchmarks.soak.timeline import Deed, Timeline
from benchmarks.sse_client import now

SHOWN = 40


class Ledger:
    """Sends requests to `address` and counts outcomes. `under_way`: the number of requests in flight."""

    def __init__(self, address: str, timeline: Timeline) -> None:
        self.address = address
        self.timeline = timeline
        self.under_way = 0
        self.requests = 0
        self.ok = 0
        self.left: Counter[str] = Counter()
        self.explained: Counter[tuple[str, str, str]] = Counter()
        self.unexplained = 0
        self.ok_by_model: Counter[str] = Counter()
        self._began = now()

    async def send(self, request: Ask) -> None:
        """Returns once the request is answered, or its client has left, and the outcome is judged."""
        self.requests += 1
        lethal = self.timeline.begin(Deed.LETHAL, request.model) if request.lethal else None
        self.under_way += 1
        try:
            outcome = await ask(self.address, request, self.under_way)
        except OSError as error:
            self.complain(request.model, f"no connection: {error!r}")
            return
        finally:
            self.under_way -= 1
            if lethal is not None:
                lethal.end()
        self._judge(outcome)

    def complain(self, model: str, what: str) -> None:
        """Record something that nothing explains."""
        self.unexplained += 1
        if self.unexplained <= SHOWN:
            say(f"UNEXPLAINED at {now() - self._began:.1f} s: {model}: {what}")

    def _judge(self, outcome: Outcome) -> None:
        request, model = outcome.ask, outcome.ask.model
        if outcome.wrong is not None:
            self.complain(model, f"{_summary(outcome)}: {outcome.wrong}")
        elif request.refusal is not None:
            self._judge_refusal(outcome, request.refusal)
        elif outcome.code is not None:
            why = None if request.certain else explain(outcome, self.timeline)
            if why is None:
                self.complain(model, f"{_summary(outcome)}: {outcome.message}")
            else:
                self.explained[model, outcome.code, why] += 1
        elif outcome.left:
            self.left[_when(outcome)] += 1
        elif outcome.status in (200, 202):
            self.ok += 1
            self.ok_by_model[model] += 1
        else:
            self.complain(
                model, f"{_summary(outcome)}: {outcome.message or 'an answer without an error code'}"
            )

    def _judge_refusal(self, outcome: Outcome, refusal: tuple[int, str]) -> None:
        if (outcome.status, outcome.code) == refusal:
            self.explained[outcome.ask.model, refusal[1], "asked for"] += 1
        else:
            self.complain(outcome.ask.model, f"{_summary(outcome)} instead of {refusal}: {outcome.message}")


def _when(outcome: Outcome) -> str:
    """When its client left."""
    if outcome.words:
        return "in mid-stream"
    if outcome.status:
        return "while loading"
    return "before an answer"


def _summary(outcome: Outcome) -> str:
    request = outcome.ask
    how = "streamed " if request.stream else ""
    return (
        f"{how}{request.method} {request.path} of {request.tokens} words, client {request.manner.value}, "
        f"{outcome.seconds:.2f} s, {outcome.words} words, status {outcome.status}, code {outcome.code}"
    )
