"""Whole models as the cached unit: card serving-and-scale.md, "SN40L / Samba-CoE: three memory tiers, model switching"."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from moesaic.core.errors import BadInput, MissingNeed
from moesaic.serving.models.queue import Waiting, group, next_group, serve_grouped
from moesaic.serving.models.residency import Residency
from moesaic.serving.models.simulate import Costs, Request, simulate

NAMES = "abcdef"
SIZES = dict.fromkeys(NAMES, 10)


def zipf(count, seed=0, names=NAMES):
    share = 1 / np.arange(1, len(names) + 1)
    return list(np.random.default_rng(seed).choice(list(names), count, p=share / share.sum()))


def stream(models, **more):
    return [Request(str(model), **more) for model in models]


def lru_misses(models, slots):
    """The naive twin: a list, most recent last."""
    held, misses = [], 0
    for model in models:
        if model in held:
            held.remove(model)
        else:
            misses += 1
            held = held[-(slots - 1) :] if slots > 1 else []
        held.append(model)
    return misses


def test_room_for_all_is_one_cold_load_each():
    found = simulate(stream(zipf(200)), SIZES, 60)
    assert found.switches == len(set(zipf(200))) == 6
    assert found.most_bytes == 60


def test_room_for_one_switches_at_every_change_of_model():
    models = zipf(200)
    assert simulate(stream(models), SIZES, 10).switches == len(list(itertools.groupby(models)))


@pytest.mark.parametrize("slots", [1, 2, 3, 5])
@pytest.mark.parametrize("seed", range(3))
def test_lru_is_the_textbooks_and_belady_never_worse(slots, seed):
    models = zipf(300, seed)
    lru = simulate(stream(models), SIZES, 10 * slots)
    assert lru.switches == lru_misses(models, slots)
    others = {policy: simulate(stream(models), SIZES, 10 * slots, policy=policy) for policy in ("lfu", "slru", "belady")}
    assert others["belady"].switches <= min(lru.switches, others["lfu"].switches, others["slru"].switches)
    assert all(found.most_bytes <= 10 * slots for found in [lru, *others.values()])


def test_bytes_are_those_of_each_model():
    sizes = {"small": 3, "large": 70, "middle": 29}
    residency = Residency(sizes, 100)
    for name in ("small", "large"):
        assert residency.touch(name) == (False, [])
    assert residency.used_bytes == 73
    assert residency.touch("middle") == (False, ["small"])  # the oldest: 29 do not fit beside 73
    assert residency.touch("small") == (False, ["large"])
    assert set(residency.resident()) == {"small", "middle"} and residency.used_bytes == 32
    residency.touch("large")
    assert residency.used_bytes <= 100


@pytest.mark.parametrize("policy", ["lru", "lfu", "slru"])
def test_budget_pins_and_use_hold_under_any_stream(policy):
    rng = np.random.default_rng(3)
    sizes = {name: int(size) for name, size in zip(NAMES, rng.integers(5, 40, 6), strict=True)}
    capacity = sizes["a"] + 45
    residency = Residency(sizes, capacity, policy, pinned=["a"])
    residency.touch("a")
    used: list[str] = []
    for name in rng.choice(list(NAMES), 400):
        if used and rng.random() < 0.6:
            residency.leave(used.pop(int(rng.integers(len(used)))))
        if not residency.can_enter(str(name)):
            with pytest.raises(BadInput, match="pinned or in use"):
                residency.touch(str(name))
            continue
        here = str(name) in residency
        hit, gone = residency.touch(str(name))
        assert hit == here and not {"a", *used} & set(gone)
        assert residency.used_bytes == sum(sizes[n] for n in residency.resident()) <= capacity
        assert {"a", str(name), *used} <= set(residency.resident())
        if rng.random() < 0.5:
            residency.enter(str(name))
            used.append(str(name))


def test_what_cannot_be():
    with pytest.raises(BadInput, match="b takes 13 B, the budget is 10 B"):
        Residency({"a": 3, "b": 13}, 10)
    with pytest.raises(BadInput, match="b takes 13 B beside the pinned a"):
        Residency({"a": 3, "b": 10}, 10, pinned=["a"])
    with pytest.raises(BadInput, match="pinned z"):
        Residency({"a": 3}, 10, pinned=["z"])
    for policy in ("none", "arc", "lru:scope=layer"):
        with pytest.raises(BadInput):
            Residency({"a": 3, "b": 4}, 10, policy)
    with pytest.raises(MissingNeed, match="fate needs"):
        Residency({"a": 3}, 10, "fate")
    with pytest.raises(BadInput, match="window of 1"):
        simulate(stream("ab"), SIZES, 20, policy="belady", window=2)
    with pytest.raises(BadInput, match="no such model"):
        simulate(stream("az"), SIZES, 20)


def test_a_load_that_failed_left_nothing():
    residency = Residency(SIZES, 20)
    residency.touch("a")
    residency.forget("a")
    assert residency.used_bytes == 0 and residency.touch("a") == (False, [])


@pytest.mark.parametrize("slots", [1, 2, 4])
@pytest.mark.parametrize("seed", range(5))
def test_a_grouped_batch_switches_least(slots, seed):
    warm, batch = zipf(20, seed), zipf(24, seed + 100)
    switches = {}
    for window in (1, len(batch)):
        residency = Residency(SIZES, 10 * slots)
        for model in warm:
            residency.touch(model)
        absent = set(batch) - set(residency.resident())
        switches[window] = 0
        order = list(group(batch, residency.resident, window=window) if window == 1 else _touching(batch, residency))
        for request in order if window == 1 else []:
            switches[1] += not residency.touch(batch[request])[0]
        if window > 1:
            switches[window] = sum(missed for _, missed in order)
            assert sorted(i for i, _ in order) == list(range(len(batch)))
            assert switches[window] == len(absent) <= len(set(batch))
    assert switches[len(batch)] <= switches[1]


def _touching(batch, residency):
    """(request, missed) in grouped order, each touched as it is served."""
    for request in group(batch, residency.resident, window=len(batch)):
        yield request, not residency.touch(batch[request])[0]


def test_a_window_of_one_is_first_come_first_served():
    models = zipf(50)
    assert list(group(models, lambda: ["a", "f"], window=1)) == list(range(50))
    assert simulate(stream(models), SIZES, 20, window=1).order_N.tolist() == list(range(50))


def test_who_is_next():
    groups = [Waiting("a", 2, 0.0), Waiting("b", 5, 3.0), Waiting("c", 1, 4.0)]
    assert next_group(groups, ["c"], 5, float("inf")) == "c"  # here
    assert next_group(groups, [], 5, float("inf")) == "b"  # the largest
    assert next_group(groups, ["c"], 5, 4) == "a"  # waited too long


def test_small_groups_do_not_starve():
    models = ["b", *["a"] * 200]  # `a` is here and its requests keep coming
    order = list(group(models, lambda: ["a"], window=8))
    assert order.index(0) > 100
    for wait in (0, 10, 30):
        found = list(group(models, lambda: ["a"], window=8, max_wait=wait))
        assert found.index(0) <= wait + 8
    with pytest.raises(BadInput, match="window of 0"):
        list(group(models, list, window=0))


def test_results_come_in_the_order_of_requests():
    models = zipf(60)
    residency, calls = Residency(SIZES, 20), []

    def run(model, requests):
        assert {models[i] for i in requests} == {model}
        residency.touch(model)
        calls.append(model)
        return [f"{model}{i}" for i in requests]

    assert serve_grouped(models, residency, run, window=60) == [f"{model}{i}" for i, model in enumerate(models)]
    assert len(calls) == len(set(models))
    with pytest.raises(BadInput, match="gave 0 answers"):
        serve_grouped(models, residency, lambda model, requests: [])


def test_the_simulator_is_the_formula():
    rng = np.random.default_rng(5)
    sizes = {name: int(size) for name, size in zip(NAMES, rng.integers(1, 40, 6), strict=True)}
    costs = Costs(router=0.01, prefill=0.002, decode=0.03, bytes_per_second=500, latency=0.004)
    requests = [
        Request(model, int(rng.integers(1, 9)), int(rng.integers(0, 9)), float(at))
        for model, at in zip(zipf(80), np.cumsum(rng.exponential(0.2, 80)), strict=True)
    ]
    for window in (1, 8):
        found = simulate(requests, sizes, 60, costs, window=window)
        for request, miss, start, end in zip(requests, found.miss_N, found.start_N, found.end_N, strict=True):
            by_hand = 0.01 + miss * (0.004 + sizes[request.model] / 500) + 0.002 * request.prompt_tokens
            assert end - start == pytest.approx(by_hand + 0.03 * request.new_tokens)
            assert start >= request.arrival
        ends = np.sort(found.end_N)
        assert (np.sort(found.start_N)[1:] >= ends[:-1] - 1e-9).all()  # one at a time
    at_once = [Request(r.model, r.prompt_tokens, r.new_tokens) for r in requests]
    found = simulate(at_once, sizes, 60, costs)
    misses = found.miss_N
    total = sum(costs.request(r, sizes[r.model], bool(m)) for r, m in zip(at_once, misses, strict=True))
    assert found.seconds == pytest.approx(total)


def test_windows_cut_switches_of_a_zipf_stream():
    switches = [simulate(stream(zipf(512, 7)), SIZES, 20, window=window).switches for window in (1, 8, 64)]
    assert switches[0] > 1.5 * switches[1] > 1.5 * switches[2]
