"""Which plans are thought of, how they are ranked, and what may be chosen."""

import pytest
import torch

from moesaic.fitting.plans import Candidate, Machine, Model, candidates, choose, hits, pareto, predict, promising
from moesaic.surgery.layer import Facts

MB = 1 << 20
FACTS = [Facts(i, f"layers.{i}.mlp", i, 8, 2, 1, 1, 64, 32, MB, 4) for i in range(4)]
COUNTS = [torch.tensor([40.0, 30, 10, 8, 6, 4, 2, 0])] * 4
MODEL = Model(FACTS, 4 * MB, COUNTS)
MACHINE = Machine(1e9, 1e8)


def test_what_fits_whole_is_first_and_what_does_not_is_streamed():
    roomy = candidates(MODEL, MACHINE, 64 * MB)
    assert {"as it is", "4 bits", "prune reap to 50%"} <= {each.name for each in roomy}
    assert all(each.resident == 1 for each in roomy)
    tight = candidates(MODEL, MACHINE, 12 * MB)
    assert all(each.memory_bytes <= 12 * MB for each in tight)
    assert {each.name for each in tight if each.exact} == {"streamed"}
    assert [each.predicted for each in tight] == sorted((each.predicted for each in tight), reverse=True)


def test_without_a_text_nothing_lossy_is_thought_of_and_nothing_fits_in_nothing():
    assert [each.name for each in candidates(MODEL, MACHINE, 12 * MB, lossy=False)] == ["streamed"]
    assert candidates(MODEL, MACHINE, 4 * MB) == []


def test_fewer_experts_than_the_router_chooses_are_no_plan():
    greedy = Model([facts._replace(top_k=5) for facts in FACTS], 4 * MB, COUNTS)
    kept = {each.keep for each in candidates(greedy, MACHINE, 64 * MB) if each.method}
    assert kept == {0.75, 0.5, 0.25}
    assert {each.keep for each in candidates(greedy, MACHINE, 64 * MB) if each.method.startswith(("prune", "merge"))} == {0.75}


def test_hits_are_the_share_of_the_most_used_experts():
    assert hits(MODEL, 0, Candidate(resident=0.25)) == pytest.approx(0.7)
    assert hits(MODEL, 0, Candidate(resident=0.3125)) == pytest.approx(0.75)
    assert hits(MODEL, 0, Candidate(resident=1.0)) == 1
    assert hits(Model(FACTS, 0), 0, Candidate(resident=0.3)) == 0.3
    slow, fast = (predict(MODEL, MACHINE, Candidate(resident=r, expert_bytes=32 * MB)) for r in (0.25, 0.75))
    assert slow < fast < predict(MODEL, MACHINE, Candidate(expert_bytes=32 * MB))


def test_every_exact_plan_and_one_of_each_method_are_tried():
    tried = promising(candidates(MODEL, MACHINE, 12 * MB), 5)
    assert len(tried) == 5
    assert any(each.exact for each in tried)
    assert {each.method for each in tried} >= {"", "prune reap", "compress neurons"}


def test_bits_are_counted_from_those_that_a_weight_has():
    def sizes(model):
        return {each.name: each.memory_bytes for each in candidates(model, MACHINE, 64 * MB)}

    half, whole = sizes(MODEL), sizes(Model(FACTS, 4 * MB, COUNTS, item_bits=32))
    assert half["as it is"] == whole["as it is"] == 36 * MB
    assert half["4 bits"] - 4 * MB == 32 * MB * 4.25 / 16 == 2 * (whole["4 bits"] - 4 * MB)
    assert half["4 bits"] > half["3 bits on average"] > half["2 bits"]


def test_every_expert_may_have_its_own_bits():
    tried = promising(candidates(MODEL, MACHINE, 11 * MB), 6)
    assert any(each.name.startswith("3 bits on average") for each in tried)


def row(speed, bits, exact=False, memory=10):
    return {"tokens_per_second": speed, "bits_per_byte": bits, "exact": exact, "memory_bytes": memory}


def test_nothing_lossy_is_chosen_unasked():
    rows = [row(90, 1.01), row(100, 1.3), row(20, 1.0, exact=True)]
    assert choose(rows, None) == 2
    assert choose(rows, 0.0) == 2
    assert choose(rows, 0.02) == 0
    assert choose(rows, 0.5) == 1
    assert choose(rows[:2], None) is None
    assert choose(rows[:2], 0.5) is None  # nothing to compare with
    assert pareto([*rows, row(80, 1.02)]) == [True, True, True, False]
