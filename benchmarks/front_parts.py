"""The four parts of `benchmarks.front`. Each adds rows to the table and figures to the last line."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

import psutil

from benchmarks.fake_service import MODEL, FakeService, fake_service
from benchmarks.front_client import STREAMS_A_SECOND
from benchmarks.front_jobs import Outcome, run_job
from benchmarks.proxies import PROXIES, proxy_server
from benchmarks.report import median, say, spread

CONCURRENCY = 32
STREAMS = 1000
STREAM_RATE = 5.0
LATE_MS = 250.0
# CPU time of vLLM's own serving code in its host per streamed token, measured once.
VLLM_MICROSECONDS = 173.0
PROXY_STREAMS, PROXY_RATE = 200, 20.0
# The service's defaults. An answer takes one second, so RUNNING requests per second are admitted.
RUNNING, WAITING = 50, 200
OVERLOAD = 3


@dataclass(frozen=True)
class Plan:
    """How much is measured. `rates`: tokens per second of each stream, tried one after the other."""

    load_seconds: float
    pairs: int
    stream_tokens: int
    rates: tuple[float, ...]
    step_seconds: float
    overload_seconds: float
    rounds: int
    round_tokens: int


FULL = Plan(10, 2000, 200, (7, 9, 11, 13, 15, 17, 19, 22, 25), 5, 15, 3, 160)
QUICK = Plan(3, 300, 35, (10,), 3, 5, 1, 80)


@dataclass
class Report:
    """Rows of the table (what, value, target, CPU), figures and ratios of the last line."""

    rows: list[list[str]] = field(default_factory=list)
    figures: dict[str, float | str] = field(default_factory=dict)
    ratios: dict[str, float] = field(default_factory=dict)

    def row(self, what: str, value: str, aim: str = "", busy: str = "") -> None:
        self.rows.append([what, value, aim, busy])


def whole_answers(plan: Plan, report: Report) -> None:
    """Requests per second, and the overhead over direct requests to the host."""
    say("whole answers: starting the service")
    with fake_service(1e6) as service:
        target = {"address": service.address, "model": MODEL, "tokens": 16}
        loaded = run_job(
            "load", service.processes, concurrency=CONCURRENCY, seconds=plan.load_seconds, **target
        )
        if loaded.result["failed"]:
            raise RuntimeError(f"{loaded.result['failed']:.0f} whole answers failed")
        a_second = loaded.result["requests"] / loaded.result["seconds"]
        say(f"whole answers: {a_second:.0f} requests/s at concurrency {CONCURRENCY} ({loaded.busy()})")
        pairs = run_job("pairs", {}, direct=service.host_socket, count=plan.pairs, **target).result
    report.row(f"whole answers/s at concurrency {CONCURRENCY}", f"{a_second:.0f}", "", loaded.busy())
    report.figures["requests_per_s"] = round(a_second)
    for share in ("p50", "p95", "p99"):
        over = pairs[f"through_{share}_ms"] - pairs[f"direct_{share}_ms"]
        report.figures[f"overhead_{share}_ms"] = round(over, 2)
        value = f"{over:.2f} ({pairs[f'through_{share}_ms']:.2f} - {pairs[f'direct_{share}_ms']:.2f})"
        report.row(f"overhead {share}, ms: service's {share} - host's {share}", value)
    report.row("overhead, ms: median of the paired differences", f"{pairs['paired_median_ms']:.2f}")


def many_streams(plan: Plan, report: Report) -> None:
    """1,000 concurrent streams; then faster ones, as long as the service keeps up."""
    say(f"streams: {STREAMS} at {STREAM_RATE:g} tokens/s")
    with _service_for(STREAMS, STREAM_RATE) as service:
        idle = service.process.memory_info().rss
        base = _stream_job(service, STREAMS, STREAM_RATE, plan.stream_tokens)
        direct = run_job(
            "streams",
            {"host": [service.host]},
            address=service.host_socket,
            model=MODEL,
            count=STREAMS,
            tokens=_tokens(plan, STREAM_RATE),
            rate=STREAM_RATE,
        )
    if not base.seconds:
        raise RuntimeError(f"the {STREAMS} streams were never all open at the same time")
    kib = (base.resident["service"] - idle) / STREAMS / 1024
    result = base.result
    about = f"{STREAMS} streams at {STREAM_RATE:g} tokens/s"
    gaps = f"{result['gap_p50_ms']:.0f} / {result['gap_p99_ms']:.0f}"
    report.row(f"{about}: gap between tokens p50 / p99, ms", gaps, "<= 250", base.busy())
    late = f"{result['lateness_p50_ms']:.0f} / {result['lateness_p99_ms']:.0f}"
    report.row(f"{about}: lateness of tokens p50 / p99, ms", late)
    own = f"{direct.result['gap_p50_ms']:.0f} / {direct.result['gap_p99_ms']:.0f}"
    report.row("the same, directly to the host: gap p50 / p99, ms", own, "", direct.busy())
    report.row(f"{about}: tokens lost, repeated or altered", f"{result['wrong']:.0f}", "0")
    report.row(f"{about}: memory of the service, KiB per stream", f"{kib:.0f}")
    report.figures |= {
        "sse_streams": STREAMS,
        "sse_lost": round(result["wrong"]),
        "sse_gap_p99_ms": round(result["gap_p99_ms"], 1),
        "sse_lateness_p99_ms": round(result["lateness_p99_ms"], 1),
        "sse_gap_p99_ms_of_the_host": round(direct.result["gap_p99_ms"], 1),
        "kib_per_stream": round(kib, 1),
    }
    _highest_rate(plan, report, base)


def _highest_rate(plan: Plan, report: Report, base: Outcome) -> None:
    """Starts a service per rate, because the rate is a setting of the fake engine."""
    best = base if _holds(base) else None
    for rate in plan.rates if best else ():
        with _service_for(STREAMS, rate) as service:
            step = _stream_job(service, STREAMS, rate, _tokens(plan, rate))
        held = _holds(step)
        what = f"{STREAMS} streams at {rate:g} tokens/s"
        late = f"{step.result['lateness_p99_ms']:.0f} ms late at p99, {step.result['wrong']:.0f} wrong"
        # Without steady time, the first streams ended before the last one began.
        value = late if step.seconds else "never all open at once"
        report.row(f"{what}: {'holds' if held else 'does not hold'}", value, "", step.busy())
        if not held:
            break
        best = step
    highest = best.result["chunks"] / best.result["seconds"] if best else 0.0
    report.row("highest rate that held, tokens/s", f"{highest:.0f}", "", best.busy() if best else "")
    report.figures["highest_chunks_per_s"] = round(highest)


def _tokens(plan: Plan, rate: float) -> int:
    """Enough tokens to keep all streams open together for `step_seconds`."""
    return int((STREAMS / STREAMS_A_SECOND + plan.step_seconds) * rate)


def _holds(step: Outcome) -> bool:
    return step.seconds > 0 and step.result["wrong"] == 0 and step.result["lateness_p99_ms"] <= LATE_MS


@contextmanager
def _service_for(streams: int, rate: float) -> Iterator[FakeService]:
    with fake_service(rate, MAX_CONCURRENT_REQUESTS=str(streams)) as service:
        yield service


def _stream_job(service: FakeService, count: int, rate: float, tokens: int) -> Outcome:
    outcome = run_job(
        "streams",
        service.processes,
        address=service.address,
        model=MODEL,
        count=count,
        tokens=tokens,
        rate=rate,
    )
    result = outcome.result
    say(
        f"streams: {count} at {rate:g} tokens/s: gap p99 {result['gap_p99_ms']:.0f} ms, lateness p99 "
        f"{result['lateness_p99_ms']:.0f} ms, {result['wrong']:.0f} wrong ({outcome.busy()})"
    )
    return outcome


def three_times(plan: Plan, report: Report) -> None:
    """Three times the admitted load: how fast the excess is refused."""
    rate = OVERLOAD * RUNNING
    say(f"overload: {rate} requests/s, of which {RUNNING} are admitted")
    bounds = {"MAX_CONCURRENT_REQUESTS": str(RUNNING), "MAX_QUEUED_REQUESTS": str(WAITING)}
    with fake_service(20, **bounds) as service:
        outcome = run_job(
            "overload",
            service.processes,
            address=service.address,
            model=MODEL,
            tokens=20,
            rate=rate,
            seconds=plan.overload_seconds,
        )
    result = outcome.result
    if not result["refused"]:
        raise RuntimeError("no request was refused: this machine is too slow to generate the load")
    about = f"{OVERLOAD}x overload"
    counts = f"{result['offered']:.0f} / {result['admitted']:.0f} / {result['refused']:.0f}"
    report.row(f"{about}: offered / answered / refused", counts, "", outcome.busy())
    for name, key in (("429 after", "refusal"), ("/health after", "health")):
        value = f"{result[f'{key}_p50_ms']:.1f} / {result[f'{key}_p99_ms']:.1f}"
        report.row(f"{about}: {name}, p50 / p99, ms", value, "<= 50")
        report.figures[f"{key}_p99_ms"] = round(result[f"{key}_p99_ms"], 1)
    for name, key in (
        ("429 without Retry-After", "without_retry_after"),
        ("neither answered nor refused", "others"),
        ("tokens lost, repeated or altered", "wrong"),
    ):
        report.row(f"{about}: {name}", f"{result[key]:.0f}", "0")
        report.figures[f"overload_{key}"] = round(result[key])


def per_token(plan: Plan, report: Report) -> None:
    """CPU time per streamed token: this service, and each installed proxy."""
    proxies = [proxy for proxy in PROXIES if proxy.program]
    for proxy in PROXIES:
        if proxy not in proxies:
            say(f"{proxy.name} is not installed (package {proxy.package}) and is skipped")
    with ExitStack() as stack:
        service = stack.enter_context(_service_for(PROXY_STREAMS, PROXY_RATE))
        relays = {"service": _Relay(service.address, [service.process])}
        for proxy in proxies:
            server = stack.enter_context(proxy_server(proxy, service.host_socket))
            relays[proxy.name] = _Relay(server.address, server.processes())
        costs = _alternate(plan, relays, service.host)
    _report_per_token(report, costs)


@dataclass(frozen=True)
class _Relay:
    """A relay in front of the host: its address and its processes."""

    address: str
    processes: list[psutil.Process]


def _alternate(plan: Plan, relays: dict[str, _Relay], host: psutil.Process) -> dict[str, list[float]]:
    """Microseconds per token of each relay, round by round, in alternating order."""
    costs: dict[str, list[float]] = {name: [] for name in relays}
    for number in range(plan.rounds):
        for name in list(relays) if number % 2 == 0 else list(relays)[::-1]:
            relay = relays[name]
            outcome = run_job(
                "streams",
                {name: relay.processes, "host": [host]},
                address=relay.address,
                model=MODEL,
                count=PROXY_STREAMS,
                tokens=plan.round_tokens,
                rate=PROXY_RATE,
            )
            if outcome.result["wrong"]:
                raise RuntimeError(f"{name}: {outcome.result['wrong']:.0f} tokens are wrong")
            costs[name].append(outcome.microseconds_a_chunk(name))
            say(f"tokens, round {number + 1}, {name}: {costs[name][-1]:.1f} us per token ({outcome.busy()})")
    return costs


def _report_per_token(report: Report, costs: dict[str, list[float]]) -> None:
    ours = costs["service"]
    about = f"{PROXY_STREAMS} streams at {PROXY_RATE:g} tokens/s"
    vllm = f"{median(ours) / VLLM_MICROSECONDS:.2f} of the {VLLM_MICROSECONDS:g} us of vLLM's serving code"
    report.row(f"{about}: this service, us per token", spread(ours), "", vllm)
    report.figures["cpu_us_per_token"] = round(median(ours), 1)
    for name, theirs in costs.items():
        if name == "service":
            continue
        ratios = [mine / other for mine, other in zip(ours, theirs, strict=True)]
        ratio = f"service/{name} {spread(ratios)}"
        report.row(f"{about}: {name}, us per token", spread(theirs), "", ratio)
        # The first installed proxy is the reference.
        key = "proxy" if "proxy" not in report.figures else name
        report.figures.setdefault("proxy", name)
        report.ratios[f"cpu_per_token_vs_{key}"] = median(ratios)
        report.figures[f"{key}_cpu_us_per_token"] = round(median(theirs), 1)
