"""Swaps, adapters and rollouts through HTTP, over engines whose script says how they behave."""

import json
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx2
import pytest

from tests.fixtures.fakes import Fakes, ask
from tests.fixtures.service_process import ServiceProcess

KIN = {"swap_key": "kin"}
ONE = {"MAX_CACHED_MODELS": "1", "MIN_RESIDENCY": "0", "CATALOG_TTL": "0"}


def post(service: ServiceProcess, model: str, **fields: object) -> httpx2.Response:
    return service.http.post("/v1/completions", json=ask(model, **fields))


def put_adapter(fakes: Fakes, name: str, base: str, rank: int = 8, **script: object) -> None:
    directory = fakes.root / "models" / name
    directory.mkdir(parents=True, exist_ok=True)
    content = {"base_model_name_or_path": base, "r": rank, "peft_type": "LORA"}
    (directory / "adapter_config.json").write_text(json.dumps(content))
    (directory / "config.json").write_text(json.dumps({"fake": script}))
    (directory / "adapter_model.safetensors").write_bytes(name.encode() * 100)


def process_of(service: ServiceProcess, model: str) -> int:
    return int(service.engine(model)["process_id"])


def test_a_model_of_the_same_kind_takes_the_engine_over(fakes: Fakes) -> None:
    fakes.put("a", script=KIN)
    fakes.put("b", script=KIN)
    with fakes.service(**ONE) as service:
        assert post(service, "a").status_code == 200
        process = process_of(service, "a")
        answer = post(service, "b")
        assert (answer.status_code, answer.json()["model"]) == (200, "b")
        engine = service.engine("b")
        assert (engine["process_id"], engine["swapped"], engine["state"]) == (process, True, "ready")
        assert [each["model"] for each in service.stats()["engines"]] == ["b"]
        metrics = service.http.get("/metrics").text
        assert 'inference_swaps_total{model="b",status="ok"} 1.0' in metrics
        assert 'inference_load_phase_seconds_count{model="b",phase="weights"} 1.0' in metrics


def test_swaps_can_be_turned_off(fakes: Fakes) -> None:
    fakes.put("a", script=KIN)
    fakes.put("b", script=KIN)
    with fakes.service(**ONE, WEIGHT_SWAP="off") as service:
        post(service, "a")
        process = process_of(service, "a")
        assert post(service, "b").status_code == 200
        assert process_of(service, "b") != process


@pytest.mark.parametrize(
    "fault",
    [{"fail_swap": "no"}, {"wrong_weights": True}, {"die_in_swap": True}],
    ids=["error", "weight-check", "death"],
)
def test_a_swap_that_fails_is_a_fresh_engine_and_an_answer(fakes: Fakes, fault: dict[str, object]) -> None:
    fakes.put("a", script=KIN)
    fakes.put("b", script=KIN | fault)
    with fakes.service(**ONE) as service:
        post(service, "a")
        process = process_of(service, "a")
        assert post(service, "b").status_code == 200
        engine = service.engine("b")
        assert (engine["process_id"] != process, engine["swapped"]) == (True, False)
        assert 'inference_swaps_total{model="b",status="failed"} 1.0' in service.http.get("/metrics").text
        assert len(service.descendants()) == 2, "the launcher and one host"


def test_the_engine_after_a_failed_swap_takes_the_adapters_of_the_one_before(fakes: Fakes) -> None:
    fakes.put("a", script=KIN)
    put_adapter(fakes, "t", "a")
    fakes.put("b", script=KIN | {"fail_swap": "no"})
    with fakes.service(**ONE) as service:
        for model in ("t", "b", "t"):
            assert post(service, model).status_code == 200, model
        engine = service.engine("a")
        assert (engine["swapped"], engine["adapter_rank"]) == (True, 16)


def test_an_adapter_is_served_on_its_base(fakes: Fakes) -> None:
    fakes.put("base")
    put_adapter(fakes, "org/tuned", "someone/base", rank=8)
    with fakes.service() as service:
        answer = post(service, "org-tuned")
        assert (answer.status_code, answer.json()["model"]) == (200, "org-tuned")
        assert post(service, "base").json()["model"] == "base"
        engine = service.engine("base")
        assert [(each["model"], each["leases"]) for each in engine["adapters"]] == [("org-tuned", 0)]
        assert engine["adapter_rank"] == 16
        card = service.http.get("/v1/models/org-tuned").json()
        assert (card["kind"], card["parent"]) == ("adapter", "base")
        assert answer.headers["x-model-revision"] == card["revision"]
        gone = service.http.post("/admin/unload/org-tuned").json()
        assert gone == {"model": "org-tuned", "unloaded": True}
        assert service.engine("base")["adapters"] == []


def test_adapters_beyond_the_limit_give_way_when_idle(fakes: Fakes) -> None:
    fakes.put("base")
    for number in range(4):
        put_adapter(fakes, f"t{number}", "base")
    with fakes.service(MAX_ADAPTERS="2", MAX_CPU_ADAPTERS="2") as service:
        for number in (0, 1, 0, 2, 3):
            assert post(service, f"t{number}").status_code == 200
        assert [each["model"] for each in service.engine("base")["adapters"]] == ["t2", "t3"]


def test_an_adapter_that_came_after_its_base_was_loaded(fakes: Fakes) -> None:
    """The engine takes no adapters: another that does takes over, and nobody is turned away."""
    fakes.put("base")
    with fakes.service(**ONE) as service:
        assert post(service, "base").status_code == 200
        process = process_of(service, "base")
        put_adapter(fakes, "late", "base")
        service.wait_until(lambda: service.http.get("/v1/models/late").status_code == 200, 10)
        assert post(service, "late").status_code == 200
        assert process_of(service, "base") != process
        assert post(service, "base").status_code == 200
        assert len(service.stats()["engines"]) == 1


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"use_dora": True}, "DoRA"),
        ({"bias": "all"}, "bias"),
        ({"r": 1024}, "1024"),
        ({"base_model_name_or_path": "nobody/knows"}, "nobody/knows"),
        ({"base_model_name_or_path": None}, "names its base"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"peft_type": "IA3"}, "IA3"),
        ({"r": "eight"}, "rank"),
    ],
)
def test_an_adapter_that_cannot_be_served_is_told_why(
    fakes: Fakes, config: dict[str, object], words: str
) -> None:
    fakes.put("base")
    put_adapter(fakes, "odd", "base")
    file = fakes.root / "models" / "odd" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | config))
    with fakes.service() as service:
        answer = post(service, "odd")
        assert answer.status_code == 422
        assert words in answer.json()["error"]["message"]


def test_an_adapter_that_the_engine_refuses_is_told_why(fakes: Fakes) -> None:
    fakes.put("base")
    put_adapter(fakes, "odd", "base", fail_adapter="it is odd")
    with fakes.service() as service:
        answer = post(service, "odd")
        assert (answer.status_code, answer.json()["error"]["code"]) == (422, "adapter_refused")
        assert "it is odd" in answer.json()["error"]["message"]
        assert post(service, "base").status_code == 200
        assert service.stats()["leases"] == 0


class Crowd:
    """Clients that ask for one model without a pause; the status and revision of each answer."""

    def __init__(self, service: ServiceProcess, model: str) -> None:
        self.answers: list[tuple[int, str | None]] = []
        self._stop = threading.Event()
        self._service, self._model = service, model
        self._threads = [threading.Thread(target=self._run) for _ in range(4)]

    def __enter__(self) -> "Crowd":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def _run(self) -> None:
        while not self._stop.is_set():
            answer = post(self._service, self._model)
            self.answers.append((answer.status_code, answer.headers.get("x-model-revision")))

    @property
    def revision(self) -> str | None:
        """Of the last answer."""
        return self.answers[-1][1] if self.answers else None

    def goes_on(self) -> None:
        """Returns once a few more have been answered."""
        enough = len(self.answers) + 10
        self._service.wait_until(lambda: len(self.answers) >= enough, 10)


def revision(service: ServiceProcess, model: str) -> str:
    return str(service.http.get(f"/v1/models/{model}").json()["revision"])


@pytest.mark.parametrize("slots", ["1", "2"], ids=["in its place", "beside it"])
@pytest.mark.parametrize("script", [{}, KIN], ids=["loaded", "swapped"])
def test_a_new_revision_takes_over_under_load(fakes: Fakes, slots: str, script: dict[str, object]) -> None:
    fakes.put("m", script=script)
    with fakes.service(**ONE | {"MAX_CACHED_MODELS": slots}) as service, Crowd(service, "m") as crowd:
        service.wait_until(lambda: len(crowd.answers) > 10, 10)
        old = crowd.revision
        fakes.put("m", script=script, start_seconds=0.2)
        service.wait_until(lambda: crowd.revision not in (None, old), 20)
        crowd.goes_on()
        stats = service.stats()
        assert {status for status, _ in crowd.answers} == {200}
        assert stats["rollouts"]["m"]["previous"] == [old]
        service.wait_until(lambda: len(service.stats()["engines"]) == 1, 10)
        assert 'inference_rollouts_total{model="m",status="ok"} 1.0' in service.http.get("/metrics").text


@pytest.mark.parametrize("slots", ["1", "2"], ids=["in its place", "beside it"])
def test_a_new_revision_that_does_not_load_never_replaces_the_old_one(fakes: Fakes, slots: str) -> None:
    fakes.put("m")
    with fakes.service(**ONE | {"MAX_CACHED_MODELS": slots}) as service, Crowd(service, "m") as crowd:
        service.wait_until(lambda: len(crowd.answers) > 10, 10)
        old = crowd.revision
        fakes.put("m", fail_start="RuntimeError: broken weights")
        service.wait_until(lambda: bool(service.stats()["rollouts"].get("m", {}).get("rejected")), 20)
        rejected = service.stats()["rollouts"]["m"]
        assert (rejected["serving"], list(rejected["rejected"])) == (old, [revision(service, "m")])
        assert "broken weights" in next(iter(rejected["rejected"].values()))
        service.wait_until(lambda: crowd.revision == old, 10)
        crowd.goes_on()
        assert set(crowd.answers) == {(200, old)}
        metrics = service.http.get("/metrics").text
        assert 'inference_rollouts_total{model="m",status="rejected"} 1.0' in metrics


def test_back_to_the_previous_revision_and_on_to_the_next(fakes: Fakes) -> None:
    fakes.put("m")
    with fakes.service(**ONE) as service:
        first = post(service, "m").headers["x-model-revision"]
        assert service.http.post("/admin/rollback/m").status_code == 409, "there is none"
        fakes.put("m", start_seconds=0.01)
        service.wait_until(lambda: post(service, "m").headers["x-model-revision"] != first, 20)
        second = revision(service, "m")
        answer = service.http.post("/admin/rollback/m").json()
        assert (answer["revision"], answer["state"]) == (first, "ready")
        assert post(service, "m").headers["x-model-revision"] == first
        assert post(service, f"m@{second}").headers["x-model-revision"] == second
        time.sleep(2.5)
        assert post(service, "m").headers["x-model-revision"] == first, "it does not come back by itself"
        assert service.http.post("/admin/rollback/m").status_code == 409
        fakes.put("m", start_seconds=0.02)
        service.wait_until(lambda: post(service, "m").headers["x-model-revision"] not in (first, second), 20)


def test_an_older_revision_is_addressed_while_its_snapshot_is_on_the_disk(
    fakes: Fakes, tmp_path: Path
) -> None:
    fakes.put("m")
    with fakes.service(**ONE) as service:
        first = post(service, "m").headers["x-model-revision"]
        fakes.put("m", start_seconds=0.01)
    with fakes.service(**ONE) as service:
        assert post(service, "m").headers["x-model-revision"] != first
        assert post(service, f"m@{first}").headers["x-model-revision"] == first
        assert post(service, "m@0123456789ab").status_code == 404
        service.http.post("/admin/unload/m")
        for snapshot in (tmp_path / "cache" / "m" / first).iterdir():
            snapshot.unlink()
        assert post(service, f"m@{first}").status_code == 404


def test_a_new_revision_of_an_adapter(fakes: Fakes) -> None:
    fakes.put("base")
    put_adapter(fakes, "t", "base")
    with fakes.service(**ONE) as service, Crowd(service, "t") as crowd:
        service.wait_until(lambda: len(crowd.answers) > 5, 10)
        old, process = crowd.revision, process_of(service, "base")
        put_adapter(fakes, "t", "base", rank=4)
        service.wait_until(lambda: crowd.revision not in (None, old), 20)
        assert {status for status, _ in crowd.answers} == {200}
        assert process_of(service, "base") == process
        put_adapter(fakes, "t", "base", fail_adapter="no")
        service.wait_until(lambda: bool(service.stats()["rollouts"]["t"]["rejected"]), 20)
        crowd.goes_on()
        assert {status for status, _ in crowd.answers} == {200}


def test_one_revision_of_an_adapter_follows_its_base(fakes: Fakes) -> None:
    fakes.put("base")
    put_adapter(fakes, "t", "base")
    with fakes.service(**ONE) as service:
        exact = f"t@{post(service, 't').headers['x-model-revision']}"
        old = revision(service, "base")
        with Crowd(service, exact) as crowd:
            service.wait_until(lambda: len(crowd.answers) > 5, 10)
            # So long the old base drains, and those who come meanwhile wait for it.
            stream = threading.Thread(target=lambda: post(service, "base", max_tokens=60))
            stream.start()
            fakes.put("base", start_seconds=0.2)
            service.wait_until(lambda: post(service, exact).headers["x-base-revision"] != old, 20)
            stream.join()
            crowd.goes_on()
            assert {status for status, _ in crowd.answers} == {200}


def test_the_files_come_while_another_model_serves(fakes: Fakes) -> None:
    """One slot: the engine that serves goes on until the other's files are there."""
    fakes.put("a", script=KIN)
    fakes.put("b", script=KIN)
    with fakes.service(**ONE) as service:
        post(service, "a")
        stream = threading.Thread(target=lambda: post(service, "a", max_tokens=60))
        stream.start()
        assert post(service, "b").status_code == 200
        stream.join()
        assert not (service.stats()["leases"])


def test_a_request_that_is_refused_fetches_nothing(fakes: Fakes, tmp_path: Path) -> None:
    fakes.put("pinned", serving={"pinned": True})
    fakes.put("other")
    with fakes.service(**ONE) as service:
        post(service, "pinned")
        assert post(service, "other").json()["error"]["code"] == "no_room"
        time.sleep(0.3)
        assert not (tmp_path / "cache" / "other").exists()


def test_a_half_uploaded_adapter_leaves_the_one_that_serves(fakes: Fakes) -> None:
    fakes.put("base")
    put_adapter(fakes, "t", "base")
    with fakes.service(**ONE) as service:
        served = post(service, "t").headers["x-model-revision"]
        (fakes.root / "models" / "t" / "adapter_model.safetensors").unlink()
        service.wait_until(lambda: "t" in service.stats()["unservable"], 10)
        answer = post(service, "t")
        assert (answer.status_code, answer.headers["x-model-revision"]) == (200, served)
        assert [each["model"] for each in service.stats()["engines"]] == ["base"]


def test_an_older_revision_of_an_adapter_keeps_its_base(fakes: Fakes) -> None:
    fakes.put("a")
    fakes.put("b")
    put_adapter(fakes, "t", "a", rank=64)
    with fakes.service(**ONE | {"MAX_CACHED_MODELS": "2"}) as service:
        first = post(service, "t")
        assert first.headers["x-base-revision"] == revision(service, "a")
        put_adapter(fakes, "t", "b", rank=8)
        old = first.headers["x-model-revision"]
        service.wait_until(lambda: revision(service, "t") != old, 10)
        service.http.post("/admin/unload/a")
        answer = post(service, f"t@{old}")
        assert (answer.status_code, answer.headers["x-base-revision"]) == (200, revision(service, "a"))


def test_an_adapter_goes_on_while_its_base_is_uploaded(fakes: Fakes) -> None:
    fakes.put("base")
    put_adapter(fakes, "t", "base")
    with fakes.service(**ONE) as service:
        assert post(service, "t").status_code == 200
        (fakes.root / "models" / "base" / "tokenizer.json").unlink()
        service.wait_until(lambda: "base" in service.stats()["unservable"], 10)
        assert [post(service, name).status_code for name in ("base", "t")] == [200, 200]


def test_what_is_on_the_disk_serves_where_the_newest_upload_cannot(fakes: Fakes) -> None:
    fakes.put("m")
    with fakes.service(**ONE) as service:
        served = post(service, "m").headers["x-model-revision"]
    (fakes.root / "models" / "m" / "tokenizer.json").unlink()
    with fakes.service(**ONE) as service:
        answer = post(service, "m")
        assert (answer.status_code, answer.headers["x-model-revision"]) == (200, served)
        assert service.stats()["rollouts"]["m"]["serving"] == served


def test_an_adapter_asked_first_finds_the_base_that_serves(fakes: Fakes) -> None:
    fakes.put("base")
    put_adapter(fakes, "t", "base")
    with fakes.service(**ONE) as service:
        served = post(service, "t").headers["x-base-revision"]
    (fakes.root / "models" / "base" / "tokenizer.json").unlink()
    with fakes.service(**ONE) as service:
        answer = post(service, "t")
        assert (answer.status_code, answer.headers["x-base-revision"]) == (200, served)


def test_an_adapter_is_not_at_fault_for_its_base(fakes: Fakes) -> None:
    fakes.put("base")
    put_adapter(fakes, "t", "base")
    with fakes.service(**ONE) as service:
        served = post(service, "t")
        service.http.post("/admin/unload/base")
        fakes.put("base", fail_start="RuntimeError: broken weights")
        put_adapter(fakes, "t", "base", rank=4)
        service.wait_until(lambda: revision(service, "base") != served.headers["x-base-revision"], 10)
        answer = post(service, "t")
        assert answer.status_code == 200
        assert answer.headers["x-base-revision"] == served.headers["x-base-revision"]
        assert answer.headers["x-model-revision"] == revision(service, "t")
        assert not service.stats()["rollouts"]["t"]["rejected"]


def test_what_was_replaced_since_it_was_listed_is_served_at_once(fakes: Fakes) -> None:
    fakes.put("m")
    with fakes.service(**ONE | {"CATALOG_TTL": "60"}) as service:
        old = revision(service, "m")
        fakes.put("m", start_seconds=0.01)
        answer = post(service, "m")
        assert answer.status_code == 200
        assert answer.headers["x-model-revision"] != old


def test_a_pinned_adapter_keeps_its_bases_engine(fakes: Fakes) -> None:
    fakes.put("base")
    fakes.put("other")
    put_adapter(fakes, "t", "base")
    with fakes.service(**ONE) as service:
        post(service, "t")
        service.http.post("/admin/pin/t")
        assert service.engine("base")["pinned"]
        assert post(service, "other").json()["error"]["code"] == "no_room"
        service.http.post("/admin/unload/t")
        assert post(service, "other").status_code == 200


def test_what_serves_is_listed_while_its_newest_upload_cannot_be_served(fakes: Fakes) -> None:
    fakes.put("m")
    with fakes.service(**ONE) as service:
        served = post(service, "m").headers["x-model-revision"]
        (fakes.root / "models" / "m" / "tokenizer.json").unlink()
        service.wait_until(lambda: "m" in service.stats()["unservable"], 10)
        (card,) = service.http.get("/v1/models").json()["data"]
        assert (card["id"], card["serving_revision"]) == ("m", served) != (card["id"], card["revision"])
        assert service.http.get("/v1/models/m").json()["serving_revision"] == served
        service.http.post("/admin/unload/m")


def test_rollbacks_at_once_are_one(fakes: Fakes) -> None:
    fakes.put("m")
    with fakes.service(**ONE) as service:
        first = post(service, "m").headers["x-model-revision"]
        fakes.put("m", start_seconds=0.01)
        service.wait_until(lambda: post(service, "m").headers["x-model-revision"] != first, 20)
        answers: list[httpx2.Response] = []

        def roll_back() -> None:
            answers.append(service.http.post("/admin/rollback/m"))

        threads = [threading.Thread(target=roll_back) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert {(each.status_code, each.json().get("revision")) for each in answers} == {(200, first)}
        assert post(service, "m").headers["x-model-revision"] == first
        assert [each["state"] for each in service.stats()["engines"]] == ["ready"]


def test_a_stream_that_waits_through_a_rollout_is_answered(fakes: Fakes) -> None:
    """It was opened before its revision was decided, and names it in a comment then."""
    fakes.put("m")
    settings = ONE | {"COLD_START_GRACE": "0.2", "MAX_CONCURRENT_REQUESTS": "1"}
    with fakes.service(**settings) as service:
        old = post(service, "m").headers["x-model-revision"]
        fakes.put("m", start_seconds=1.5)
        texts: list[str] = []

        def stream() -> None:
            body = ask("m", stream=True, max_tokens=10)
            texts.append(service.http.post("/v1/completions", json=body).text)

        deadline = time.monotonic() + 20
        while not any(": x-model-revision" in text and old not in text for text in texts):
            assert time.monotonic() < deadline, texts[-1]
            threads = [threading.Thread(target=stream) for _ in range(4)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        assert all(text.endswith("data: [DONE]\n\n") for text in texts)


def test_an_engine_that_goes_while_an_adapter_comes_is_an_explained_error(fakes: Fakes) -> None:
    fakes.put("base")
    put_adapter(fakes, "t", "base")
    (fakes.root / "models" / "t" / "adapter_model.safetensors").write_bytes(b"x" * 300_000_000)
    with fakes.service(**ONE) as service:
        post(service, "base")
        answers: list[httpx2.Response] = []
        asking = threading.Thread(target=lambda: answers.append(post(service, "t")))
        asking.start()
        service.wait_until(lambda: bool(service.stats()["syncs"]) or bool(answers), 10)
        service.http.post("/admin/unload/base?force=true")
        asking.join()
        assert answers[0].status_code in (200, 503)
        assert "Traceback" not in service.log_text()


def prepared(service: ServiceProcess) -> list[dict[str, object]]:
    return list(service.stats()["prepared"])


def ready(service: ServiceProcess) -> list[tuple[object, object]]:
    return [(each["model"], each["ready_bytes"]) for each in prepared(service)]


def test_a_requested_model_is_prepared_while_its_engine_serves(fakes: Fakes) -> None:
    for name in ("a", "b", "c"):
        fakes.put(name, script=KIN)
    with fakes.service(**ONE, FAIRNESS_WAIT="1000", HOST_CACHE_GIB="0") as service:
        with Busy(service, "a"):
            waiting = in_background(post, service, "b")
            service.wait_until(lambda: [each["ready_bytes"] for each in prepared(service)] == [1], 20)
            (shown,) = prepared(service)
            assert (shown["model"], shown["wanted"], shown["refused"]) == ("b", True, None)
            assert service.engine("a")["state"] == "ready", "it serves meanwhile"
        assert waiting().status_code == 200
        assert service.engine("b")["copied_from"] == {"prepared": 1}
        service.wait_until(lambda: prepared(service) == [], 20)
        assert post(service, "c").status_code == 200
        assert service.engine("c")["copied_from"] == {"mapped": 1}, "nothing was in its way"
        metrics = service.http.get("/metrics").text
        assert 'inference_swap_bytes_total{model="b",source="prepared"} 1.0' in metrics
        assert 'inference_preparations_total{model="b",status="ready"} 1.0' in metrics


def test_what_the_host_cache_keeps_is_there_for_the_next_swap(fakes: Fakes) -> None:
    for name in ("a", "b"):
        fakes.put(name, script=KIN)
    with fakes.service(**ONE, HOST_CACHE_GIB="1") as service:
        for name, copied_from in (
            ("a", {}),
            ("b", {"mapped": 1}),
            ("a", {"prepared": 1}),
            ("b", {"prepared": 1}),
        ):
            assert post(service, name).status_code == 200
            assert service.engine(name)["copied_from"] == copied_from
            if copied_from:
                service.wait_until(lambda: ("b" if name == "a" else "a", 1) in ready(service), 20)  # noqa: B023


def test_a_model_that_is_not_waited_for_any_more_is_given_up(fakes: Fakes) -> None:
    fakes.put("a", script=KIN)
    fakes.put("b", script=KIN | {"prepare_seconds": 1000})
    with fakes.service(**ONE, FAIRNESS_WAIT="1000") as service, Busy(service, "a"):
        left: list[bool] = []

        def ask_and_leave() -> None:
            with pytest.raises(httpx2.ReadTimeout):
                service.http.post("/v1/completions", json=ask("b"), timeout=6)
            left.append(True)

        asking = threading.Thread(target=ask_and_leave)
        asking.start()
        service.wait_until(lambda: [each["model"] for each in prepared(service)] == ["b"], 20)
        asking.join()
        assert left
        service.wait_until(lambda: prepared(service) == [], 20)
        assert service.engine("a")["leases"] == 1


def test_two_models_are_prepared_at_once_and_a_refusal_changes_no_answer(fakes: Fakes) -> None:
    fakes.put("a", script=KIN)
    fakes.put("b", script=KIN | {"refuse_prepare": "the driver says no"})
    fakes.put("c", script=KIN)
    with fakes.service(**ONE, FAIRNESS_WAIT="1000") as service:
        with Busy(service, "a"):
            waiting = [in_background(post, service, name) for name in ("b", "c")]
            service.wait_until(lambda: dict(ready(service)) == {"b": 0, "c": 1}, 20)
            refused = {each["model"]: each["refused"] for each in prepared(service)}
            assert refused == {"b": "the driver says no", "c": None}
        assert [each().status_code for each in waiting] == [200, 200]
        assert (
            'inference_preparations_total{model="b",status="refused"} 1.0'
            in service.http.get("/metrics").text
        )


def test_an_engine_that_dies_or_is_unloaded_while_it_prepares(fakes: Fakes) -> None:
    fakes.put("a", script=KIN)
    fakes.put("b", script=KIN | {"prepare_seconds": 1000})
    with fakes.service(**ONE, FAIRNESS_WAIT="1000") as service:
        for end in ("kill", "unload"):
            with Busy(service, "a"):
                waiting = in_background(post, service, "b")
                service.wait_until(lambda: len(prepared(service)) == 1, 20)
                if end == "kill":
                    os.kill(process_of(service, "a"), signal.SIGKILL)
                else:
                    service.http.post("/admin/unload/a?force=true").raise_for_status()
                assert waiting().status_code == 200, end
            assert prepared(service) == []
            assert post(service, "a").status_code == 200


def test_an_engine_gives_up_what_it_prepared_for_a_model_that_another_loads(fakes: Fakes) -> None:
    for name in ("a", "x", "b"):
        fakes.put(name, script=KIN if name != "x" else {})
    settings = ONE | {"MAX_CACHED_MODELS": "2", "FAIRNESS_WAIT": "1000"}
    with fakes.service(**settings) as service, Busy(service, "a"), Busy(service, "x"):
        waiting = in_background(post, service, "b")
        service.wait_until(lambda: ready(service) == [("b", 1)], 20)
        service.http.post("/admin/unload/x?force=true").raise_for_status()
        assert waiting().status_code == 200
        assert not service.engine("b")["swapped"]
        service.wait_until(lambda: prepared(service) == [], 20)


class Busy:
    """A stream of `model` that goes on until the end of the block."""

    def __init__(self, service: ServiceProcess, model: str) -> None:
        self._stream = service.http.stream(
            "POST", "/v1/completions", json=ask(model, stream=True, max_tokens=1_000_000)
        )

    def __enter__(self) -> None:
        self._chunks = self._stream.__enter__().iter_bytes()  # the connection closes with it
        next(self._chunks)

    def __exit__(self, *_: object) -> None:
        self._stream.__exit__(None, None, None)


def in_background(work: Callable[..., httpx2.Response], *arguments: Any) -> Callable[[], httpx2.Response]:
    """Starts it; the result waits for its end."""
    found: list[httpx2.Response] = []
    thread = threading.Thread(target=lambda: found.append(work(*arguments)))
    thread.start()

    def result() -> httpx2.Response:
        thread.join(60)
        return found[0]

    return result
