"""Every registered schedule, and the shapes one by one."""

from __future__ import annotations

import pytest

from moesaic.core import registry
from moesaic.core.errors import BadInput
from moesaic.schedules.constant import Constant
from moesaic.schedules.cosine import Cosine
from moesaic.schedules.exponential import Exponential
from moesaic.schedules.linear import Linear
from moesaic.schedules.progressive_sparsification import ProgressiveSparsification
from moesaic.schedules.schedule import as_schedule
from moesaic.schedules.steps import Steps
from moesaic.schedules.wsd import WarmupStableDecay

SCHEDULES = [entry.name for entry in registry.entries("schedules")]


@pytest.mark.parametrize("name", SCHEDULES)
def test_values_stay_between_the_ends_that_are_declared(name):
    schedule = registry.get("schedules", name).build()
    seen = [schedule.value(step, layer) for step in range(0, 1200, 7) for layer in range(12)]
    assert min(seen) == pytest.approx(schedule.low)
    assert max(seen) == pytest.approx(schedule.high)
    assert schedule.moves == (name != "constant")
    assert schedule.value(10**9) == schedule.value(2 * 10**9), "it ends"


@pytest.mark.parametrize("kind", [Linear, Cosine, Exponential])
def test_ramps_start_and_end_where_they_say_and_never_turn(kind):
    up = [kind(2.0, 8.0, 50).value(step) for step in range(-3, 60)]
    down = [kind(8.0, 2.0, 50).value(step) for step in range(-3, 60)]
    assert up[:4] == [2.0] * 4 and up[-10:] == [8.0] * 10
    assert up == sorted(up) and down == sorted(down, reverse=True)


def test_the_middle_of_each_ramp():
    assert Linear(0, 10, 10).value(5) == 5
    assert Cosine(0, 10, 10).value(5) == pytest.approx(5)
    assert Cosine(0, 10, 10).value(1) < Linear(0, 10, 10).value(1)
    assert Exponential(1, 100, 10).value(5) == pytest.approx(10)


def test_steps_switch_at_their_steps():
    schedule = Steps([8, 4, 1], [10, 20])
    assert [schedule.value(s) for s in (0, 9, 10, 19, 20, 99)] == [8, 8, 4, 4, 1, 1]


def test_warm_up_stable_decay():
    schedule = WarmupStableDecay(start=0, peak=4, end=2, warmup=4, decay=10, steps=100)
    assert [schedule.value(s) for s in (0, 2, 4, 90, 95, 100, 500)] == [0, 2, 4, 4, 3, 2, 2]
    assert WarmupStableDecay(warmup=0, decay=0).value(0) == 1


def test_progressive_sparsification_by_layer_and_step():
    schedule = ProgressiveSparsification(first=[8, 4, 2], then=1, steps=100, switch=0.9)
    assert [schedule.value(89, layer) for layer in range(5)] == [8, 4, 2, 1, 1]
    assert [schedule.value(90, layer) for layer in range(5)] == [1] * 5
    assert sum(ProgressiveSparsification().value(0, layer) - 1 for layer in range(56)) == 32, "the card's extra experts"


def test_an_option_takes_a_number_a_schedule_or_a_mapping():
    assert as_schedule(3).value(7) == 3
    linear = Linear(1, 2, 10)
    assert as_schedule(linear) is linear
    assert as_schedule({"schedule": "linear", "start": 1, "end": 2, "steps": 10}).value(5) == 1.5
    assert isinstance(as_schedule({"schedule": "constant", "at": 2}), Constant)


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ({"schedule": "spiral"}, "k: no schedules method 'spiral'"),
        ({"schedule": "linear", "from": 1}, "k: .*from"),
        ({"start": 1}, "give a number"),
        ("linear", "give a number"),
        (True, "give a number"),
        ({"schedule": "linear", "steps": 0}, "steps=0"),
        ({"schedule": "exponential", "end": 0}, "positive"),
        ({"schedule": "steps", "values": [1], "at": [5]}, "1 switches"),
        ({"schedule": "steps", "values": [1, 2, 3], "at": [5, 4]}, "must rise"),
        ({"schedule": "wsd", "warmup": 900}, "do not fit"),
        ({"schedule": "progressive_sparsification", "switch": 2}, "switch=2"),
    ],
)
def test_what_is_no_schedule_is_refused_with_the_option_s_name(value, says):
    with pytest.raises(BadInput, match=says):
        as_schedule(value, "k")
