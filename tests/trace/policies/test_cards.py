"""What must hold of each policy, from its card.

Not here, because they belong to other parts: bit widths (EdgeMoE, Fate, Mixtral-offloading), surgery and training of
routers (Read-ME, Pre-gated), expert deferral (kTransformers), outputs of a live engine.
"""

from __future__ import annotations

import numpy as np
import pytest
from routings import HOST, SIZE, build, ids_of, run, shape_of, trace_of

from moesaic.core.errors import BadInput
from moesaic.trace import simulate as sim
from moesaic.trace.file import from_arrays
from moesaic.trace.order import in_order
from moesaic.trace.policies import state as S
from moesaic.trace.policies.allocation import split
from moesaic.trace.policies.batching import next_batch
from moesaic.trace.policies.history import History
from moesaic.trace.policies.learned import EPSILON, mix, path_key, store_request
from moesaic.trace.policies.masks import mask
from moesaic.trace.policies.policy import Shape
from moesaic.trace.policies.regroup import objective, regroup, regrouped
from moesaic.trace.replay import history_of

FAST = HOST.with_(link_bytes_per_second=1e15)
SLOW = HOST.with_(link_bytes_per_second=1e-6)


def started(name, slots=6, history=None, hardware=HOST, **options):
    policy = build(name, **options)
    if history is not None:
        policy.learn(history)
    policy.start(shape_of(), slots * SIZE, hardware)
    return policy


def requests(*traces):
    """A history of several one-request traces [T, L, K]."""
    ids = np.concatenate(traces)
    trace = from_arrays(ids, 8, lengths=[len(t) for t in traces], decode=True, expert_bytes=SIZE)
    return History(trace, in_order(trace), "a test")


# MoE-Infinity


def test_counts_of_a_pass_add_up_and_requests_are_sums_of_passes():
    trace = trace_of(3, tokens=30, decode=False, lengths=[30])
    policy = build("moe_infinity")
    run(trace, policy, 6, history=None)
    assert policy.state.real[S.REQUEST].sum(1).tolist() == [60, 60, 60]
    for l in range(3):
        want = np.bincount(trace.experts_TLK[:, l].ravel(), minlength=8)
        assert policy.state.real[S.REQUEST, l].tolist() == want.tolist()


def test_a_repeated_request_is_believed_to_be_what_it_was_whatever_its_length():
    one, two = ids_of(1, 12), ids_of(99, 12)
    policy = started("moe_infinity", history=requests(two, np.concatenate([one] * 5), two[:4]))
    policy.begin_step(fresh=True)
    for row in one:
        policy.begin_step()
        for l in range(3):
            policy.event(l, row[l])
    assert policy.state.note[S.BEST] == 1
    for l in range(3):
        want = np.bincount(one[:, l].ravel(), minlength=8) / (12 * 2)
        np.testing.assert_allclose(policy.state.real[S.KEEP, l], want + EPSILON)


def test_a_match_looks_at_no_layer_that_was_not_reached():
    """Two stored requests differ in the last layer only: the first two layers cannot tell them apart."""
    one = ids_of(1, 6)
    two = one.copy()
    two[:, 2] = [6, 7]  # of another norm, too
    policy = started("moe_infinity", history=requests(one, two))
    policy.begin_step(fresh=True)
    for l in (0, 1):
        policy.event(l, one[0, l])
        values = policy.memory.dots_N[:2] ** 2 * policy.memory.norms_PLN[0, l + 1, :2]
        assert values[0] == values[1]


def test_a_uniform_belief_evicts_the_deepest_layer_first():
    policy = started("moe_infinity", slots=6, prefetch_layers=0)
    policy.state.real[S.KEEP] = 0.125
    policy.state.note[S.RULE] = S.GIVEN
    policy.begin_step(fresh=True)
    for l in range(3):
        policy.event(l, [0, 1])
    policy.begin_step()
    gone = [tuple(x) for x in policy.event(0, [2, 3]).evicted_M2]
    assert {layer for layer, _ in gone} == {2} and len(gone) == 2


def test_a_full_library_gives_up_the_entry_most_like_the_new_one():
    memory = S.new_memory(3, 8, 4)
    entries = [np.eye(3, 8, k=i) + 0.01 for i in range(4)]
    for entry in entries:
        store_request(memory, 0, entry)
    before = memory.library_PLEN.copy()
    store_request(memory, 0, entries[2] * 7)
    np.testing.assert_allclose(memory.library_PLEN[0, :, :, 2], entries[2] * 7)
    for i in (0, 1, 3):
        np.testing.assert_array_equal(memory.library_PLEN[..., i], before[..., i])
    assert not memory.library_PLEN[1].any(), "prefill has a library of its own"


def families(seed, requests=40, tokens=8, parts=8, layers=6, stray=0.1):
    """Requests of so many families; each uses its own 4 experts of every layer, but for strays."""
    rng = np.random.default_rng(seed)
    rows = []
    for r in range(requests):
        own = 4 * rng.integers(parts) + ids_of(seed + r, tokens, layers, 4, 2, stay=0.0, skew=0.0)
        strays = rng.random(own.shape[:2]) < stray
        rows.append(np.where(strays[..., None], (own + 4 * rng.integers(1, parts)) % (4 * parts), own))
    return rows


def test_matching_requests_beats_recency_and_frequency_when_requests_repeat_families():
    trace = from_arrays(np.concatenate(families(0)), 32, lengths=[8] * 40, decode=True, expert_bytes=SIZE)
    history, rest = history_of(trace, 0.5)
    shuffled = np.random.default_rng(1).permuted(np.tile(np.arange(32), (6, 1)), axis=1)
    ids = np.stack([shuffled[l][trace.experts_TLK[:, l]] for l in range(6)], 1)
    other = from_arrays(ids, 32, lengths=[8] * 40, decode=True, expert_bytes=SIZE)
    wrong = History(other, history.order, "a shuffled library")
    quick = HOST.with_(link_bytes_per_second=1e12)
    for slots in (20, 36):
        rates = {n: run(trace, n, slots, quick, history=None, sequences=rest).hit_rate for n in ("lru", "lfu", "belady")}
        good, bad = (run(trace, "moe_infinity", slots, quick, history=h, sequences=rest).hit_rate for h in (history, wrong))
        assert good > max(rates["lru"], rates["lfu"]) + 0.05 and good > bad + 0.05


def test_prefill_and_decoding_are_not_mixed():
    trace = trace_of(3, tokens=40)
    runs = np.array([[0, 0, 10, 10], [0, 1, 20, 1], [1, 21, 10, 10]])
    mixed = type(trace)(trace.header, {**trace.columns, "runs": runs})
    found = History(mixed, in_order(mixed), "").requests
    assert [phase for phase, _ in found] == [1, 0, 1]
    assert [counts.sum() for _, counts in found] == [60, 120, 60]


# Fate


def recall(trace, width):
    found = total = 0
    for l in range(2):
        guess = trace.ahead_TLAM[:, l, 0, :width]
        found += (trace.experts_TLK[:, l + 1, :, None] == guess[:, :, None][:, None, :, 0]).any(-1).sum()
        total += trace.experts_TLK[:, l + 1].size
    return found / total


def test_recall_grows_with_the_expansion_and_is_whole_at_all_experts():
    trace = trace_of(4, tokens=30, k=2, experts=4)
    values = [recall(trace, w) for w in (2, 3, 4)]
    assert values == sorted(values) and values[-1] == 1
    misses = [run(trace, build("fate", extra=e), 12, FAST).count_CL[sim.LOADS, 1:].sum() for e in (0, 1, 2)]
    assert misses == sorted(misses, reverse=True) and misses[0] > misses[-1] == 0


def test_a_right_prediction_with_a_fast_link_leaves_misses_to_the_first_layer():
    trace = trace_of(4, tokens=40)
    columns = dict(trace.columns)
    ahead = np.full((40, 3, 1, 2), 255, np.uint8)
    ahead[:, :2, 0] = trace.experts_TLK[:, 1:]
    columns["ahead"] = ahead
    exact = type(trace)(trace.header, columns)
    result = run(exact, build("fate", shallow=0), 9, FAST)
    assert result.hit_rate_L[1:].tolist() == [1, 1] and result.hit_rate_L[0] < 1


def test_shallow_layers_never_miss_once_they_are_warm():
    result = run(trace_of(5, tokens=90), build("fate", shallow=2), 18, SLOW)
    c = result.count_CL
    assert (c[sim.ACCESSES] - c[sim.HITS])[:2].tolist() == [8, 8]
    assert c[sim.EVICTIONS, :2].sum() == 0 and c[sim.EVICTIONS, 2] > 0


def test_no_room_for_deep_layers_is_loading_on_demand_there():
    result = run(trace_of(5, tokens=40), build("fate", shallow=2), 16, SLOW)
    assert result.hit_rate_L[2] == 0 and result.count_CL[sim.STREAMS, 2] == result.count_CL[sim.ACCESSES, 2]


def test_a_prompt_is_taken_most_tokens_first():
    trace = trace_of(6, tokens=40, decode=False, lengths=[40])
    seen = []
    policy = build("fate")
    run(trace, policy, 6)
    n = len(np.unique(trace.experts_TLK[:, 2]))
    policy.state.event[S.VOTES] = 0
    sim.gather(policy.state, 2, trace.experts_TLK.astype(np.uint16), np.zeros((0, 1, 1), np.int32), 0, 40)
    seen = policy.state.event[S.TOKENS, :n].tolist()
    assert seen == sorted(seen, reverse=True) and sum(seen) == 80


# ExpertFlow


@pytest.mark.parametrize("method", ["largest_remainder", "highest_averages"])
@pytest.mark.parametrize("seed", range(15))
def test_slots_add_up_to_the_capacity_and_fit_their_layers(method, seed):
    rng = np.random.default_rng(seed)
    layers = int(rng.integers(1, 7))
    experts = rng.integers(1, 9, layers)
    capacity = int(rng.integers(0, experts.sum() + 1))
    slots = split(capacity, experts, np.ones(layers, int), rng.integers(0, 20, layers), method)
    assert slots.sum() == capacity and (slots <= experts).all() and (slots >= 0).all()
    even = split(layers * 2, np.full(layers, 8), np.ones(layers, int), np.full(layers, 3.0), method)
    assert even.tolist() == [2] * layers


def test_slots_of_the_papers_example():
    assert split(4, [8, 8], [1, 1], [3, 2], "highest_averages").tolist() == [3, 1]
    assert split(4, [8, 8], [1, 1], [3, 2], "largest_remainder").tolist() == [2, 2]


def test_two_separable_groups_are_found_and_the_objective_halves():
    active = np.zeros((16, 40), bool)
    rng = np.random.default_rng(0)
    for row in range(16):
        half = 20 * (row % 2)
        active[row, half + rng.permutation(20)[:15]] = True
    first = regroup(active)
    assert set(np.flatnonzero(first) % 2) in ({0}, {1}) and first.sum() == 8
    given = np.arange(16) < 8
    assert objective(active, first) * 2 == objective(active, given) == 80


@pytest.mark.parametrize("seed", range(10))
def test_regrouping_never_needs_more_and_keeps_sizes_and_rows(seed):
    rng = np.random.default_rng(seed)
    active = rng.random((int(rng.integers(2, 14)), 12)) < 0.3
    first = regroup(active)
    given = np.arange(len(active)) < (len(active) + 1) // 2
    assert objective(active, first) <= objective(active, given) and first.sum() == given.sum()
    assert sorted(regrouped(active, 3)) == list(range(len(active)))


def test_an_oracle_with_room_and_time_never_misses():
    trace = trace_of(7, tokens=40)
    result = run(trace, build("expertflow", oracle=True), 9, FAST, resident_bytes=3e9)
    assert result.hit_rate == 1 and result.wasted_bytes == 0
    with pytest.raises(AssertionError):
        assert run(trace, build("expertflow", oracle=True), 9, SLOW).hit_rate == 1


def test_regrouped_batches_need_fewer_experts():
    rows = families(1, requests=16, tokens=6, parts=2, layers=3)
    trace = from_arrays(np.concatenate(rows), 8, lengths=[6] * 16, expert_bytes=SIZE)
    one, two = (run(trace, build("expertflow", oracle=True, regroup=r), 9, batch=4).accesses for r in (True, False))
    assert one < two


def test_the_predictor_learns_what_follows_from_token_ids():
    rng = np.random.default_rng(0)
    table = rng.permuted(np.tile(np.arange(8), (3, 20, 1)), axis=2)[:, :, :2]
    tokens = rng.integers(0, 20, 600)
    ids = np.stack([table[l][tokens] for l in range(3)], 1)
    trace = from_arrays(ids, 8, lengths=[60] * 10, decode=True, expert_bytes=SIZE, tokens_T=tokens)
    history, rest = history_of(trace, 0.5)
    policy = build("expertflow", steps=60)
    result = run(trace, policy, 12, FAST, history=history, sequences=rest)
    assert (result.hit_rate > 0.9 and "predictor finds 9" in result.notes[0]) or "100" in result.notes[0]


# EdgeMoE


def test_a_deterministic_path_is_foreseen_and_an_unseen_one_falls_back_to_what_is_usual():
    path = np.array([[[0, 1], [2, 3], [4, 5]], [[6, 7], [1, 2], [0, 3]]] * 4)
    policy = started("edgemoe", slots=12, history=requests(path))
    policy.begin_step()
    policy.event(0, [1, 0])  # a set: the order does not matter
    assert policy.prefetch(10 * SIZE).fetch_N2.tolist() == [[1, 2], [1, 3]]
    policy.begin_step()
    policy.event(0, [2, 5])
    policy.prefetch(0)
    usual = policy.memory.usual_LM[1].tolist()
    assert policy.state.cell[S.WANT, 1, :2].tolist() == usual == [2, 1]


def test_what_is_foreseen_is_what_the_trace_counts():
    """Every (layer, two sets before it) of a trace: all that followed, the most frequent first; their shares sum to 1."""
    ids = np.stack([np.random.default_rng(seed).permuted(np.tile(np.arange(4), (3, 1)), axis=1)[:, :2] for seed in range(120)])
    found = started("edgemoe", history=requests(ids)).memory
    wide = requests(ids).paths(8)
    counted = {}
    for token in ids.tolist():
        for layer in (1, 2):
            sets = tuple(tuple(sorted(each)) for each in token[max(0, layer - 2) : layer])
            after = counted.setdefault((layer, sets), np.zeros(8, int))
            after[token[layer]] += 1
    assert len(counted) == len(wide[0]) == len(found.keys_P)
    for (layer, sets), count_E in counted.items():
        now, before = (int(mix(np.asarray(each)).sum()) if each else 0 for each in (sets[-1], sets[0] if sets[1:] else ()))
        (row,) = np.flatnonzero(wide[0] == path_key(before, now, layer))
        listed = [int(e) for e in wide[1][row] if e >= 0]
        assert sorted(listed) == np.flatnonzero(count_E).tolist()
        shares = count_E[listed] / count_E.sum()
        assert shares.sum() == pytest.approx(1) and (np.diff(shares) <= 0).all()
        assert found.next_PM[row].tolist() == [*listed, -1][:2]


def test_at_equal_frequency_the_layer_that_has_just_run_is_evicted_from():
    policy = started("edgemoe", slots=6, history=requests(np.array([[[0, 1]] * 3])))
    policy.state.real[S.KEEP] = 1.0
    policy.begin_step()
    for l in range(3):
        policy.event(l, [0, 1])
    policy.state.real[S.KEEP] = 1.0
    policy.begin_step()
    gone = [tuple(x) for x in policy.event(2, [2, 3]).evicted_M2]
    assert {layer for layer, _ in gone} == {2}, "although layer 0 ran longer ago"


# HybriMoE


def scored(policy, layer, scores, experts=(0, 1)):
    policy.event(layer, list(experts), scores_E=np.asarray(scores, float))
    return policy.state.real[S.KEEP, layer].copy()


def test_smoothed_scores():
    rng = np.random.default_rng(0)
    steps = rng.dirichlet(np.ones(8), 6)
    policy = started("hybrimoe", ahead=0, alpha=1.0)
    kept = scored(policy, 0, steps[0])
    top = np.argsort(-steps[0])[:4]
    np.testing.assert_allclose(kept[top], steps[0][top])
    assert (np.delete(kept, top) == 0).all()
    frozen = started("hybrimoe", ahead=0, alpha=0.0)
    assert not any(scored(frozen, 0, s).any() for s in steps)
    policy = started("hybrimoe", ahead=0, alpha=0.5)
    first = scored(policy, 0, [0.9, 0.1, 0, 0, 0, 0, 0, 0])
    for i in range(1, 6):
        kept = scored(policy, 0, [0, 0, 0.3, 0.3, 0.2, 0.2, 0, 0])
        assert kept[0] == pytest.approx(first[0] / 2**i)


def test_sigmoid_scores_are_normalised():
    trace = trace_of(3, tokens=4)
    policy = build("hybrimoe", ahead=0, scores="sigmoid", alpha=1.0, top=8)
    run(trace, policy, 6)
    x = 1 / (1 + np.exp(-trace.logits_TLE[-1].astype(float)))
    np.testing.assert_allclose(policy.state.real[S.KEEP], x / x.sum(1, keepdims=True), rtol=1e-6)


def test_prefetch_takes_what_shortens_the_schedule_and_stops_when_nothing_does():
    policy = started("hybrimoe", slots=12)
    policy.begin_step()
    ahead = np.array([[3, 4], [5, 6]])
    policy.event(0, [0, 1], scores_E=np.full(8, 0.125), ahead_AM=ahead)
    fetched = policy.prefetch(100 * SIZE).fetch_N2.tolist()
    assert fetched[0] == [1, 3] and {tuple(x) for x in fetched} <= {(1, 3), (1, 4), (2, 5), (2, 6)}


# Mixtral-offloading


def test_a_wrong_speculation_leaves_the_lru_as_it_was():
    one, two = started("mixtral_offloading", 11), started("mixtral_offloading", 11, speculate=0, staging=4)
    rng = np.random.default_rng(0)
    for _ in range(30):
        for policy in (one, two):
            policy.begin_step()
        for l in range(3):
            ids = rng.permutation(7)[:2]
            for policy in (one, two):
                policy.event(l, ids, ahead_AM=np.array([[7, 7]]))  # expert 7 is never used
            for fetch in one.prefetch(9 * SIZE).fetch_N2.tolist():
                assert fetch == [l + 1, 7]
                one.arrived(*fetch)
    assert one.staging_bytes == 4 * SIZE
    held = (one.state.layer[S.FILLED]).tolist()
    for l in range(3):
        recent = [e for e in np.argsort(-one.state.cell[S.STAMPED, l]) if one.state.cell[S.STAMPED, l, e]]
        assert set(np.flatnonzero(one.state.cell[S.RESIDENT, l] == S.HERE)) == set(recent[: held[l]])


def test_a_right_speculation_is_a_hit_and_takes_the_oldest_place():
    policy = started("mixtral_offloading", 11)
    policy.begin_step()
    for l in range(3):
        policy.event(l, [0, 1], ahead_AM=np.array([[4, 5]]))
    policy.begin_step()
    policy.event(0, [0, 1], ahead_AM=np.array([[4, 5]]))
    for fetch in policy.prefetch(9 * SIZE).fetch_N2.tolist():
        policy.arrived(*fetch)
    decision = policy.event(1, [4, 5], ahead_AM=np.array([[4, 5]]))
    assert decision.action_n.tolist() == [S.HIT, S.HIT] and policy.resident(1)[[4, 5]].all()
    assert policy.state.note[S.STAGE_ROOM] == policy.staging_bytes


# Pre-gated


def test_pre_gated_misses_nothing_but_the_first_layer_where_copying_is_fast():
    trace = trace_of(8, tokens=30)
    result = run(trace, "pre_gated", 8, FAST)
    assert result.hit_rate_L.tolist() == [0, 1, 1] and not result.exact
    resident = run(trace, build("pre_gated", routing="recorded"), 24, FAST.with_(link_bytes_per_second=1e18))
    lru = run(trace, "lru", 24, FAST.with_(link_bytes_per_second=1e18))
    assert resident.seconds == pytest.approx(lru.seconds, rel=1e-6)
    assert "agree with" in result.notes[0]


def test_pre_gated_makes_a_decision_for_every_layer():
    trace = trace_of(8, tokens=30)
    policy = build("pre_gated")
    run(trace, policy, 8)
    moved = policy.replayed(trace, in_order(trace)).experts_TLK
    assert moved.shape == trace.experts_TLK.shape and (moved != trace.empty).all()
    np.testing.assert_array_equal(moved[:, 0], trace.experts_TLK[:, 0])
    np.testing.assert_array_equal(moved[:, 1], trace.ahead_TLAM[:, 0, 0, :2])


# Read-ME


def test_belady_misses_least_and_as_many_as_lru_where_nothing_returns():
    for seed in range(8):
        trace = trace_of(seed, tokens=40)
        best = run(trace, build("read_me", ahead=0), 5).hits
        assert best >= max(run(trace, build(n, scope="global"), 5).hits for n in ("lru", "lfu"))
    once = from_arrays(np.arange(30).reshape(30, 1, 1), 30, decode=True, expert_bytes=SIZE)
    assert run(once, build("read_me", ahead=0), 1).hits == run(once, "lru", 1).hits == 0


def test_a_nearer_horizon_knows_less():
    trace = trace_of(9, tokens=80)
    hits = [run(trace, build("read_me", ahead=0, horizon=h), 9).hits for h in (1, 4, 0)]
    assert hits[0] <= hits[1] <= hits[2] and hits[0] < hits[2]


def test_the_batcher_starves_nobody_and_takes_the_longest_queue_first():
    rng = np.random.default_rng(0)
    waiting = [(int(e), int(t)) for e, t in zip(rng.integers(0, 7, 50), rng.integers(1, 90, 50), strict=True)]
    assert {waiting[i][0] for i in next_batch([0, 1, 1, 2], [1, 1, 1, 1], 2) and [1, 2]}
    assert next_batch([0, 1, 1, 2], [1, 1, 1, 1], 2) == [1, 2]
    rounds = 0
    while waiting:
        chosen = next_batch([e for e, _ in waiting], [t for _, t in waiting], 64)
        assert chosen and (len(chosen) == 1 or sum(waiting[i][1] for i in chosen) <= 64)
        waiting = [w for i, w in enumerate(waiting) if i not in chosen]
        rounds += 1
    assert rounds <= 50
    with pytest.raises(BadInput, match="max_tokens 0"):
        next_batch([0], [1], 0)


# Static masks, and no cache


def test_masks():
    rng = np.random.default_rng(0)
    counts, shape = rng.integers(0, 99, (4, 6)), Shape(np.full(4, 6), np.ones(4, int), 2)
    best = mask("frequency", 9, shape, counts)
    assert best.sum() == 9
    for seed in range(20):
        other = mask("random", 9, shape, seed=seed)
        assert other.sum() == 9 and counts[best].sum() >= counts[other].sum()
    assert mask("uniform", 9, shape, counts).sum(1).tolist() == [3, 2, 2, 2]
    assert mask("front_loading", 9, shape).sum(1).tolist() == [6, 3, 0, 0]
    assert mask("back_loading", 9, shape).sum(1).tolist() == [0, 0, 0, 6]
    with pytest.raises(BadInput, match="nonsense"):
        build("static", mask="nonsense")


def test_static_learnt_from_what_it_replays_hits_as_its_counts_say():
    trace = trace_of(3, tokens=60)
    counts = np.stack([np.bincount(trace.experts_TLK[:, l].ravel(), minlength=8) for l in range(3)])
    result = run(trace, "static", 7)
    assert result.hits == np.sort(counts.ravel())[-7:].sum()
    assert "itself" in result.notes[-1]


def test_without_a_cache_bytes_are_the_active_experts_or_whole_layers():
    trace = trace_of(3, tokens=30)
    active, dense = run(trace, "none", 12), run(trace, build("none", dense=True), 12)
    assert active.hits == dense.hits == 0
    assert active.moved_bytes == 30 * 3 * 2 * SIZE and dense.moved_bytes == 30 * 3 * 8 * SIZE


def test_a_prompt_loads_each_active_expert_once_per_layer():
    trace = trace_of(3, tokens=50, decode=False, lengths=[50])
    result = run(trace, "lru", 4)
    active = sum(len(np.unique(trace.experts_TLK[:, l])) for l in range(3))
    assert result.moved_bytes == active * SIZE


def test_bypassing_prompts_protect_what_decoding_uses():
    ids = ids_of(5, 200, 3, 16, 2)
    trace = from_arrays(ids, 16, lengths=[40] * 5, expert_bytes=SIZE)
    runs = np.array([[s, 9 * s + i, *n] for s in range(5) for i, n in enumerate([(24, 24), (16, 1)])])
    runs[1::2, 1] = runs[::2, 1] + 1
    mixed = type(trace)(trace.header, {**trace.columns, "runs": runs})
    one, two = (run(mixed, build("lru", bypass_tokens=b), 12) for b in (8, 0))
    assert one.count[sim.EVICTIONS] < two.count[sim.EVICTIONS]


def test_lfu_with_a_half_life_turns_to_new_habits():
    old, new = np.tile([[[0, 1]]], (60, 1, 1)), np.tile([[[2, 3]], [[4, 5]]], (20, 1, 1))
    trace = from_arrays(np.concatenate([old, new]), 8, decode=True, expert_bytes=SIZE)
    plain, short = (run(trace, build("lfu", half_life=h), 4).hits for h in (0, 5))
    assert short > plain
    with pytest.raises(BadInput, match="half_life"):
        build("lfu", half_life=3, while_resident=True)


def test_arcs_lists_stay_whole_under_prefetch():
    trace = trace_of(12, tokens=120, experts=16)
    policy = build("fate", shallow=0, extra=1)
    run(trace, policy, 15, HOST.with_(link_bytes_per_second=3e10), resident_bytes=3e6)
    c = policy.state
    here = (c.cell[S.RESIDENT] == S.HERE) | (c.cell[S.RESIDENT] == S.COMING)
    np.testing.assert_array_equal(here, (c.cell[S.PART] == 1) | (c.cell[S.PART] == 2))
    for part in range(1, 5):
        assert c.layer[S.PARTS + part].tolist() == (c.cell[S.PART] == part).sum(1).tolist()
    size = c.group[S.CAPACITY] // SIZE
    assert (c.layer[S.PARTS + 1 : S.PARTS + 5].sum(0) <= 2 * size).all()


def test_a_guess_does_not_push_out_what_is_believed_in_too():
    policy = started("expertflow", 6, oracle=True)
    policy.begin_step()
    for l in range(3):
        policy.event(l, [4, 3])  # 3 is the older one
    policy.begin_step()
    policy.event(0, [0, 1])
    policy.expect(1, [3, 5])
    fetches = policy.prefetch(9 * SIZE)
    assert fetches.fetch_N2.tolist()[0] == [1, 5] and fetches.evicted_M2.tolist() == [[1, 4]]


def test_a_wrong_guess_is_the_first_to_leave():
    policy = started("expertflow", 6, oracle=True)
    policy.begin_step()
    for l in range(3):
        policy.event(l, [4, 3])
    policy.begin_step()
    policy.event(0, [4, 3])
    policy.expect(1, [5])
    assert policy.prefetch(9 * SIZE).fetch_N2.tolist() == [[1, 5]]
    policy.arrived(1, 5)
    policy.event(1, [4])  # not 5
    policy.begin_step()
    assert policy.event(1, [6]).evicted_M2.tolist() == [[1, 5]]


def test_a_preloaded_hybrid_cache_is_full_and_may_change():
    trace = trace_of(13, tokens=60)
    policy = build("hybrimoe", preload=True, host=False)
    result = run(trace, policy, 12)
    assert result.preloaded_bytes == 12 * SIZE and result.count[sim.EVICTIONS] > 0
    assert run(trace, build("hybrimoe", preload=True), 24).hit_rate == 1
