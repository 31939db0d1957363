"""The scheduler's numbered cases, each a plain call."""

from typing import Any

from inference_service.engines.base import EngineState
from inference_service.pool.scheduler import (
    Action,
    CancelLoad,
    Drain,
    EngineView,
    Evict,
    Grant,
    Load,
    Policy,
    WaiterView,
    decide,
    next_look,
)

READY, STARTING, STOPPING = EngineState.READY, EngineState.STARTING, EngineState.STOPPING
DRAINING = EngineState.DRAINING
NOW = 1000.0


def engine(key: str, state: EngineState = READY, leases: int = 0, used: float = 0, **more: Any) -> EngineView:
    awaited = {"awaited_until": NOW + 1} if state is STARTING else {}
    return EngineView(key, state, leases, used, **(awaited | more))


def waiting(*keys: str) -> list[WaiterView]:
    return [WaiterView(number, key, NOW - 1) for number, key in enumerate(keys, start=1)]


def plan(
    engines: list[EngineView],
    waiters: list[WaiterView],
    slots: int = 2,
    concurrency: int = 10,
    **policy: Any,
) -> list[Action]:
    return decide(engines, waiters, Policy(slots, concurrency, **policy), NOW)


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


def test_4_an_engine_stays_for_a_while_after_its_load() -> None:
    assert plan([engine("a", ready_at=NOW - 4)], waiting("b"), slots=1) == []
    assert plan([engine("a", ready_at=NOW - 5)], waiting("b"), slots=1) == [Evict("a")]


def test_4_of_equally_old_victims_the_one_goes_that_is_cheapest_to_load_again() -> None:
    dear, cheap = engine("dear", used=3.1, load_seconds=40), engine("cheap", used=3.7, load_seconds=4)
    assert plan([dear, cheap], waiting("c")) == [Evict("cheap")]
    older = engine("older", used=1.0, load_seconds=90)
    assert plan([dear, cheap, older], waiting("c"), slots=3) == [Evict("older")]


def test_4_a_pinned_engine_never_gives_way() -> None:
    pinned = EngineView("a", READY, 0, 0, pinned=True)
    assert plan([pinned], waiting("b"), slots=1) == []
    late = [WaiterView(1, "b", NOW - 1000)]
    assert plan([pinned], late, slots=1) == []


def test_5_the_least_valuable_busy_engine_drains_for_one_who_has_waited_long() -> None:
    engines = [engine("much", leases=5, used=1), engine("little", leases=1, used=9)]
    patient, late = [WaiterView(1, "c", NOW - 9)], [WaiterView(1, "c", NOW - 10)]
    assert plan(engines, patient) == []
    assert plan(engines, late) == [Drain("little")]


def test_5_requests_that_wait_make_an_engine_valuable_too() -> None:
    engines = [engine("asked", leases=1, used=1), engine("busy", leases=2, used=9)]
    waiters = [WaiterView(1, "c", NOW - 10), *(WaiterView(n, "asked", NOW - 1) for n in (2, 3, 4))]
    assert plan(engines, waiters, concurrency=3) == [Drain("busy")]


def test_5_a_steady_stream_of_new_requests_is_not_admitted_to_a_draining_engine() -> None:
    engines = [engine("a", DRAINING, leases=1)]
    waiters = [WaiterView(1, "b", NOW - 20), WaiterView(2, "a", NOW - 1)]
    assert plan(engines, waiters, slots=1) == []


def test_5_one_engine_drains_for_one_model() -> None:
    engines = [engine("a", DRAINING, leases=1), engine("b", leases=1)]
    assert plan(engines, [WaiterView(1, "c", NOW - 20)]) == []
    both = [WaiterView(1, "c", NOW - 20), WaiterView(2, "d", NOW - 15)]
    assert plan(engines, both) == [Drain("b")]


def test_5_a_model_that_was_drained_waits_its_turn_and_comes_back() -> None:
    engines = [engine("b", leases=1, ready_at=NOW - 5)]
    assert plan(engines, [WaiterView(2, "a", NOW - 10)], slots=1) == [Drain("b")]


def test_5_not_before_it_has_served_for_a_while() -> None:
    engines = [engine("a", leases=1, ready_at=NOW - 4)]
    assert plan(engines, [WaiterView(1, "b", NOW - 50)], slots=1) == []


def test_3_the_model_that_was_asked_for_first_is_loaded_first() -> None:
    waiters = [WaiterView(1, "b", NOW - 1), WaiterView(2, "a", NOW - 7), WaiterView(3, "c", NOW - 3)]
    assert plan([], waiters, slots=2) == [Load("a"), Load("c")]


def test_6_a_load_that_nobody_waits_for_any_more_is_cancelled() -> None:
    lingering = engine("a", STARTING, awaited_until=NOW + 1)
    forgotten = engine("b", STARTING, awaited_until=NOW - 1)
    assert plan([lingering, forgotten], []) == [CancelLoad("b")]
    assert plan([forgotten], waiting("b")) == []


def test_7_an_idle_engine_goes_after_a_while() -> None:
    engines = [engine("old", used=NOW - 60), engine("new", used=NOW - 59), engine("busy", leases=1)]
    assert plan(engines, [], slots=3, idle_ttl=60) == [Evict("old")]
    assert plan(engines, [], slots=3) == []
    assert plan([EngineView("a", READY, 0, 0, pinned=True)], [], idle_ttl=60) == []


def test_7_an_engine_that_gives_way_anyway_goes_once() -> None:
    engines = [engine("a", used=NOW - 60)]
    assert plan(engines, waiting("b"), slots=1, idle_ttl=60) == [Evict("a")]


def test_when_time_alone_changes_something() -> None:
    policy = Policy(2, 10, fairness_wait=10, min_residency=5, idle_ttl=60)
    warm = engine("a", leases=1, ready_at=NOW - 3)
    assert next_look([], [], policy, NOW) is None
    assert next_look([warm], [WaiterView(1, "b", NOW - 1)], policy, NOW) == NOW + 2
    settled = engine("a", leases=1)
    assert next_look([settled], [WaiterView(1, "b", NOW - 1)], policy, NOW) == NOW + 9
    assert next_look([engine("a", used=NOW - 20)], [], policy, NOW) == NOW + 40
    assert next_look([engine("a", STARTING, awaited_until=NOW + 3)], [], policy, NOW) == NOW + 3
