"""The scheduler's numbered cases, each a plain sequence of events and the actions that follow."""

from dataclasses import replace
from typing import Any

import pytest

from inference_service.scheduler.events import (
    Action,
    Asleep,
    CancelLoad,
    Died,
    Drain,
    Event,
    Evict,
    Failed,
    Fetched,
    FetchFailed,
    Gone,
    Grant,
    Left,
    Load,
    Loaded,
    Pinned,
    Prepare,
    Reason,
    Reject,
    RejectFailed,
    Released,
    Request,
    RoomWanted,
    Sleep,
    Starting,
    Swap,
    TimePassed,
    Unload,
)
from inference_service.scheduler.scheduler import Scheduler
from inference_service.scheduler.state import EngineState, Policy

MIB = 1 << 20


LOAD_OF_A, LOAD_OF_B = (Failed(key, RuntimeError("broken")) for key in ("a", "b"))
FETCH_OF_B, FETCH_OF_T = (FetchFailed(key, RuntimeError("broken")) for key in ("b", "t"))


class Play:
    """A scheduler and a clock; every model weighs one MiB unless it is said otherwise."""

    def __init__(self, slots: int = 2, concurrency: int = 10, **policy: Any) -> None:
        policy = {"fairness_wait": 10, "min_residency": 0, **policy}
        self.scheduler = Scheduler(Policy(slots, concurrency, **policy))
        self.now = 1000.0
        self.numbers = 0

    def handle(self, event: Event, after: float = 0.0) -> list[Action]:
        self.now += after
        return self.scheduler.handle(event, self.now)

    def ask(self, key: str, after: float = 0.0, **more: Any) -> list[Action]:
        self.numbers += 1
        return self.handle(Request(self.numbers, key, **({"bytes": MIB} | more)), after)

    def later(self, seconds: float) -> list[Action]:
        return self.handle(TimePassed(), seconds)

    def serve(self, *keys: str, leases: int = 0, **more: Any) -> None:
        """Load engines one after the other, each with so many leases out, the clock a second on each time."""
        for key in keys:
            for _ in range(max(1, leases)):
                self.ask(key, **more)
            self.handle(Loaded(key, 1.0))
            if leases == 0:
                self.handle(Released(key))
            self.now += 1

    def state(self, key: str) -> EngineState:
        return self.scheduler.engines[key].state


def test_1_a_ready_engine_is_granted_at_once_oldest_first() -> None:
    play = Play()
    assert play.ask("a") == [Load("a")]
    assert play.ask("a") == []
    assert play.handle(Loaded("a")) == [Grant(1, "a"), Grant(2, "a")]
    assert play.ask("a") == [Grant(3, "a")]


def test_1_concurrency_bounds_the_leases_of_all_engines() -> None:
    play = Play(concurrency=2)
    play.serve("a", "b")
    assert (play.ask("a"), play.ask("b")) == ([Grant(3, "a")], [Grant(4, "b")])
    assert (play.ask("b"), play.ask("a")) == ([], [])
    assert play.handle(Released("a")) == [Grant(5, "b")], "in order of arrival, whichever engine it is for"
    assert play.handle(Released("b")) == [Grant(6, "a")]


def test_1_warm_models_do_not_wait_behind_a_load() -> None:
    play = Play()
    play.serve("warm")
    assert play.ask("cold") == [Load("cold")]
    assert play.ask("warm") == [Grant(3, "warm")]


def test_1_who_waits_for_an_adapters_files_keeps_nobody_waiting() -> None:
    play = Play()
    play.serve("a")
    assert play.ask("a", adapter="t") == []
    assert play.ask("a") == [Grant(3, "a")]
    assert play.handle(Fetched("other")) == []
    assert play.handle(Fetched("t")) == [Grant(2, "a")]


def test_1_an_engine_is_kept_for_who_waits_for_an_adapters_files() -> None:
    play = Play(slots=1, idle_ttl=5)
    play.serve("a")
    play.ask("a", adapter="t")
    assert play.later(6) == []
    assert play.ask("b") == [], "it is the older one's engine"
    assert play.handle(FETCH_OF_T) == [RejectFailed(2, FETCH_OF_T), Evict("a")]


def test_1_an_adapters_files_that_cannot_be_had_are_the_concern_of_who_waits_for_them() -> None:
    play = Play()
    assert play.ask("a", adapter="t") == [Load("a")]
    assert [play.ask("a"), play.ask("a", adapter="t"), play.ask("a", adapter="u")] == [[], [], []]
    assert play.handle(FETCH_OF_T) == [RejectFailed(1, FETCH_OF_T), RejectFailed(3, FETCH_OF_T)]
    assert play.handle(Loaded("a")) == [Grant(2, "a")]
    assert play.handle(Fetched("u")) == [Grant(4, "a")]


def test_13_nobody_gives_way_for_the_base_of_an_adapter_whose_files_are_not_there() -> None:
    play = Play(slots=1, min_residency=5)
    play.serve("a")
    play.ask("base", adapter="t")
    assert play.later(60) == []
    assert play.ask("b") == [Evict("a")], "what can be served has no need to wait for it"
    assert play.handle(Gone("a")) == [Load("b")]
    play.handle(Loaded("b"))
    play.handle(Released("b"))
    assert play.later(60) == []
    assert play.handle(Fetched("t")) == [Evict("b")]
    assert play.handle(Gone("b")) == [Load("base")]


def test_13_such_a_base_is_loaded_where_room_is_free() -> None:
    play = Play(slots=2)
    play.serve("a")
    assert play.ask("base", adapter="t") == [Load("base")]


def test_8_who_waits_for_an_adapters_files_waits_in_the_queue() -> None:
    play = Play(queued=1)
    play.serve("a")
    assert play.ask("a", adapter="t") == []
    assert play.ask("a", adapter="t") == [Reject(3, Reason.OVERLOADED)]
    assert play.ask("a") == [Grant(4, "a")]


def test_2_a_load_is_joined() -> None:
    play = Play()
    assert [play.ask("a"), play.ask("a"), play.ask("a")] == [[Load("a")], [], []]


def test_3_the_model_that_was_asked_for_first_is_loaded_first() -> None:
    play = Play(slots=1)
    play.serve("x", leases=1)
    assert [play.ask("b"), play.ask("a"), play.ask("b")] == [[], [], []]
    assert play.handle(Died("x")) == []
    assert play.handle(Gone("x")) == [Load("b")]


def test_3_a_model_is_loaded_only_where_its_bytes_fit() -> None:
    play = Play(slots=4, memory=3 * MIB)
    assert play.ask("a", bytes=2 * MIB) == [Load("a")]
    assert play.ask("b", bytes=2 * MIB) == [], "a is on its way, and they do not fit together"
    assert play.ask("c", bytes=MIB) == [], "the room that is left is kept for b, which came first"
    assert play.handle(Loaded("a")) == [Grant(1, "a")]
    assert play.handle(Released("a")) == [Evict("a")]
    assert play.handle(Gone("a")) == [Load("b"), Load("c")]


def test_3_a_small_model_that_came_first_is_loaded_beside_a_busy_one() -> None:
    play = Play(slots=4, memory=3 * MIB)
    play.serve("a", leases=1, bytes=2 * MIB)
    assert play.ask("c", bytes=MIB) == [Load("c")]


def test_4_the_least_recently_used_idle_engine_gives_way() -> None:
    play = Play()
    play.serve("a", "b")
    play.ask("a")
    play.handle(Released("a"))
    assert play.ask("c") == [Evict("b")]
    assert play.handle(Gone("b")) == [Load("c")]


def test_4_one_eviction_per_wanted_model() -> None:
    play = Play(slots=3)
    play.serve("a", "b", "c")
    assert [play.ask("x"), play.ask("x"), play.ask("y")] == [[Evict("a")], [], [Evict("b")]]


def test_4_as_many_give_way_as_are_needed_and_no_more() -> None:
    play = Play(slots=4, memory=4 * MIB)
    play.serve("a")
    play.serve("b", bytes=2 * MIB)
    play.serve("c")
    assert play.ask("x", bytes=2 * MIB) == [Evict("b")], "a alone would not do, b alone does"
    play = Play(slots=4, memory=4 * MIB)
    play.serve("a", "b", "c", "d")
    assert play.ask("x", bytes=3 * MIB) == [Evict("a"), Evict("b"), Evict("c")]


def test_4_nobody_gives_way_in_vain() -> None:
    play = Play(slots=4, memory=4 * MIB)
    play.serve("busy", leases=1, bytes=2 * MIB)
    play.serve("idle")
    assert play.ask("x", bytes=4 * MIB) == [], "without the busy one it would not fit"
    assert play.later(10) == [Evict("idle"), Drain("busy")]


def test_4_an_engine_that_stops_already_is_waited_for() -> None:
    play = Play()
    play.serve("a", "b")
    assert play.handle(Unload("a")) == [Evict("a")]
    assert play.ask("x") == []
    assert play.ask("y") == [Evict("b")]


def test_4_an_engine_that_somebody_waits_for_is_no_victim() -> None:
    play = Play(concurrency=1)
    play.serve("a")
    play.serve("b", leases=1)
    assert play.ask("a") == []
    assert play.ask("c") == []


def test_4_an_engine_stays_for_a_while_after_its_load() -> None:
    play = Play(slots=1, min_residency=5)
    play.serve("a")
    assert play.ask("b") == []
    assert play.scheduler.next_look(play.now) == play.now + 4
    assert play.later(3.9) == []
    assert play.later(0.1) == [Evict("a")]


def test_4_of_equally_old_victims_the_one_goes_that_is_cheapest_to_load_again() -> None:
    play = Play()
    play.ask("dear")
    play.ask("cheap")
    for key, seconds in (("dear", 40.0), ("cheap", 4.0)):
        play.handle(Loaded(key, seconds))
        play.handle(Released(key), 0.1)
    assert play.ask("c") == [Evict("cheap")]


def test_4_a_pinned_engine_never_gives_way() -> None:
    play = Play()
    play.serve("a", pinned=True)
    play.serve("b", leases=1)
    assert play.ask("c") == []
    assert play.later(60) == [Drain("b")]
    assert play.handle(Pinned("a", pinned=False)) == []
    assert play.handle(Released("b")) == [Evict("b")]


def test_4_an_operators_pin_counts_at_once() -> None:
    play = Play()
    play.serve("a", "b")
    play.handle(Pinned("a", pinned=True))
    assert play.ask("c") == [Evict("b")]


def test_5_an_engine_with_leases_is_never_torn_down() -> None:
    play = Play(slots=1)
    play.serve("a", leases=1)
    assert play.ask("b") == []
    assert play.later(10) == [Drain("a")]
    assert play.later(1000) == []
    assert play.handle(Released("a")) == [Evict("a")]
    assert play.handle(Gone("a")) == [Load("b")]


def test_5_the_least_valuable_busy_engine_drains_for_one_who_has_waited_long() -> None:
    play = Play()
    play.serve("much", leases=5)
    play.serve("little", leases=1)
    assert play.ask("c") == []
    assert play.scheduler.next_look(play.now) == play.now + 10
    assert play.later(9.9) == []
    assert play.later(0.1) == [Drain("little")]


def test_5_requests_that_wait_make_an_engine_valuable_too() -> None:
    play = Play(concurrency=3)
    play.serve("asked", leases=1)
    play.serve("busy", leases=2)
    for key in ("asked", "asked", "c"):
        assert play.ask(key) == []
    assert play.later(10) == [Drain("busy")]


def test_5_an_engine_that_has_served_nobody_for_want_of_a_lease_stays() -> None:
    """Else it would be loaded and torn down again and again, for as long as another holds all leases."""
    play = Play(concurrency=3)
    play.serve("new")
    play.serve("hangs", leases=3)
    for key in ("new", "c", "d"):
        assert play.ask(key) == []
    assert play.later(10) == [Drain("hangs")], "for c, and new is not torn down for d"
    assert play.later(1000) == []
    assert play.handle(Released("hangs")) == [Grant(5, "new"), Drain("new")]


def test_5_new_requests_are_not_admitted_to_a_draining_engine() -> None:
    play = Play(slots=1)
    play.serve("a", leases=1)
    play.ask("b")
    play.later(10)
    assert play.ask("a") == []
    assert play.handle(Released("a")) == [Evict("a")]
    assert play.handle(Gone("a")) == [Load("b")]


def test_5_one_engine_drains_for_one_model() -> None:
    play = Play()
    play.serve("a", "b", leases=1)
    play.ask("c")
    assert play.later(10) == [Drain("a")]
    assert play.ask("d") == []
    assert play.later(10) == [Drain("b")]


def test_5_two_models_that_are_both_wanted_all_the_time_take_turns() -> None:
    """The older waiter's model each time; a swap only once a waiter is old enough."""
    play = Play(slots=1, fairness_wait=10)
    play.serve("a", leases=1)
    loads = []
    for _ in range(3):
        other = "b" if "a" in play.scheduler.engines else "a"
        (this,) = play.scheduler.engines
        assert play.ask(other) == []
        assert play.later(10) == [Drain(this)]
        assert play.ask(this) == []
        assert play.handle(Released(this)) == [Evict(this)]
        assert play.handle(Gone(this)) == [Load(other)]
        assert play.handle(Loaded(other)) == [Grant(play.numbers - 1, other)]
        play.handle(Left(play.numbers))
        loads.append(other)
    assert loads == ["b", "a", "b"]


def test_6_a_load_that_nobody_waits_for_any_more_is_cancelled() -> None:
    play = Play()
    play.ask("a")
    assert play.handle(Left(1, linger=5)) == []
    assert play.scheduler.next_look(play.now) == play.now + 5
    assert play.later(4.9) == []
    assert play.later(0.1) == [CancelLoad("a")]


def test_6_a_load_that_somebody_comes_back_for_goes_on() -> None:
    play = Play()
    play.ask("a")
    play.handle(Left(1, linger=5))
    assert play.ask("a", after=3) == []
    assert play.later(60) == []
    assert play.handle(Loaded("a")) == [Grant(2, "a")]


def test_6_a_load_that_one_of_two_waits_for_goes_on() -> None:
    play = Play()
    play.ask("a")
    play.ask("a")
    assert play.handle(Left(1)) == []
    assert play.handle(Left(2)) == [CancelLoad("a")]


def test_7_an_idle_engine_goes_after_a_while() -> None:
    play = Play(slots=4, idle_ttl=60)
    play.serve("a")
    play.serve("busy", leases=1)
    play.serve("pinned", pinned=True)
    assert play.scheduler.next_look(play.now) == play.now + 57
    assert play.later(56.9) == []
    assert play.later(0.1) == [Evict("a")]
    assert play.later(1000) == []


def test_7_an_engine_that_gives_way_anyway_goes_once() -> None:
    play = Play(slots=1, idle_ttl=60)
    play.serve("a")
    assert play.ask("b", after=60) == [Evict("a")]


def test_8_more_than_may_wait_are_rejected_at_once() -> None:
    play = Play(concurrency=1, queued=2)
    play.serve("a", leases=1)
    assert [play.ask("a"), play.ask("a")] == [[], []]
    assert play.ask("a") == [Reject(4, Reason.OVERLOADED)]
    assert play.ask("b") == [Reject(5, Reason.OVERLOADED)]
    assert play.handle(Left(2)) == []
    assert play.ask("a") == [], "one that left makes place"


def test_8_a_warm_model_is_not_refused_for_those_who_wait_for_a_cold_one() -> None:
    play = Play(queued=1)
    play.serve("warm")
    play.ask("cold")
    assert play.ask("warm") == [Grant(3, "warm")]
    assert play.ask("cold") == [Reject(4, Reason.OVERLOADED)]


def test_8_what_cannot_fit_beside_the_pinned_is_rejected() -> None:
    play = Play(slots=3, memory=4 * MIB)
    play.serve("p", bytes=3 * MIB, pinned=True)
    assert play.ask("big", bytes=2 * MIB) == [Reject(2, Reason.NO_ROOM)]
    assert play.ask("small", bytes=MIB) == [Load("small")]


def test_8_where_every_slot_is_pinned_nobody_waits() -> None:
    play = Play(slots=1)
    play.ask("p", pinned=True)
    assert play.ask("b") == [Reject(2, Reason.NO_ROOM)]


def test_8_a_pin_rejects_those_who_wait_already() -> None:
    play = Play(slots=1)
    play.serve("a", leases=1)
    assert play.ask("b") == []
    assert play.handle(Pinned("a", pinned=True)) == [Reject(2, Reason.NO_ROOM)]


def test_8_a_pinned_engine_that_is_being_unloaded_is_waited_for() -> None:
    play = Play(slots=1)
    play.serve("p", pinned=True)
    assert play.handle(Unload("p")) == [Evict("p")]
    assert play.ask("b") == []
    assert play.handle(Gone("p")) == [Load("b")]


def test_9_a_failed_load_rejects_everyone_who_waited_and_the_slot_is_free_once_it_is_gone() -> None:
    play = Play(slots=1)
    play.ask("a")
    play.ask("a")
    play.ask("b")
    assert play.handle(LOAD_OF_A) == [RejectFailed(1, LOAD_OF_A), RejectFailed(2, LOAD_OF_A)]
    assert play.handle(Gone("a")) == [Load("b")]


def test_9_a_dead_engines_leases_do_not_count() -> None:
    play = Play(concurrency=2)
    play.serve("a", leases=2)
    assert play.ask("b") == [Load("b")]
    play.handle(Loaded("b"))
    assert play.handle(Died("a")) == [Grant(3, "b")]
    assert play.ask("a") == []
    assert play.handle(Gone("a")) == [Load("a")], "replaced for who has asked since"
    assert play.scheduler.running == 1


def test_10_an_unloaded_engine_drains_first() -> None:
    play = Play()
    play.serve("a", leases=2)
    assert play.handle(Unload("a")) == []
    assert play.ask("a") == []
    assert play.handle(Released("a")) == []
    assert play.handle(Released("a")) == [Evict("a")]
    assert play.handle(Gone("a")) == [Load("a")]


def test_10_forced_it_goes_at_once() -> None:
    play = Play()
    play.serve("a", leases=2)
    assert play.handle(Unload("a", force=True)) == [Evict("a")]
    assert play.scheduler.running == 0
    play = Play()
    play.serve("a", leases=2)
    play.handle(Unload("a"))
    assert play.handle(Unload("a", force=True)) == [Evict("a")], "also where it drains already"
    assert play.handle(Unload("a", force=True)) == []


def test_10_an_unload_rejects_those_who_wait_for_the_load() -> None:
    play = Play()
    play.ask("a")
    assert play.handle(Unload("a")) == [Reject(1, Reason.UNLOADED), CancelLoad("a")]


def test_what_gives_way_where_something_else_than_a_slot_is_short() -> None:
    play = Play()
    play.serve("a", "b")
    assert play.scheduler.capacity.victims(play.now) == ["a", "b"]
    assert play.handle(RoomWanted()) == [Evict("a")]
    assert play.state("a") is EngineState.STOPPING
    assert play.handle(RoomWanted()) == [Evict("b")]
    assert play.handle(RoomWanted()) == []


def test_when_time_alone_changes_nothing() -> None:
    play = Play()
    assert play.scheduler.next_look(play.now) is None
    play.serve("a", leases=1)
    assert play.scheduler.next_look(play.now) is None


def test_11_a_drain_is_called_off_when_nobody_waits_for_its_slot_any_more() -> None:
    play = Play(slots=1)
    play.serve("a", leases=1)
    play.ask("b")
    assert play.later(10) == [Drain("a")]
    assert play.ask("a") == []
    assert play.handle(Left(2)) == [Grant(3, "a")], "b has left: a admits again"
    assert play.state("a") is EngineState.READY


def test_11_an_operators_drain_is_not() -> None:
    play = Play(slots=1)
    play.serve("a", leases=1)
    play.ask("b")
    assert play.later(10) == [Drain("a")]
    assert play.handle(Unload("a")) == []
    assert play.handle(Left(2)) == []
    assert play.state("a") is EngineState.DRAINING


def test_11_a_pin_calls_a_drain_off() -> None:
    play = Play(slots=1)
    play.serve("a", leases=1)
    play.ask("b")
    assert play.later(10) == [Drain("a")]
    assert play.handle(Pinned("a", pinned=True)) == [Reject(2, Reason.NO_ROOM)]
    assert play.state("a") is EngineState.READY


def test_12_while_an_engine_is_being_started_none_gives_way() -> None:
    play = Play(slots=2, idle_ttl=60)
    play.serve("a")
    assert play.ask("slow") == [Load("slow")]
    assert play.handle(Starting("slow", MIB)) == []
    assert play.ask("c") == []
    assert play.later(100) == [], "nor after MODEL_IDLE_TTL or FAIRNESS_WAIT"
    assert play.ask("a") == [Grant(4, "a")], "it serves meanwhile"
    assert play.handle(Released("a")) == []
    assert play.handle(Loaded("slow")) == [Grant(2, "slow"), Evict("a")]


def test_an_operators_order_waits_beside_the_queue() -> None:
    play = Play(concurrency=1, queued=1)
    play.serve("a", leases=1)
    assert play.ask("a") == []
    assert play.ask("b") == [Reject(3, Reason.OVERLOADED)]
    assert play.ask("b", by_operator=True) == [Load("b")]
    assert play.scheduler.waiting == 1, "and takes no client's place"
    assert play.handle(Left(2)) == []
    assert play.ask("a") == []


def test_what_an_engine_takes_is_known_once_its_files_are_there() -> None:
    play = Play(slots=3, memory=3 * MIB)
    play.ask("a")
    play.handle(Starting("a", 3 * MIB))
    play.handle(Loaded("a"))
    assert play.ask("b") == [], "a was replaced by a larger one while it was fetched"


# 13. No engine gives way for a model whose files are not there yet.


def test_an_engine_serves_until_the_files_of_what_comes_after_it_are_there() -> None:
    play = Play(slots=1)
    play.serve("a")
    assert play.ask("b", fetched=False) == []
    assert play.ask("a") == [Grant(3, "a")]
    play.handle(Released("a"))
    assert play.handle(Fetched("b")) == [Evict("a")]


def test_a_model_whose_files_are_not_there_keeps_its_place_in_the_line() -> None:
    play = Play(slots=2)
    play.serve("a", leases=1)
    play.ask("b")
    play.ask("c", fetched=False)
    assert play.ask("d") == []
    play.handle(LOAD_OF_B)
    assert play.handle(Gone("b")) == [Load("c")]


def test_files_that_cannot_be_had_are_told_to_all_who_wait() -> None:
    play = Play(slots=1)
    play.serve("a")
    play.ask("b", fetched=False)
    play.ask("b", fetched=False)
    rejects = [RejectFailed(2, FETCH_OF_B), RejectFailed(3, FETCH_OF_B)]
    assert play.handle(FETCH_OF_B) == rejects
    assert play.scheduler.waiting == 0


def test_files_that_nobody_waits_for_change_nothing() -> None:
    play = Play(slots=1)
    assert play.handle(Fetched("b")) == []
    assert play.handle(FETCH_OF_B) == []


# 14. Weights are put into an engine that can take them.


def test_an_idle_engine_takes_the_weights_of_a_model_of_its_kind() -> None:
    play = Play(slots=1, min_residency=1000)
    play.serve("a", swap="llama")
    assert play.ask("b", swap="llama") == [Swap("b", "a")]
    assert play.ask("b", swap="llama") == []
    assert play.handle(Loaded("b", 0.5)) == [Grant(2, "b"), Grant(3, "b")]
    assert list(play.scheduler.engines) == ["b"]


def test_a_free_slot_comes_before_a_swap() -> None:
    play = Play(slots=2)
    play.serve("a", swap="llama")
    assert play.ask("b", swap="llama") == [Load("b")]


def test_only_an_engine_with_the_same_swap_key_and_room_for_the_adapters_is_swapped() -> None:
    play = Play(slots=3)
    play.serve("a", swap="llama")
    play.serve("b", swap="qwen", adapters=16)
    play.serve("c", swap=None)
    assert play.ask("d", swap="qwen", adapters=32) == [Evict("a")]
    assert play.ask("e", swap="qwen", adapters=8) == [Swap("e", "b")]


def test_a_swap_does_not_wait_for_a_start_and_is_not_called_off() -> None:
    play = Play(slots=2)
    play.serve("a", swap="llama")
    play.ask("x")
    play.handle(Starting("x", MIB))
    assert play.ask("b", swap="llama") == [Swap("b", "a")]
    assert play.handle(Left(3)) == []
    assert play.later(100) == []
    assert play.handle(Loaded("b", 0.5)) == []
    assert play.scheduler.engines["b"].state is EngineState.READY


def test_a_swap_waits_for_the_files() -> None:
    play = Play(slots=1)
    play.serve("a", swap="llama")
    assert play.ask("b", swap="llama", fetched=False) == []
    assert play.handle(Fetched("b")) == [Swap("b", "a")]


def test_a_pinned_or_wanted_engine_keeps_its_weights() -> None:
    play = Play(slots=2, concurrency=1)
    play.serve("a", swap="llama", pinned=True)
    play.serve("b", leases=1, swap="llama")
    play.ask("b", swap="llama")
    play.handle(Released("b"))
    assert play.ask("c", swap="llama") == [Prepare("c", "b")], "and no swap"


def test_a_busy_engine_that_has_drained_takes_the_weights_of_whom_it_drained_for() -> None:
    play = Play(slots=1, fairness_wait=10)
    play.serve("a", leases=1, swap="llama")
    assert play.ask("b", swap="llama") == [Prepare("b", "a")]
    assert play.later(10) == [Drain("a")]
    assert play.handle(Released("a")) == [Swap("b", "a")]


def test_an_engine_that_drains_for_another_kind_is_not_swapped() -> None:
    play = Play(slots=1, fairness_wait=10)
    play.serve("a", leases=1, swap="llama")
    play.ask("x", swap="qwen")
    play.ask("b", swap="llama")
    assert play.later(10) == [Drain("a")]
    assert play.handle(Released("a")) == [Evict("a")]


def test_a_swap_does_not_make_an_engine_young() -> None:
    play = Play(slots=1, min_residency=5)
    play.serve("a", swap="llama")
    play.ask("b", after=10, swap="llama")
    play.handle(Loaded("b", 0.5))
    play.handle(Released("b"))
    assert play.ask("x") == [Evict("b")]


def test_a_swap_that_failed_goes_on_as_a_load() -> None:
    play = Play(slots=1)
    play.serve("a", swap="llama")
    play.ask("b", swap="llama")
    assert play.handle(Starting("b", MIB)) == []
    assert play.handle(Left(2)) == [CancelLoad("b")]


# 15. A revision replaces another.


def test_a_new_revision_is_loaded_beside_the_old_one_where_there_is_room() -> None:
    play = Play(slots=2)
    play.serve("a@1", leases=1)
    assert play.ask("a@2", by_operator=True, instead_of="a@1") == [Load("a@2")]


def test_a_new_revision_takes_its_own_old_engine_and_no_other() -> None:
    play = Play(slots=2)
    play.serve("x", swap="llama")
    play.serve("a@1", swap="llama", pinned=True)
    asked = play.ask("a@2", by_operator=True, instead_of="a@1", swap="llama", pinned=True)
    assert asked == [Swap("a@2", "a@1")]


def test_a_new_revision_of_a_busy_engine_drains_it_at_once() -> None:
    play = Play(slots=1)
    play.serve("a@1", leases=2, swap="llama", pinned=True)
    asked = play.ask("a@2", by_operator=True, instead_of="a@1", swap="llama")
    assert asked == [Drain("a@1"), Prepare("a@2", "a@1")]
    assert play.handle(Released("a@1")) == []
    assert play.handle(Released("a@1")) == [Swap("a@2", "a@1")]


def test_a_new_revision_of_another_shape_has_its_old_engine_torn_down() -> None:
    play = Play(slots=1)
    play.serve("a@1", swap="llama")
    assert play.ask("a@2", by_operator=True, instead_of="a@1", swap="qwen") == [Drain("a@1"), Evict("a@1")]
    assert play.handle(Gone("a@1")) == [Load("a@2")]


def test_a_new_revision_that_is_given_up_leaves_the_old_one_admitting() -> None:
    play = Play(slots=1)
    play.serve("a@1", leases=1)
    play.ask("a@2", by_operator=True, instead_of="a@1")
    play.ask("x")
    play.handle(Left(2))
    assert play.scheduler.engines["a@1"].state is EngineState.READY


def test_a_load_that_is_promised_to_go_on_does_so_when_its_turn_comes() -> None:
    play = Play(slots=2)
    play.ask("a")
    play.ask("b")
    play.handle(Left(2, linger=600))
    assert play.handle(Starting("b", MIB), after=5) == []
    assert play.handle(Loaded("b", 1.0), after=5) == []


def test_what_takes_adapters_is_kept_for_who_needs_them() -> None:
    play = Play(slots=2)
    play.serve("a", swap="llama", adapters=16)
    play.serve("b", swap="llama")
    assert play.ask("c", swap="llama") == [Swap("c", "b")]


# 16. A busy engine prepares for the weights that it will take.


def test_the_least_busy_engine_that_can_take_the_weights_prepares_for_them_once() -> None:
    play = Play(slots=4)
    play.serve("a", leases=2, swap="llama")
    play.serve("b", leases=1, swap="llama")
    play.serve("x", leases=1, swap="qwen")
    play.serve("p", leases=1, swap="llama", pinned=True)
    assert play.ask("c", swap="llama") == [Prepare("c", "b")]
    assert play.ask("c", swap="llama") == []
    assert play.later(1) == []
    assert play.handle(Released("b")) == [Swap("c", "b")]


def test_it_prepares_once_the_files_are_there() -> None:
    play = Play(slots=1)
    play.serve("a", leases=1, swap="llama")
    assert play.ask("b", swap="llama", fetched=False) == []
    assert play.handle(Fetched("b")) == [Prepare("b", "a")]


def test_the_engine_that_drains_for_a_waiter_prepares() -> None:
    play = Play(slots=2, fairness_wait=10)
    play.serve("a", leases=2, swap="llama")
    play.serve("b", leases=1, swap="llama")
    assert play.ask("c", swap="llama") == [Prepare("c", "b")]
    assert play.later(10) == [Drain("b")]
    assert play.ask("a") == [Grant(6, "a")] or play.scheduler.running == 4
    play.handle(Died("b"))
    assert play.handle(Gone("b")) == [Load("c")]


def test_another_engine_prepares_when_the_first_is_gone() -> None:
    play = Play(slots=2)
    play.serve("a", leases=2, swap="llama")
    play.serve("b", leases=1, swap="llama")
    play.ask("x")
    assert play.ask("c", swap="llama") == [Prepare("c", "b")]
    assert play.handle(Died("b")) == [Prepare("c", "a")]


def test_nothing_is_prepared_where_none_can_take_it() -> None:
    play = Play(slots=1)
    play.serve("a", leases=1, swap="llama")
    assert play.ask("b", swap="qwen") == []
    assert play.ask("c") == []
    assert play.ask("d", swap="llama", adapters=8) == []


# 17. An engine that gives way sleeps, and wakes with the next weights that it can take.


LLAMA: dict[str, Any] = {"swap": "llama", "asleep_bytes": MIB // 4}
QWEN: dict[str, Any] = {"swap": "qwen", "asleep_bytes": MIB // 4}


def asleep(sleepers: int = 1, slots: int = 1, **policy: Any) -> Play:
    """`a` sleeps as `~a`, and `b`, of another kind, serves."""
    play = Play(slots=slots, sleepers=sleepers, **policy)
    others = [f"other{number}" for number in range(slots - 1)]
    play.serve("a", **LLAMA)
    play.serve(*others, bytes=0)
    assert play.ask("b", **QWEN) == [Sleep("a")]
    assert play.handle(Asleep("a", "~a", MIB // 2)) == [Load("b")]
    play.handle(Loaded("b", 1.0))
    play.handle(Released("b"))
    for other in others:
        play.handle(Unload(other))
        play.handle(Gone(other))
    return play


def test_an_engine_that_gives_way_sleeps_and_wakes_with_its_model() -> None:
    play = asleep()
    assert play.state("~a") is EngineState.SLEEPING
    assert play.ask("a", **LLAMA) == [Sleep("b"), Prepare("a", "~a")]
    assert play.handle(Asleep("b", "~b", MIB // 2)) == [Swap("a", "~a")]
    assert play.scheduler.engines["a"].bytes == MIB
    assert play.handle(Loaded("a", 0.5)) == [Grant(3, "a")]
    assert list(play.scheduler.engines) == ["~b", "a"]


def test_a_sleeping_engine_takes_any_weights_of_its_kind() -> None:
    play = asleep(slots=2, memory=4 * MIB)
    assert play.ask("sibling", **LLAMA) == [Swap("sibling", "~a")]


def test_by_default_engines_end() -> None:
    play = Play(slots=1)
    play.serve("a", **LLAMA)
    assert play.ask("b", **QWEN) == [Evict("a")]


@pytest.mark.parametrize("engine", [{"swap": "llama"}, {"asleep_bytes": 1}])
def test_what_cannot_sleep_or_be_woken_ends(engine: dict[str, Any]) -> None:
    play = Play(slots=1, sleepers=1)
    play.serve("a", **engine)
    assert play.ask("b", **QWEN) == [Evict("a")]


def test_an_engine_that_cannot_be_put_to_sleep_is_gone() -> None:
    play = Play(slots=1, sleepers=1)
    play.serve("a", **LLAMA)
    assert play.ask("b", **QWEN) == [Sleep("a")]
    assert play.ask("a", **LLAMA) == []
    assert play.handle(Gone("a")) == [Load("b")]


def test_the_oldest_beyond_their_number_end() -> None:
    play = asleep()
    assert play.ask("c", swap="gemma", asleep_bytes=1) == [Evict("~a"), Sleep("b")]
    assert play.handle(Asleep("b", "~b", MIB // 2)) == [Load("c")], "the other still ends"
    play.handle(Gone("~a"))
    assert [each for each, engine in play.scheduler.engines.items() if engine.slept] == ["~b"]


def test_one_of_each_kind_sleeps_rather_than_two_of_one() -> None:
    play = asleep(sleepers=2)
    play.ask("a2", **LLAMA)  # wakes ~a
    play.handle(Asleep("b", "~b", 1))
    play.handle(Loaded("a2", 1.0))
    play.handle(Released("a2"))
    play.ask("x", **LLAMA, after=5)
    assert list(play.scheduler.engines) == ["~b", "x"], "swapped"
    play.handle(Loaded("x", 1.0))
    play.handle(Released("x"))
    play.ask("y", adapters=8, **LLAMA)
    play.handle(Asleep("x", "~x", 1))
    play.handle(Loaded("y", 1.0))
    play.handle(Released("y"))
    assert play.ask("z", after=1) == [Evict("~x"), Sleep("y")], "not ~b, which is older"


def test_what_sleeps_counts_and_ends_before_an_engine_that_serves() -> None:
    play = asleep(slots=3, memory=2 * MIB)
    assert play.ask("c", bytes=MIB // 2) == [Load("c")]
    play.handle(Loaded("c", 1.0))
    play.handle(Released("c"))
    assert play.ask("d", bytes=MIB // 2) == [Evict("~a")], "half a MiB, while two idle engines stay"
    assert play.handle(Gone("~a")) == [Load("d")]


def test_an_engine_ends_where_what_it_would_keep_does_not_fit() -> None:
    play = Play(slots=1, sleepers=1, memory=2 * MIB)
    play.serve("a", **LLAMA)
    assert play.ask("b", bytes=2 * MIB, **QWEN) == [Evict("a")]


def test_a_measurement_above_the_estimate_ends_it() -> None:
    play = Play(slots=1, sleepers=1, memory=2 * MIB)
    play.serve("a", **LLAMA)
    assert play.ask("b", bytes=2 * MIB - MIB // 4, **QWEN) == [Sleep("a")]
    assert play.handle(Asleep("a", "~a", MIB)) == [Evict("~a")]
    assert play.handle(Gone("~a")) == [Load("b")]


def test_a_model_waits_for_its_files_and_then_wakes_what_can_take_it() -> None:
    play = asleep(slots=2, memory=4 * MIB)
    assert play.ask("sibling", fetched=False, **LLAMA) == []
    assert play.ask("other", fetched=False, swap="gemma") == [], "the slot is the older one's"
    assert play.handle(Fetched("sibling")) == [Swap("sibling", "~a")]


def test_a_drained_engine_sleeps() -> None:
    play = Play(slots=1, sleepers=1, fairness_wait=10)
    play.serve("a", leases=1, **LLAMA)
    play.ask("b", **QWEN)
    assert play.later(10) == [Drain("a")]
    assert play.handle(Released("a")) == [Sleep("a")]


def test_a_replaced_revision_ends() -> None:
    play = Play(slots=1, sleepers=1)
    play.serve("a@1", **LLAMA)
    asked = play.ask("a@2", by_operator=True, instead_of="a@1", **QWEN)
    assert asked == [Drain("a@1"), Evict("a@1")]


def test_what_sleeps_ends_by_idle_ttl_death_and_unload() -> None:
    play = asleep(idle_ttl=60)
    assert play.later(59) == [Evict("~a")], "it was used before b"
    play = asleep()
    play.handle(Died("~a"))
    assert play.ask("a", **LLAMA) == [Sleep("b")], "it cannot be woken any more"
    play = asleep()
    assert play.handle(Unload("~a")) == [Evict("~a")]


def test_an_engine_that_is_unloaded_on_its_way_to_sleep_ends() -> None:
    play = Play(slots=1, sleepers=1)
    play.serve("a", **LLAMA)
    play.ask("b", **QWEN)
    assert play.handle(Unload("a")) == []
    assert not play.scheduler.engines["a"].goes_to_sleep


def test_memory_that_is_lacking_is_taken_from_what_sleeps_and_space_on_the_disk_is_not() -> None:
    play = asleep()
    assert play.handle(RoomWanted(disk=True)) == [Evict("b")]
    assert play.handle(RoomWanted()) == [Evict("~a")]


def test_no_sleeping_engine_ends_while_another_starts() -> None:
    play = asleep(slots=3, idle_ttl=60)
    play.ask("c")
    play.handle(Starting("c", MIB))
    play.ask("b", **QWEN)
    assert play.later(100) == []
    assert play.handle(Loaded("c", 1.0))[-1] == Evict("~a")


def test_an_engine_that_could_not_wake_beside_the_pinned_ones_holds_up_nobody() -> None:
    """It is larger than its sibling, which fits; it ends if its memory is needed."""
    play = asleep(memory=10 * MIB)
    play.scheduler.engines["~a"].awake_bytes = 6 * MIB
    play.handle(Unload("b"))
    play.handle(Gone("b"))
    play.serve("p", bytes=5 * MIB, pinned=True)
    play.scheduler.policy = play.scheduler.capacity._policy = replace(play.scheduler.policy, slots=3)
    assert play.ask("sibling", bytes=4 * MIB, **{**LLAMA, "asleep_bytes": 0}) == [Load("sibling")]


def test_what_a_waking_engine_needs_is_not_taken_by_who_came_later() -> None:
    play = asleep(slots=3, memory=9 * MIB)
    play.handle(Unload("b"))
    play.handle(Gone("b"))
    play.serve("x", bytes=4 * MIB, leases=1)
    play.scheduler.engines["~a"].awake_bytes = 6 * MIB
    assert play.ask("sibling", bytes=2 * MIB, **{**LLAMA, "asleep_bytes": 0}) == [Prepare("sibling", "~a")]
    assert play.ask("later", bytes=2 * MIB) == []


def test_more_than_may_sleep_do_so_only_while_one_of_them_is_about_to_wake() -> None:
    play = asleep()
    assert play.ask("a", **LLAMA) == [Sleep("b"), Prepare("a", "~a")]
    play.handle(Left(3))
    assert play.handle(Asleep("b", "~b", 1)) == [Evict("~a")]
