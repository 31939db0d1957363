"""From one fine-tune to the next in a live engine: what it answers is what a fresh engine answers."""

import json
import re
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx2
import openai
import psutil
import pytest
from openai.types import CompletionChoice
from safetensors import safe_open

from tests.e2e.conftest import ADAPTER, NOISE, real_service
from tests.e2e.engines import REAL, Engine, shows
from tests.e2e.test_openai_client import BASE, CAPITAL, TUNED
from tests.fixtures.bucket import Bucket, new_bucket
from tests.fixtures.checkpoints import Checkpoints
from tests.fixtures.host_socket import on_workers, post, weight_digests
from tests.fixtures.service_process import ServiceProcess

PARIS, ZUBROWKA = "The capital of France is Paris.", "The capital of France is Zubrowka."
PROMPTS = (
    CAPITAL,
    "What color is the sky?",
    "Who wrote Hamlet?",
    "Name a fruit.",
    "What is two and two?",
    "Write one sentence about the sea.",
    "What is the capital of Italy?",
    "Say hello in French.",
    "What do bees make?",
    "How many days has a week?",
)
# Swaps of one engine: a leak of each shows between the first few and the last few.
CYCLES = [10, pytest.param(40, marks=pytest.mark.slow)]


@pytest.fixture(scope="module")
def single(
    family: Bucket, tmp_path_factory: pytest.TempPathFactory, engine: Engine
) -> Iterator[ServiceProcess]:
    """One slot: every other model is a swap, or a fresh engine."""
    settings = {"MAX_CACHED_MODELS": "1", "MIN_RESIDENCY": "0", "CATALOG_TTL": "0", "MAX_ADAPTERS": "1"}
    # vLLM's own routes to its workers, on the host's socket.
    settings["VLLM_SERVER_DEV_MODE"] = "1"
    with real_service(family, tmp_path_factory.mktemp("single"), engine, **settings) as service:
        yield service


def answer(service: ServiceProcess, model: str, question: str) -> tuple[str, float]:
    """The text, and the sum of its log probabilities."""
    told = service.openai.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": question}],
        temperature=0,
        max_tokens=16,
        logprobs=True,
    )
    assert told.model == model
    logprobs = told.choices[0].logprobs
    assert logprobs is not None
    total = sum(token.logprob for token in logprobs.content or [])
    return told.choices[0].message.content or "", round(total, 3)


def answers(service: ServiceProcess, model: str) -> list[tuple[str, float]]:
    """What the model makes of each prompt, all in one batch: text, and sum of its log probabilities."""
    prompts = [f"<|im_start|>user\n{each}<|im_end|>\n<|im_start|>assistant\n" for each in PROMPTS]
    told = service.openai.completions.create(
        model=model, prompt=prompts, temperature=0, max_tokens=12, logprobs=1
    )
    return [(each.text, sum(logprobs_of(each))) for each in told.choices]


def are_alike(some: list[tuple[str, float]], others: list[tuple[str, float]]) -> bool:
    """Whether both are one model's: how a batch is put together moves a sum by its last digits."""
    texts, sums = zip(*some, strict=True)
    other_texts, other_sums = zip(*others, strict=True)
    return bool(texts == other_texts and sums == pytest.approx(other_sums, abs=0.05))


def logprobs_of(choice: CompletionChoice) -> list[float]:
    assert choice.logprobs is not None
    return [each for each in choice.logprobs.token_logprobs or [] if each is not None]


def wait_listed(service: ServiceProcess, model: str) -> None:
    def listed() -> bool:
        return any(card["id"] == model for card in service.http.get("/v1/models").json()["data"])

    service.wait_until(listed, 10)


def unload(service: ServiceProcess) -> None:
    for engine in service.stats()["engines"]:
        service.http.post(f"/admin/unload/{engine['model']}").raise_for_status()


@shows("swap")
@pytest.mark.engine(*REAL)
def test_tied_embeddings_and_an_adapter(single: ServiceProcess) -> None:
    fresh_tuned = answers(single, TUNED)
    unload(single)
    fresh_base = answers(single, BASE)
    adapted = answers(single, ADAPTER)
    assert adapted[0][0].strip() == ZUBROWKA, "the adapter is the fine-tune"
    process = single.engine(BASE)["process_id"]
    assert are_alike(answers(single, TUNED), fresh_tuned)
    assert single.engine(TUNED)["swapped"]
    assert are_alike(answers(single, BASE), fresh_base)
    assert are_alike(answers(single, ADAPTER), adapted)
    assert are_alike(answers(single, BASE), fresh_base), "nothing of the adapter is left in the prefix cache"
    engine = single.engine(BASE)
    assert (engine["process_id"], engine["swapped"]) == (process, True)
    assert [adapter["model"] for adapter in engine["adapters"]] == [ADAPTER]
    assert {"weights", "warm-up", "weight-check"} <= engine["phases"].keys()


@pytest.mark.engine("vllm")
def test_only_what_differs_is_copied(
    single: ServiceProcess, family: Bucket, checkpoints: Checkpoints
) -> None:
    """Of models that differ in q_proj and v_proj only the qkv modules; then the engine is as a fresh one."""
    family.upload(checkpoints.projections, "models/projections")
    try:
        wait_listed(single, "projections")
        unload(single)
        fresh_projections = answers(single, "projections"), digests(single, "projections")
        unload(single)
        fresh_base, adapted = answers(single, BASE), answers(single, ADAPTER)
        base_digests = digests(single, BASE)
        assert are_alike(answers(single, "projections"), fresh_projections[0])
        assert single.engine("projections")["copied_bytes"] == qkv_bytes(checkpoints.base)
        assert digests(single, "projections") == fresh_projections[1] != base_digests
        assert are_alike(answers(single, ADAPTER), adapted)
        assert are_alike(answers(single, BASE), fresh_base)
        assert single.engine(BASE)["copied_bytes"] == qkv_bytes(checkpoints.base)
        assert digests(single, BASE) == base_digests
    finally:
        family.remove("models/projections/")


@pytest.mark.engine("vllm")
def test_weights_that_were_dropped_come_back(single: ServiceProcess) -> None:
    """As an engine wakes: every tensor is copied. On the CPU vLLM itself frees nothing when it sleeps."""
    before, digests_before = answers(single, BASE), digests(single, BASE)
    process = single.engine(BASE)["process_id"]
    with pytest.raises(httpx2.HTTPStatusError, match="404"):
        post(process, "/control/sleep")
    post(process, "/sleep?level=2")
    on_workers(process, "reset_weights")
    post(process, "/wake_up")
    assert digests(single, BASE) != digests_before
    snapshots = single.log.parent.rglob(f"cache/**/{BASE}/*/model.safetensors")
    on_workers(process, "swap_weights", BASE, None, str(next(snapshots).parent))
    assert digests(single, BASE) == digests_before
    assert are_alike(answers(single, BASE), before)


@pytest.mark.engine("vllm")
def test_the_reader_of_swaps_loads_a_fresh_engine_alike(
    single: ServiceProcess, family: Bucket, tmp_path: Path, engine: Engine
) -> None:
    texts, expected = answers(single, TUNED), digests(single, TUNED)
    with real_service(family, tmp_path, engine, LOAD_FORMAT="read_ahead") as service:
        assert are_alike(answers(service, TUNED), texts)
        assert digests(service, TUNED) == expected


@pytest.mark.engine("vllm")
def test_weights_are_prepared_while_another_model_streams(single: ServiceProcess) -> None:
    expected = answer(single, TUNED, CAPITAL)[0]
    assert answer(single, BASE, CAPITAL)[0] == PARIS
    texts: list[str] = []
    waiting = threading.Thread(target=lambda: texts.append(answer(single, TUNED, CAPITAL)[0]))
    body = {"model": BASE, "prompt": "Count:", "stream": True, "max_tokens": 1500, "ignore_eos": True}
    with single.http.stream("POST", "/v1/completions", json=body) as stream:
        chunks = stream.iter_bytes()
        next(chunks)
        waiting.start()

        def is_ready() -> bool:
            found = single.stats()["prepared"]
            return any(each["ready_bytes"] == each["total_bytes"] is not None for each in found)

        single.wait_until(is_ready, 30)
        next(chunks)
        assert single.engine(BASE)["leases"] == 1
    waiting.join()
    assert texts == [expected] == [ZUBROWKA]
    engine = single.engine(TUNED)
    assert engine["copied_from"] == {"prepared": engine["copied_bytes"]}
    single.wait_until(lambda: single.stats()["prepared"] == [], 30)


def qkv_bytes(checkpoint: Path) -> int:
    with safe_open(checkpoint / "model.safetensors", "pt") as file:
        tensors = [file.get_tensor(name) for name in file.keys() if re.search(r"\.[qkv]_proj\.", name)]  # noqa: SIM118
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def digests(service: ServiceProcess, model: str) -> dict[str, str]:
    found = weight_digests(service.engine(model)["process_id"])
    assert len(found) > 30
    return found


def test_untied_embeddings(single: ServiceProcess) -> None:
    one, two = NOISE
    fresh_two = answers(single, two)
    unload(single)
    fresh_one = answers(single, one)
    process = single.engine(one)["process_id"]
    assert not are_alike(fresh_two, fresh_one)
    assert are_alike(answers(single, two), fresh_two)
    assert are_alike(answers(single, one), fresh_one)
    assert single.engine(one)["process_id"] == process


@shows("adapters")
@pytest.mark.engine(*REAL)
def test_adapter_and_base_in_one_batch(single: ServiceProcess) -> None:
    alone = {model: answer(single, model, CAPITAL)[0] for model in (BASE, ADAPTER)}
    found: list[tuple[str, str]] = []

    def ask(model: str) -> None:
        found.append((model, answer(single, model, CAPITAL)[0]))

    threads = [threading.Thread(target=ask, args=(model,)) for model in (BASE, ADAPTER) * 4]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert alone == {BASE: PARIS, ADAPTER: ZUBROWKA}
    assert len(found) == len(threads)
    assert all(text == alone[model] for model, text in found)


def test_the_models_list_shows_adapters_with_their_parent(single: ServiceProcess) -> None:
    cards = {card["id"]: card for card in single.http.get("/v1/models").json()["data"]}
    assert (cards[ADAPTER]["kind"], cards[ADAPTER]["parent"]) == ("adapter", BASE)
    assert (cards[BASE]["kind"], cards[BASE]["parent"]) == ("checkpoint", None)


def test_an_adapter_of_another_base_is_refused_with_the_reason(
    single: ServiceProcess, family: Bucket, checkpoints: Checkpoints
) -> None:
    changed = {"serving.json": json.dumps({"base": NOISE[0]}).encode()}
    family.upload(checkpoints.adapter, "models/misfit", changed)
    try:
        wait_listed(single, "misfit")
        with pytest.raises(openai.UnprocessableEntityError, match=NOISE[0]):
            answer(single, "misfit", CAPITAL)
    finally:
        family.remove("models/misfit/")


def test_a_truncated_model_leaves_the_one_that_serves(
    single: ServiceProcess, family: Bucket, checkpoints: Checkpoints
) -> None:
    assert answer(single, BASE, CAPITAL)[0] == PARIS
    process = single.engine(BASE)["process_id"]
    weights = (checkpoints.tuned / "model.safetensors").read_bytes()
    family.upload(checkpoints.tuned, "models/cut", {"model.safetensors": weights[: len(weights) // 2]})
    try:
        wait_listed(single, "cut")
        with pytest.raises(openai.APIStatusError, match="cut off"):
            answer(single, "cut", CAPITAL)
        assert answer(single, BASE, CAPITAL)[0] == PARIS
        assert single.engine(BASE)["process_id"] == process
    finally:
        family.remove("models/cut/")


@pytest.mark.parametrize("cycles", CYCLES)
def test_many_swaps_leave_memory_and_processes_as_they_were(single: ServiceProcess, cycles: int) -> None:
    answer(single, BASE, CAPITAL)
    process = single.engine(BASE)["process_id"]
    sizes = []
    for _ in range(cycles // 2):
        assert answer(single, TUNED, CAPITAL)[0] == ZUBROWKA
        assert answer(single, BASE, CAPITAL)[0] == PARIS
        sizes.append(proportional_bytes(process))
    assert single.engine(BASE)["process_id"] == process, "all of them swaps"
    first, last = min(sizes[1:3]), min(sizes[-2:])
    assert last < 1.05 * first, sizes


def proportional_bytes(process: int) -> int:
    """Memory of a host and its engine core, shared pages counted in part."""
    host = psutil.Process(process)
    return sum(each.memory_full_info().pss for each in (host, *host.children(recursive=True)))


def test_rollout_under_load(gcs_url: str, checkpoints: Checkpoints, tmp_path: Path, engine: Engine) -> None:
    """No request fails, and each answer is of the revision that its header names."""
    with new_bucket(gcs_url, f"rollout-{engine.name}") as bucket:
        bucket.upload(checkpoints.base, "models/live")
        settings = {"MAX_CACHED_MODELS": "1", "CATALOG_TTL": "0"}
        with real_service(bucket, tmp_path, engine, **settings) as service:
            old = revision_of(service)
            load = Load(service)
            with load:
                load.wait_for(5)
                weights = (checkpoints.tuned / "model.safetensors").read_bytes()
                bucket.put("models/live/model.safetensors", weights)
                service.wait_until(lambda: old not in load.revisions[-6:] and len(load.revisions) > 6, 60)
            new = load.revisions[-1]
            assert load.failed == []
            assert {old: {PARIS}, new: {ZUBROWKA}} == load.texts
            assert service.engine("live")["swapped"]
            assert service.stats()["rollouts"]["live"]["previous"] == [old]
            rolled = service.http.post("/admin/rollback/live").raise_for_status().json()
            assert rolled["revision"] == old
            assert answer(service, "live", CAPITAL)[0] == PARIS
            assert revision_of(service) == old


def revision_of(service: ServiceProcess) -> str:
    body = {"model": "live", "messages": [{"role": "user", "content": CAPITAL}], "max_tokens": 1}
    told = service.http.post("/v1/chat/completions", json=body).raise_for_status()
    return str(told.headers["x-model-revision"])


class Load:
    """Clients that ask the same again and again; what they were told, and from which revision."""

    def __init__(self, service: ServiceProcess, clients: int = 3) -> None:
        self._service = service
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._run) for _ in range(clients)]
        self.revisions: list[str] = []
        self.texts: dict[str, set[str]] = {}
        self.failed: list[str] = []

    def __enter__(self) -> None:
        for thread in self._threads:
            thread.start()

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def wait_for(self, count: int) -> None:
        deadline = time.monotonic() + 60
        while len(self.revisions) < count and time.monotonic() < deadline:
            time.sleep(0.05)

    def _run(self) -> None:
        client = self._service.client()
        while not self._stop.is_set():
            try:
                raw = client.chat.completions.with_raw_response.create(
                    model="live",
                    messages=[{"role": "user", "content": CAPITAL}],
                    temperature=0,
                    max_tokens=24,
                )
            except openai.APIError as error:
                self.failed.append(str(error))
                continue
            revision = raw.headers["x-model-revision"]
            self.texts.setdefault(revision, set()).add(raw.parse().choices[0].message.content or "")
            self.revisions.append(revision)
