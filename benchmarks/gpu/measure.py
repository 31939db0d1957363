"""The steps of `make bench-gpu`, most valuable first."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import psutil
from safetensors import safe_open

from benchmarks.gpu.load import Rate, rate
from benchmarks.gpu.models import Models
from benchmarks.gpu.service import Measured, Services
from benchmarks.gpu.steps import Figures, NotHere, Step
from benchmarks.report import median
from benchmarks.servers import vllm_server
from inference_service.backends.base import BackendMissing, check_load_format
from inference_service.config import Backend, LoadFormat, Settings
from inference_service.machine.device import Device, DeviceKind

SWAPS = 4
LOADS = 2
CONCURRENCIES = (1, 32, 256)
# One engine that changes models at once, and is never drained for a waiter.
ONE = {"MAX_CACHED_MODELS": "1", "MIN_RESIDENCY": "0", "FAIRNESS_WAIT": "86400", "CATALOG_TTL": "86400"}
_BUS = """
import time, torch
pinned, times = torch.empty(1 << 30, dtype=torch.uint8, pin_memory=True), []
target = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
for _ in range(6):
    torch.cuda.synchronize(); started = time.perf_counter()
    target.copy_(pinned); torch.cuda.synchronize()
    times.append(time.perf_counter() - started)
print((1 << 30) / min(times))
"""


class _Prepared(NamedTuple):
    """One prepared swap: seconds from the end of the stream before it, GB/s of its weights, the share of them
    that was ready; and the worst gap in seconds between that stream's tokens, meanwhile and before."""

    first_token: float
    rate: float
    share: float
    gap: float
    gap_before: float


class Bench:
    """The steps over one set of models; `fast` is in memory, `slow` on a disk."""

    def __init__(self, models: Models, fast: Path, slow: Path, device: Device, *, small: bool) -> None:
        self._models = models
        self._slow = slow
        self._device = device
        self._small = small
        self._services = Services(models.bucket, fast, DTYPE="bfloat16", MAX_MODEL_LEN="8192")
        # GB/s of the weights of swaps, by step.
        self._rates: dict[str, float] = {}

    def steps(self) -> list[Step]:
        return [
            Step("launcher", 240, self._launcher),
            Step("swap", 120, self._swap),
            Step("prepared", 90, self._prepared),
            Step("what differs", 90, self._differs),
            Step("tied", 60, self._tied),
            Step("bus", 40, self._bus_rate),
            Step("disk", 90, self._disk),
            Step("fresh", 90, self._fresh),
            Step("unload", 30, self._unload),
            Step("adapters", 60, self._adapters),
            Step("tokens", 180, self._tokens),
            Step("restart", 120, self._restart),
            Step("two engines", 60, self._two_engines),
            Step("killed", 60, self._killed),
            Step("stopped", 60, self._stopped),
            Step("sleep", 60, self._sleep),
            Step("loaders", 180, self._loaders),
            Step("transformers", 90, self._transformers),
        ]

    def close(self) -> None:
        self._services.close()

    def _launcher(self) -> Figures:
        """The service's start, and the first load of an architecture on this machine."""
        service = self._services.get(**ONE)
        seconds, _ = service.first_token(self._models.base)
        engine = service.engine(self._models.base)
        title = psutil.Process(engine["process_id"]).cmdline()[0]
        return {
            "port_s": round(self._services.started_in, 2),
            "first_load_s": round(seconds, 2),
            "forked": title.endswith("(forked)"),
            **_phases(engine),
        }

    def _swap(self) -> Figures:
        """A sibling of the largest size, not prepared."""
        service = self._eager()
        one, two = self._models.large
        fresh = {name: self._fresh_text(service, name) for name in (two, one)}
        figures = self._swaps(service, (two, one), fresh)
        self._rates["swap"] = figures["gb_per_s"]
        return figures

    def _swaps(self, service: Measured, names: tuple[str, str], fresh: dict[str, str]) -> Figures:
        seconds, rates, right = [], [], True
        for number in range(SWAPS):
            name = names[number % 2]
            found, text = service.first_token(name)
            engine = service.engine(name)
            seconds.append(found)
            rates.append(engine["copied_bytes"] / engine["phases"]["weights"] / 1e9)
            right &= engine["swapped"] and text == fresh[name]
        _require(right, "an answer is not a fresh engine's, or an engine was not swapped")
        ways = "+".join(engine["copied_from"])
        return {
            "first_token_s": median(seconds),
            "gb_per_s": median(rates),
            "copied_from": ways,
        }

    def _prepared(self) -> Figures:
        """The same, prepared while the other model streams; and the worst gap between its tokens."""
        service = self._eager()
        one, two = self._models.large
        fresh = {name: service.text(name) for name in (one, two)}
        found = [
            self._one_prepared(service, *names, fresh) for names in ((two, one), (one, two)) * (SWAPS // 2)
        ]
        self._rates["prepared"] = median([each.rate for each in found])
        return {
            "first_token_s": median([each.first_token for each in found]),
            "gb_per_s": self._rates["prepared"],
            "prepared_share": round(min(each.share for each in found), 3),
            "worst_gap_ms": round(1e3 * max(each.gap for each in found), 1),
            "gap_before_ms": round(1e3 * median([each.gap_before for each in found]), 1),
        }

    def _one_prepared(self, service: Measured, now: str, then: str, fresh: dict[str, str]) -> _Prepared:
        """A request for `then` arrives while `now` streams, and the stream ends once all is ready."""
        _require(service.text(now) == fresh[now], f"{now} answers as another model")
        answers: list[tuple[float, str]] = []
        with service.busy(now) as times:
            time.sleep(0.5)
            asked = time.monotonic()
            waiting = _in_background(lambda: answers.append(service.first_token(then, asked)))
            service.wait_until(lambda: _is_ready(service, then))
            released = time.monotonic()
        waiting()
        engine = service.engine(then)
        _require(answers[0][1] == fresh[then], f"{then} answers as another model after a prepared swap")
        copied = engine["copied_bytes"]
        return _Prepared(
            first_token=asked + answers[0][0] - released,
            rate=copied / engine["phases"]["weights"] / 1e9,
            share=engine["copied_from"].get("prepared", 0) / copied,
            gap=_worst_gap(times, asked, released),
            gap_before=_worst_gap(times, times[0], asked),
        )

    def _differs(self) -> Figures:
        """Only the qkv modules of a fine-tune of q_proj and v_proj, with an adapter before and after."""
        service, models = self._services.get(**ONE), self._models
        adapted = service.text(models.adapters[0])
        figures = self._pair(service, (models.base, models.projections))
        _require(service.text(models.adapters[0]) == adapted, "the adapter answers otherwise than before")
        expected = _qkv_bytes(models.bucket / "models" / models.base)
        _require(figures["copied_bytes"] == expected, f"{figures['copied_bytes']} bytes, not {expected}")
        return figures

    def _tied(self) -> Figures:
        return self._pair(self._services.get(**ONE), self._models.tied)

    def _pair(self, service: Measured, names: tuple[str, str]) -> dict[str, Any]:
        """Swaps of two models there and back, text and digests compared with fresh engines'."""
        one, two = names
        fresh = {}
        for name in (two, one):
            service.unload()
            fresh[name] = (service.text(name), service.digests(name))
        seconds = []
        for name in (two, one, two):
            found, text = service.first_token(name)
            engine = service.engine(name)
            seconds.append(found)
            _require(engine["swapped"], f"{name} was loaded into a fresh engine")
            _require(text == fresh[name][0], f"{name} answers otherwise than from a fresh engine")
            _require(
                service.digests(name) == fresh[name][1], f"the weights of {name} are not a fresh engine's"
            )
        return {
            "first_token_s": median(seconds),
            "copied_bytes": engine["copied_bytes"],
            "digests": len(fresh[one][1]),
        }

    def _bus_rate(self) -> Figures:
        self._on_cuda()
        done = subprocess.run([sys.executable, "-c", _BUS], stdout=subprocess.PIPE, check=True, text=True)
        bus = float(done.stdout.split()[-1]) / 1e9
        of_bus = {f"{name}_bus_ratio": round(found / bus, 2) for name, found in self._rates.items()}
        return {"gb_per_s": round(bus, 1), **of_bus}

    def _disk(self) -> Figures:
        """As `swap`, with the snapshots on a disk."""
        service = self._eager(LOCAL_MODEL_CACHE=str(self._slow / "cache"))
        one, two = self._models.large
        return self._swaps(
            service, (two, one), {name: self._fresh_text(service, name) for name in (two, one)}
        )

    def _fresh(self) -> Figures:
        """A fresh engine for a fine-tune of an architecture that was compiled before."""
        service = self._services.get(**ONE, WEIGHT_SWAP="off")
        service.first_token(self._models.other)
        seconds, _ = service.first_token(self._models.projections)
        return {"first_token_s": round(seconds, 2), **_phases(service.engine(self._models.projections))}

    def _unload(self) -> Figures:
        self._on_cuda()
        service = self._services.get(**ONE, WEIGHT_SWAP="off")
        service.text(self._models.base)
        loaded, reserved = _gpu_bytes(), service.process.stats()["budget"]["reserved_bytes"]
        service.unload()
        freed = loaded - _gpu_bytes()
        return {"reserved_gib": _gib(reserved), "came_back_gib": _gib(freed)}

    def _adapters(self) -> Figures:
        service, models = self._services.get(**ONE), self._models
        base = service.text(models.base)
        figures = {}
        for number, name in enumerate(models.adapters, 1):
            seconds, text = service.first_token(name)
            _require(text != base, f"{name} answers as its base")
            figures[f"adapter_{number}_s"] = round(seconds, 3)
        _require(service.text(models.base) == base, "the base answers otherwise beside its adapters")
        return figures

    def _tokens(self) -> Figures:
        """Tokens a second and seconds to the first token, ours over those of vLLM's server, in turn."""
        concurrencies = CONCURRENCIES[:2] if self._small else CONCURRENCIES
        settings = Settings(
            max_model_len=8192, max_cached_models=2, max_concurrent_requests=max(concurrencies)
        )
        running = {"MAX_CONCURRENT_REQUESTS": str(max(concurrencies)), "MAX_CACHED_MODELS": "2"}
        service, figures = self._services.get(**running), {}
        model = self._models.base
        service.text(model)
        with vllm_server("vLLM's server", self._models.bucket / "models" / model, settings) as theirs:
            addresses = (service.process.url.removeprefix("http://"), theirs.address)
            for concurrency in concurrencies:
                ours, others = self._compared(addresses, model, concurrency)
                figures[f"tokens_c{concurrency}_ratio"] = round(
                    _of(ours, others, lambda each: each.tokens), 3
                )
                figures[f"ttft_c{concurrency}_ratio"] = round(
                    _of(ours, others, lambda each: each.first_token), 3
                )
        return figures

    def _compared(
        self, addresses: tuple[str, str], model: str, concurrency: int
    ) -> tuple[list[Rate], list[Rate]]:
        tokens = 32 if self._small else 128
        found: tuple[list[Rate], list[Rate]] = ([], [])
        for number in range(3 + 1):
            for side in (0, 1) if number % 2 else (1, 0):
                measured = rate(addresses[side], model, concurrency, max(4, 2 * concurrency), tokens)
                if number:  # the first one warms up
                    found[side].append(measured)
        return found

    def _restart(self) -> Figures:
        """What a proxy that swaps processes pays for another model: vLLM's server, started again."""
        self.close()
        started = time.monotonic()
        model = self._models.bucket / "models" / self._models.base
        with vllm_server("vLLM's server", model, Settings(max_model_len=8192)) as server:
            rate(server.address, model.name, 1, 1, 1)
            return {"vllm_restart_s": round(time.monotonic() - started, 1)}

    def _two_engines(self) -> Figures:
        service = self._services.get(MAX_CACHED_MODELS="2", GPU_MEMORY_UTILIZATION="0.5")
        idle = _gpu_bytes() if self._device.kind is DeviceKind.CUDA else 0
        for model in (self._models.base, self._models.other):
            service.text(model)
        stats = service.process.stats()
        _require(len(stats["engines"]) == 2, "there are not two engines")
        budget = stats["budget"]
        figures = {"reserved_gib": _gib(budget["reserved_bytes"]), "total_gib": _gib(budget["total_bytes"])}
        if self._device.kind is DeviceKind.CUDA:
            figures["used_gib"] = _gib(_gpu_bytes() - idle)
            _require(
                figures["used_gib"] <= 1.02 * figures["reserved_gib"],
                f"more is used than reserved: {figures}",
            )
        return figures

    def _killed(self) -> Figures:
        """An engine core that is killed: the next request gets a fresh engine."""
        service, model = self._services.get(**ONE), self._models.base
        text = service.text(model)
        os.kill(_core(service.engine(model)["process_id"]), signal.SIGKILL)
        service.wait_until(lambda: not service.process.stats()["engines"])
        seconds, again = service.first_token(model)
        _require(again == text, "the fresh engine answers otherwise")
        return {"replaced_in_s": round(seconds, 2)}

    def _stopped(self) -> Figures:
        """An engine core that hangs: its request fails, and the next gets a fresh engine."""
        service, model = self._services.get(**ONE, ENGINE_STALL_TIMEOUT="10"), self._models.base
        text, started = service.text(model), time.monotonic()
        os.kill(_core(service.engine(model)["process_id"]), signal.SIGSTOP)
        try:
            service.text(model)
        except RuntimeError:
            noticed = time.monotonic() - started
        else:
            raise RuntimeError("a stopped engine has answered")
        _require(service.text(model) == text, "the fresh engine answers otherwise")
        return {"noticed_after_s": round(noticed, 1)}

    def _sleep(self) -> Figures:
        """Two architectures by turns in one slot: each wakes from its sleep."""
        if self._device.kind is not DeviceKind.CUDA:
            raise NotHere("vLLM's CPU build cannot sleep")
        service, names = self._services.get(**ONE, MAX_SLEEPING="1"), (self._models.base, self._models.other)
        texts = {name: self._fresh_text(service, name) for name in names}
        for name in names:
            service.text(name)  # the first engine has gone with the second one's fresh load
        wakes, processes = [], {name: service.engine(name)["process_id"] for name in names}
        for number in range(SWAPS):
            name = names[number % 2]
            seconds, text = service.first_token(name)
            wakes.append(seconds)
            same = service.engine(name)["process_id"] == processes[name]
            _require(same and text == texts[name], "it did not wake, or answers otherwise than fresh")
        kept = [each["asleep_bytes"] for each in service.process.stats()["engines"] if each["asleep_bytes"]]
        return {"wake_s": median(wakes), "kept_gib": _gib(max(kept))}

    def _loaders(self) -> Figures:
        """Seconds of the largest model's weights in a fresh engine, by LOAD_FORMAT, all in the page cache."""
        figures: dict[str, object] = {}
        for choice in LoadFormat:
            try:
                check_load_format(choice, self._device, Backend.VLLM)
            except BackendMissing:
                figures[str(choice)] = "not here"
                continue
            try:
                figures[f"{choice}_s"] = self._fresh_weights(choice)
            except RuntimeError as error:
                figures[str(choice)] = f"failed: {error}"
        return figures

    def _fresh_weights(self, choice: LoadFormat) -> float:
        service = self._eager(WEIGHT_SWAP="off", LOAD_FORMAT=choice.value)
        seconds: list[float] = []
        for number in range(LOADS):
            name = self._models.large[number % 2]
            service.text(name)
            seconds.append(service.engine(name)["phases"]["weights"])
        return round(min(seconds), 3)

    def _transformers(self) -> Figures:
        service = self._services.get(**ONE, ENGINE="transformers")
        seconds, _ = service.first_token(self._models.base)
        again, _ = service.first_token(self._models.base)
        return {"first_load_s": round(seconds, 2), "first_token_s": round(again, 3)}

    def _eager(self, **settings: str) -> Measured:
        """For the largest models: their graphs say nothing about their weights."""
        return self._services.get(**ONE, ENGINE_EAGER="true", **settings)

    def _fresh_text(self, service: Measured, name: str) -> str:
        service.unload()
        return service.text(name)

    def _on_cuda(self) -> None:
        if self._device.kind is not DeviceKind.CUDA:
            raise NotHere("there is no GPU")


def _phases(engine: dict[str, Any]) -> dict[str, float]:
    return {f"{name}_s": round(seconds, 2) for name, seconds in engine["phases"].items() if seconds >= 0.1}


def _require(true: bool, otherwise: str) -> None:
    if not true:
        raise RuntimeError(otherwise)


def _is_ready(service: Measured, name: str) -> bool:
    found = [each for each in service.process.stats()["prepared"] if each["model"] == name]
    return any(each["ready_bytes"] is not None for each in found)


def _worst_gap(times: list[float], since: float, until: float) -> float:
    seen = [at for at in list(times) if since <= at <= until]
    return max((later - earlier for earlier, later in pairwise(seen)), default=0.0)


def _in_background(work: Callable[[], object]) -> Callable[[], None]:
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    return lambda: thread.join(300)


def _core(process_id: int) -> int:
    """The process that computes: the host's engine core, or the host itself."""
    children = psutil.Process(process_id).children()
    return children[0].pid if children else process_id


def _of(ours: list[Rate], theirs: list[Rate], value: Callable[[Rate], float]) -> float:
    return median([value(mine) / value(other) for mine, other in zip(ours, theirs, strict=True)])


def _qkv_bytes(checkpoint: Path) -> int:
    total = 0
    for path in checkpoint.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118
                if any(f".{part}_proj." in name for part in "qkv"):
                    tensor = file.get_tensor(name)
                    total += tensor.numel() * tensor.element_size()
    return total


def _gpu_bytes() -> int:
    import pynvml

    pynvml.nvmlInit()
    try:
        return int(pynvml.nvmlDeviceGetMemoryInfo(pynvml.nvmlDeviceGetHandleByIndex(0)).used)
    finally:
        pynvml.nvmlShutdown()


def _gib(count: int) -> float:
    return round(count / (1 << 30), 2)
