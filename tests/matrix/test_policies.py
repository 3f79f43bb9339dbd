"""What every registered cache policy earns by existing: it keeps to its capacity, to its pins, and to its own replay."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "trace" / "policies"))

from routings import HOST, NAMES, SIZE, build, run, trace_of

from moesaic.core.errors import BadInput, MissingNeed
from moesaic.trace import simulate as sim
from moesaic.trace.file import from_arrays
from moesaic.trace.hardware import Hardware
from moesaic.trace.order import NEVER, in_order, next_uses
from moesaic.trace.policies import state as S
from moesaic.trace.policies.policy import Policy
from moesaic.trace.replay import history_of, shape_of
from moesaic.trace.sweep import sweep

SLOTS = (0, 1, 3, 6, 11, 24)
CACHELESS = {"none", "pre_gated"}
PRELOADED = {"static", "fiddler", "llama_cpp"}
NO_TIME = HOST.with_(link_bytes_per_second=1e-6)  # prefetch gets no byte through


@pytest.fixture(scope="module", params=[True, False], ids=["decode", "prefill"])
def trace(request):
    if request.param:
        return trace_of(11, tokens=45)
    return trace_of(12, tokens=80, decode=False, lengths=[3, 1, 1, 30, 1, 4, 40])


def live(trace, policy, slots, budget=0, check=None):
    """Drive the object as an engine would; hits, and what each event decided."""
    if policy.learns:
        policy.learn(history_of(trace, 1.0)[0])
    order = in_order(trace)
    policy.start(shape_of(trace), slots * int(trace.bytes_L.max()), NO_TIME if not budget else HOST)
    given = policy.replayed(trace, order)
    trace = trace if given.experts_TLK is None else type(trace)(trace.header, {**trace.columns, "experts": given.experts_TLK})
    next_TLK, layers, hits = next_uses(trace, order), len(trace.layers), 0
    for s in range(order.steps):
        at = slice(order.starts_N1[s], order.starts_N1[s + 1])
        rows = order.rows_T[at]
        policy.begin_step(bool(order.fresh_N[s]), len(rows) > 1)
        window = int(policy.state.note[S.WINDOW])
        if window and s % window == 0:
            policy.share_out(given.demand_WL[s // window])
        used_in_pass = set()
        for l in range(layers):
            chosen = trace.experts_TLK[rows, l].astype(int).ravel()
            ids = sorted(dict.fromkeys(chosen.tolist()), key=lambda e: -(chosen == e).sum())
            later = {int(e): n for e, n in zip(chosen, next_TLK[at, l].ravel().tolist(), strict=True)}
            scores = np.exp(trace.logits_TLE[rows, l].astype(np.float32))
            before = {(i, int(e)) for i in range(layers) for e in np.flatnonzero(policy.resident(i))}
            ahead = trace.ahead_TLAM[rows[0], l].astype(int)
            decision = policy.event(
                l, ids, [(chosen == e).sum() for e in ids], step_tokens=len(rows),
                scores_E=(scores / scores.sum(1, keepdims=True)).mean(0),
                ahead_AM=np.where(ahead == 255, -1, ahead),
                next_use=[1 << 60 if later[e] == NEVER else later[e] * layers + l for e in ids],
            )  # fmt: skip
            used_in_pass |= {(l, e) for e in ids}
            hits += int((decision.action_n == S.HIT).sum())
            assert decision.experts_n.tolist() == ids
            assert ((decision.action_n == S.HIT) == [(l, e) in before for e in ids]).all()
            assert policy.used_bytes() <= policy.capacity_bytes
            if policy.state.note[S.PINS]:
                assert not {tuple(x) for x in decision.evicted_M2.tolist()} & {(l, e) for e in ids}
            if budget:
                fetches = policy.prefetch(budget)
                assert len(fetches.fetch_N2) * SIZE <= budget
                assert not {tuple(x) for x in fetches.evicted_M2.tolist()} & used_in_pass
                assert policy.used_bytes() <= policy.capacity_bytes
                for i, e in fetches.fetch_N2.tolist():
                    assert not policy.resident(i)[e]
                    policy.arrived(i, e)
                    assert policy.resident(i)[e]
    return hits


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("slots", SLOTS)
def test_every_access_is_counted_once_and_twice_the_same(name, slots, trace):
    policy = build(name)
    one, two = run(trace, policy, slots), run(trace, policy, slots)
    np.testing.assert_array_equal(one.count_CL, two.count_CL)
    np.testing.assert_array_equal(one.time, two.time)
    c = one.count_CL
    whole = c[sim.HITS] + c[sim.LOADS] + c[sim.STREAMS] + c[sim.HOSTS] + c[sim.LATES]
    np.testing.assert_array_equal(whole, c[sim.ACCESSES])
    row = json.loads(json.dumps(one.row()))
    assert row["strict_hit_rate"] <= row["hit_rate"] <= row["warm_hit_rate"] <= 1
    assert one.used_bytes + one.wasted_bytes == c[sim.FETCHED].sum()
    assert 0 <= row["stall_seconds"] <= row["seconds"] + 1e-12
    if one.moved_bytes:
        assert row["tokens_per_second"] <= row["bound_tokens_per_second"] * (1 + 1e-9)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("slots", [0, 3, 11, 24])
def test_the_object_decides_what_the_replay_counted(name, slots, trace):
    policy = build(name, **({"oracle": True} if name == "expertflow" else {}))
    assert live(trace, policy, slots) == run(trace, policy, slots, NO_TIME).hits


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("slots", [1, 4, 11])
def test_prefetch_keeps_to_capacity_budget_and_pins(name, slots):
    policy = build(name)
    if "future" in policy.needs or name == "expertflow":
        pytest.skip("what it fetches comes from the replay")
    live(trace_of(21, tokens=30), policy, slots, budget=2 * SIZE)


@pytest.mark.parametrize("name", sorted(set(NAMES) - CACHELESS))
def test_with_room_for_all_only_first_touches_miss(name, trace):
    result = run(trace, name, 24, NO_TIME.with_(host_flops=0.0))
    c = result.count
    distinct = len({(l, e) for l in range(3) for e in np.unique(trace.experts_TLK[:, l])})
    assert int(c[sim.ACCESSES] - c[sim.HITS]) == (0 if name in PRELOADED else distinct)
    assert int(c[sim.EVICTIONS]) == 0
    assert result.row()["warm_hit_rate"] == 1


@pytest.mark.parametrize("name", sorted(set(NAMES) - {"pre_gated"}))
@pytest.mark.parametrize("seed", range(6))
def test_belady_bounds_hits_and_whoever_prefetches_in_bytes(name, seed):
    trace = trace_of(seed, tokens=50, decode=seed % 3 > 0)
    for slots in (1, 5, 9, 16):
        best, other = run(trace, "belady", slots, NO_TIME), run(trace, name, slots, NO_TIME)
        first = int(other.count[sim.FIRST_HITS])
        assert other.hits - first <= best.hits
        if build(name).where == S.MOVE and name not in PRELOADED:
            assert run(trace, name, slots).moved_bytes >= best.moved_bytes


@pytest.mark.parametrize("name", sorted(set(NAMES) - {"static", "fiddler", "edgemoe", "expertflow"}))
def test_names_of_experts_do_not_matter(name, trace):
    """Those left out break ties of equal counts by id, or learn from token ids; so does prefetch for the never used."""
    options = {"prefetch_layers": 0} if name == "moe_infinity" else {}
    renamed = np.random.default_rng(0).permutation(8)
    columns = dict(trace.columns)
    columns["experts"] = renamed[trace.experts_TLK].astype(np.uint8)
    columns["ahead"] = np.where(trace.ahead_TLAM == 255, 255, renamed[np.minimum(trace.ahead_TLAM, 7)]).astype(np.uint8)
    columns["logits"] = np.ascontiguousarray(trace.logits_TLE[..., np.argsort(renamed)])
    other = type(trace)(trace.header, columns)
    for slots in (2, 7, 13):
        one, two = (run(t, build(name, **options), slots) for t in (other, trace))
        np.testing.assert_array_equal(one.count_CL, two.count_CL)


@pytest.mark.parametrize("name", NAMES)
def test_unequal_sizes_are_counted_in_bytes(name):
    trace = trace_of(5, tokens=40, sizes=[SIZE, 2 * SIZE, SIZE // 2])
    policy = build(name)
    result = run(trace, policy, 9)
    c = result.count_CL
    assert result.count[sim.DEMANDED] <= ((c[sim.LOADS] + c[sim.STREAMS] + c[sim.LATES]) * trace.bytes_L).sum()
    assert policy.used_bytes() <= policy.capacity_bytes == 18 * SIZE


@pytest.mark.parametrize("name", NAMES)
def test_what_is_missing_is_named_or_is_a_reason(name):
    bare = trace_of(1, tokens=20, signals=False, lengths=[20])
    policy = build(name)
    lacks = policy.needs & {"ahead", "scores", "history", "tokens"} or (name == "static")
    row = next(r for r in sweep(bare, "all", [6 * SIZE], HOST) if r["policy"] == name)
    assert bool(row["reason"]) == bool(lacks)
    if lacks:
        with pytest.raises(BadInput, match=r"moesaic trace|--learn-from"):
            sweep(bare, name, [6 * SIZE], HOST)
        assert row["hit_rate"] is None
        with pytest.raises(MissingNeed):
            run(bare, build(name), 4, history=None)


@pytest.mark.parametrize("name", NAMES)
def test_negative_capacity_is_refused_and_registration_is_whole(name):
    policy = build(name)
    assert isinstance(policy, Policy) and policy.entry.name == name and policy.entry.summary
    with pytest.raises(BadInput, match="-1 bytes"):
        policy.start(shape_of(trace_of(tokens=2)), -1)


PROBE = """
import json, sys
sys.path.insert(0, sys.argv[1])
from routings import NAMES, build, run, trace_of
options = {"expertflow": {"oracle": True}}
print(json.dumps({n: run(trace_of(7, tokens=24), build(n, **options.get(n, {})), 7).count_CL.tolist()
    for n in NAMES}))
"""


def test_plain_python_counts_the_same():
    folder = str(Path(__file__).parents[1] / "trace" / "policies")
    done = subprocess.run(
        [sys.executable, "-c", PROBE, folder],
        capture_output=True,
        text=True,
        env={**os.environ, "NUMBA_DISABLE_JIT": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    for name, counts in json.loads(done.stdout).items():
        options = {"oracle": True} if name == "expertflow" else {}
        assert run(trace_of(7, tokens=24), build(name, **options), 7).count_CL.tolist() == counts, name


def test_without_a_host_nothing_runs_there():
    alone = Hardware("alone")
    for name in ("fiddler", "hybrimoe", "llama_cpp"):
        result = run(trace_of(2, tokens=30), name, 6, alone)
        assert result.count[sim.HOSTS] == 0 and result.seconds < np.inf


@pytest.mark.parametrize("name", NAMES)
def test_awkward_traces(name):
    """Layers of unequal numbers of experts, more than 256 of them, empty slots, tokens that a layer does not see."""
    rng = np.random.default_rng(3)
    experts = [4, 300, 6]
    ids = np.stack([rng.integers(0, e, (30, 2)) for e in experts], 1)
    ids[rng.random(ids.shape) < 0.2] = -1
    ids[5:9, 2] = -1
    ahead = np.full((30, 3, 2, 4), 65535)
    for d in (1, 2):
        for l in range(3 - d):
            ahead[:, l, d - 1] = rng.integers(0, experts[l + d], (30, 4))
    trace = from_arrays(
        ids, experts, lengths=[10, 1, 19], decode=True, expert_bytes=SIZE, ahead_TLAM=ahead,
        logits_TLE=rng.normal(size=(30, 3, 300)), tokens_T=rng.integers(0, 9, 30),
    )  # fmt: skip
    for slots in (2, 40, 310):
        policy = build(name)
        result = run(trace, policy, slots)
        c = result.count
        assert c[sim.CHOICES] == (ids >= 0).sum() or name == "pre_gated"
        assert c[sim.HITS] + c[sim.LOADS] + c[sim.STREAMS] + c[sim.HOSTS] + c[sim.LATES] == c[sim.ACCESSES]
        held = policy.state.cell[S.RESIDENT] != S.ABSENT
        assert not held[0, 4:].any() and not held[2, 6:].any()
        assert policy.used_bytes() <= policy.capacity_bytes
