"""The scheduler's numbered cases, each a plain call."""

from inference_service.engines.base import EngineState
from inference_service.pool.scheduler import (
    Action,
    EngineView,
    Evict,
    Grant,
    Load,
    WaiterView,
    decide,
)

READY, STARTING, STOPPING = EngineState.READY, EngineState.STARTING, EngineState.STOPPING


def engine(key: str, state: EngineState = READY, leases: int = 0, used: int = 0) -> EngineView:
    return EngineView(key, state, leases, used)


def waiting(*keys: str) -> list[WaiterView]:
    return [WaiterView(number, key) for number, key in enumerate(keys, start=1)]


def plan(
    engines: list[EngineView], waiters: list[WaiterView], slots: int = 2, concurrency: int = 10
) -> list[Action]:
    return decide(engines, waiters, slots=slots, concurrency=concurrency)


def test_nothing_to_do() -> None:
    assert plan([], []) == []
    assert plan([engine("a"), engine("b", leases=1)], []) == []


def test_1_a_ready_engine_is_granted_to_the_oldest_first() -> None:
    assert plan([engine("a")], waiting("a", "a")) == [Grant(1, "a"), Grant(2, "a")]


def test_1_concurrency_bounds_the_leases_of_all_engines() -> None:
    engines = [engine("a", leases=2), engine("b", leases=1)]
    assert plan(engines, waiting("a", "b", "a"), concurrency=4) == [Grant(1, "a")]
    assert plan(engines, waiting("a", "b", "a"), concurrency=3) == []


def test_1_warm_models_do_not_wait_behind_a_load() -> None:
    engines = [engine("cold", STARTING), engine("warm")]
    assert plan(engines, waiting("cold", "warm")) == [Grant(2, "warm")]


def test_2_a_load_is_joined() -> None:
    assert plan([engine("a", STARTING)], waiting("a", "a", "a")) == []


def test_3_one_load_per_model_into_free_slots_oldest_waiter_first() -> None:
    assert plan([], waiting("a", "a", "b", "c")) == [Load("a"), Load("b")]


def test_4_the_least_recently_used_idle_engine_gives_way() -> None:
    engines = [engine("new", used=9), engine("old", used=3)]
    assert plan(engines, waiting("c")) == [Evict("old")]


def test_4_one_eviction_per_wanted_model() -> None:
    engines = [engine("a", used=1), engine("b", used=2), engine("c", used=3)]
    assert plan(engines, waiting("x", "x", "y"), slots=3) == [Evict("a"), Evict("b")]


def test_4_an_engine_that_stops_already_is_waited_for() -> None:
    engines = [engine("a", STOPPING), engine("b", used=2)]
    assert plan(engines, waiting("x")) == []
    assert plan(engines, waiting("x", "y")) == [Evict("b")]


def test_4_an_engine_that_somebody_waits_for_is_no_victim() -> None:
    engines = [engine("a", used=1), engine("b", leases=3, used=2)]
    assert plan(engines, waiting("a", "c"), concurrency=3) == []


def test_4_an_engine_granted_in_the_same_step_is_no_victim() -> None:
    assert plan([engine("a")], waiting("a", "b"), slots=1) == [Grant(1, "a")]


def test_5_an_engine_with_leases_is_never_torn_down() -> None:
    engines = [engine("a", leases=1), engine("b", STARTING)]
    assert plan(engines, waiting("c")) == []


def test_5_a_draining_engine_takes_nobody() -> None:
    assert plan([engine("a", EngineState.DRAINING, leases=1)], waiting("a"), slots=1) == []
