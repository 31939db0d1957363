"""Prometheus metrics of the service.

Labels are `model`, `status` and `phase` only, and `model` is always a name in the catalog, so that clients
cannot grow the number of series.
"""

from collections.abc import Callable, Iterable, Mapping

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST

CONTENT_TYPE = CONTENT_TYPE_LATEST
# The same buckets as vLLM's own histograms, so that both fit in one graph.
_FIRST_TOKEN_BUCKETS = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75),
    *(1, 2.5, 5, 7.5, 10, 20, 40, 80, 160, 640),
)
_REQUEST_BUCKETS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 60, 120, 300, 600)
_LOAD_BUCKETS = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160, 300, 600)


class Metrics:
    """The service's metric families, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = self._counter(
            "requests_total",
            "Requests that ended, by HTTP status (a stream that failed after its first byte counts "
            "with the status of its error)",
            "status",
        )
        self.request_seconds = self._histogram("request_seconds", "Arrival to last byte", _REQUEST_BUCKETS)
        self.first_token_seconds = self._histogram(
            "time_to_first_token_seconds",
            "Arrival to first byte of a stream, waiting and loading included",
            _FIRST_TOKEN_BUCKETS,
        )
        self.prompt_tokens = self._counter("prompt_tokens_total", "Prompt tokens")
        self.generated_tokens = self._counter("generated_tokens_total", "Generated tokens")
        self._add_loads()

    def _add_loads(self) -> None:
        self.loads = self._counter(
            "loads_total", "Loads of a model that ended, status ok or failed; adapters included", "status"
        )
        self.load_seconds = self._histogram(
            "load_seconds", "Fetch and start of an engine, or a swap, or an adapter added", _LOAD_BUCKETS
        )
        self.load_phase_seconds = self._histogram(
            "load_phase_seconds",
            "Phases of loads: list, sync, verify, memory, start, weights, compile, warm-up, graphs, server, "
            "weight-check",
            _LOAD_BUCKETS,
            "phase",
        )
        self.swaps = self._counter(
            "swaps_total",
            "Weights put into a live engine, status ok or failed (then loaded into a fresh engine)",
            "status",
        )
        self.swap_bytes = self._counter(
            "swap_bytes_total",
            "Bytes of swapped weights, by what they were copied from: prepared memory, read_ahead (a ring of "
            "buffers) or mapped files; or unchanged",
            "source",
        )
        self.preparations = self._counter(
            "preparations_total",
            "Weights made ready ahead of a swap: ready, refused (by the driver), no_memory or failed",
            "status",
        )
        self.sleeps = self._counter(
            "sleeps_total",
            "Engines that gave way by sleeping (MAX_SLEEPING): asleep, woken; no_memory (on the machine) and "
            "failed: the engine ended instead",
            "status",
        )
        self.compile_cache = self._counter(
            "compile_cache_total",
            "Compiled artefacts in COMPILE_CACHE: pulled, missing (to be compiled), pushed or failed",
            "status",
        )
        self.rollouts = self._counter(
            "rollouts_total",
            "Revisions of models that served: ok (a new one took over), rejected (the old one still serves), "
            "rolled_back",
            "status",
        )
        self.evictions = self._counter(
            "evictions_total",
            "Engines stopped in good order, or put to sleep: for another model, idle or unloaded",
        )
        self.deaths = self._counter("engine_deaths_total", "Engines that died or hung")

    def watch_engines(self, count_by_state: Callable[[], dict[str, int]]) -> None:
        """Publish the number of engines in each state, read at every scrape."""
        self.registry.register(_EnginesByState(count_by_state))

    def loaded(self, model: str, seconds: float, phases: Mapping[str, float]) -> None:
        """A load has succeeded."""
        self.loads.labels(model, "ok").inc()
        self.load_seconds.labels(model).observe(seconds)
        for phase, spent in phases.items():
            self.load_phase_seconds.labels(model, phase).observe(spent)

    def render(self) -> bytes:
        return generate_latest(self.registry)

    def _counter(self, name: str, about: str, *labels: str) -> Counter:
        return Counter(f"inference_{name}", about, ["model", *labels], registry=self.registry)

    def _histogram(self, name: str, about: str, buckets: tuple[float, ...], *labels: str) -> Histogram:
        return Histogram(
            f"inference_{name}", about, ["model", *labels], buckets=buckets, registry=self.registry
        )


class _EnginesByState:
    def __init__(self, count_by_state: Callable[[], dict[str, int]]) -> None:
        self._count_by_state = count_by_state

    def collect(self) -> Iterable[Metric]:
        family = GaugeMetricFamily("inference_engines", "Engines by state", labels=["status"])
        for state, count in self._count_by_state().items():
            family.add_metric([state], count)
        yield family
