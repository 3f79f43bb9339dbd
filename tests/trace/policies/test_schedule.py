"""HybriMoE's schedule and Fiddler's rule against brute force, and the time model."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from routings import HOST, SIZE, build, run, shape_of, trace_of

from moesaic.core.errors import BadInput
from moesaic.trace import simulate as sim
from moesaic.trace.hardware import KNOWN, Hardware
from moesaic.trace.policies import schedule
from moesaic.trace.policies import state as S


def makespan(hw, tokens, cached, on_host):
    """One assignment, by definition: cached first on the device, then what is moved, in order."""
    gpu = sum(hw.t_gpu(t, SIZE) for t, c, h in zip(tokens, cached, on_host, strict=True) if c and not h)
    cpu = sum(hw.t_cpu(t, SIZE) for t, h in zip(tokens, on_host, strict=True) if h)
    moved = 0.0
    for t, c, h in zip(tokens, cached, on_host, strict=True):
        if not c and not h:
            moved += hw.t_move(SIZE)
            gpu = max(gpu, moved) + hw.t_gpu(t, SIZE)
    return max(gpu, cpu)


def greedy(hw, tokens, cached):
    n = len(tokens)
    order, host = np.zeros(n, np.int64), np.zeros(n, np.int64)
    span = schedule.two_ended(hw.array(), SIZE, np.array(tokens), np.array(cached, np.int64), n, order, host)
    return span, host.astype(bool).tolist()


@pytest.mark.parametrize("seed", range(40))
def test_two_ended_greedy_against_all_assignments(seed):
    rng = np.random.default_rng(seed)
    n = int(rng.integers(1, 9))
    tokens = sorted(rng.integers(1, 64, n).tolist(), reverse=True)
    cached = rng.integers(0, 2, n).astype(bool).tolist()
    hw = Hardware("t", 10 ** rng.uniform(8, 11), 0.0, 1e12, 10 ** rng.uniform(9, 12), 0.0, 1e11, 10 ** rng.uniform(9, 12), 0.0)
    span, host = greedy(hw, tokens, cached)
    every = {way: makespan(hw, tokens, cached, way) for way in itertools.product([False, True], repeat=n)}
    assert span == pytest.approx(every[tuple(host)])
    assert min(every.values()) <= span * (1 + 1e-12)
    assert span <= min(every[(True,) * n], every[(False,) * n]) * (1 + 1e-12)
    assert span <= 2.5 * min(every.values())


def test_the_greedy_is_near_the_best_on_the_whole():
    ratios = []
    for seed in range(200):
        rng = np.random.default_rng(seed)
        n = int(rng.integers(2, 8))
        tokens = sorted(rng.integers(1, 9, n).tolist(), reverse=True)
        cached = rng.integers(0, 2, n).astype(bool).tolist()
        hw = Hardware("t", 1e9, 0.0, 1e12, 5e9, 0.0, 1e11, 2.5e9, 0.0)
        best = min(makespan(hw, tokens, cached, way) for way in itertools.product([False, True], repeat=n))
        ratios.append(greedy(hw, tokens, cached)[0] / best)
    assert np.mean(ratios) < 1.1


def test_an_endlessly_slow_side_is_not_used():
    tokens, cached = [9, 5, 2, 1], [True, False, True, False]
    no_cpu = HOST.with_(host_flops=1e-6)
    assert greedy(no_cpu, tokens, cached)[1] == [False] * 4
    no_link = HOST.with_(link_bytes_per_second=1e-6, device_flops=1e15, device_bytes_per_second=1e15)
    assert greedy(no_link, tokens, cached)[1] == [False, True, False, True]


def test_every_active_expert_runs_exactly_once():
    policy = build("hybrimoe", ahead=0)
    policy.start(shape_of(), 6 * SIZE, HOST)
    for seed in range(20):
        ids = np.random.default_rng(seed).permutation(8)[:4]
        decision = policy.event(0, ids, [4, 3, 2, 1], scores_E=np.full(8, 0.125))
        assert sorted(decision.experts_n) == sorted(ids)
        assert not (decision.on_host_n & (decision.action_n == S.LOAD) & policy.resident(0)[ids]).any()


def fiddler(**options):
    """A Fiddler with an empty device, and what it runs on the host for misses with the given tokens."""
    policy = build("fiddler", **options)
    trace = trace_of(tokens=3, layers=1, experts=12)
    run(trace, policy, 0)

    def host(tokens):
        return policy.event(0, range(len(tokens)), tokens).on_host_n.tolist()

    return host


def test_fiddler_runs_fewer_than_ten_tokens_on_the_host_with_the_default_constants():
    host = fiddler(measured=False)
    assert [host([n])[0] for n in range(1, 15)] == [True] * 9 + [False] * 5


@pytest.mark.parametrize("seed", range(10))
def test_fiddlers_rule_is_the_least_sum_and_its_makespan_variant_is_never_longer(seed):
    rng = np.random.default_rng(seed)
    tokens = sorted(rng.integers(1, 25, int(rng.integers(1, 9))).tolist(), reverse=True)

    def sums(way):
        return sum(7 * t for t, h in zip(tokens, way, strict=True) if h), sum(70 for h in way if not h)

    every = list(itertools.product([False, True], repeat=len(tokens)))
    each, longest = fiddler(measured=False)(tokens), fiddler(measured=False, objective="makespan")(tokens)
    assert sum(sums(each)) == min(sum(sums(way)) for way in every)
    assert max(sums(longest)) == min(max(sums(way)) for way in every) <= max(sums(each))


def test_fiddlers_makespan_of_many_misses_is_never_longer_either():
    tokens = [30, 20, 15, 12, 11, 9, 8, 7, 5, 3, 2, 1]
    ways = [fiddler(measured=False, objective=o)(tokens) for o in ("makespan", "sum")]
    spans = [max(sum(7 * t for t, h in zip(tokens, w, strict=True) if h), 70 * w.count(False)) for w in ways]
    assert spans[0] <= spans[1]


def test_fiddler_pays_nothing_for_what_is_resident():
    result = run(trace_of(tokens=30), "fiddler", 24)
    assert result.hit_rate == 1 and result.moved_bytes == 0 and result.time[sim.STALL] == 0


def test_llama_cpp_holds_whole_layers_and_copies_for_long_prompts():
    policy = build("llama_cpp")
    run(trace_of(tokens=3), policy, 17)
    assert [int(policy.resident(l).sum()) for l in range(3)] == [0, 8, 8]
    decode = run(trace_of(tokens=30), "llama_cpp", 17)
    assert decode.count[sim.HOSTS] == decode.count_CL[sim.ACCESSES, 0] and decode.moved_bytes == 0
    short = run(trace_of(tokens=31, decode=False, lengths=[31]), "llama_cpp", 17)
    long = run(trace_of(tokens=32, decode=False, lengths=[32]), "llama_cpp", 17)
    assert short.count[sim.STREAMS] == long.count[sim.HOSTS] == 0
    assert short.count[sim.HOSTS] > 0 and long.count[sim.STREAMS] > 0


def test_times_by_hand():
    """One token, one layer, two experts: both missing, one after the other over the link, the first computed meanwhile."""
    hw = Hardware("hand", 1e6, 0.5, 1e9, 1e30, 0.25)
    trace = trace_of(tokens=1, layers=1, experts=4, k=2, signals=False, lengths=[1])
    result = run(trace, "lru", 4, hw, resident_bytes=0)
    move, compute = 0.5 + SIZE / 1e6, 0.25 + SIZE / 1e9
    assert result.seconds == pytest.approx(0.25 + 2 * move + compute)
    assert result.time[sim.STALL] == pytest.approx(2 * move + compute - 2 * compute)
    assert result.row()["tokens_per_second"] == pytest.approx(1 / result.seconds)
    assert result.row()["bound_tokens_per_second"] == pytest.approx(1e6 / (2 * SIZE))


def test_dense_bytes_take_time_and_hide_transfers():
    trace = trace_of(tokens=20)
    plain, heavy = (run(trace, "lru", 6, resident_bytes=b) for b in (0, 3e9))
    assert heavy.seconds == pytest.approx(plain.seconds + 20 * 3e9 / HOST.device_bytes_per_second)
    one, two = (run(trace, "read_me", 6, resident_bytes=b) for b in (0, 3e11))
    assert two.time[sim.STALL] < one.time[sim.STALL]


@pytest.mark.parametrize("change", [{"link_bytes_per_second": 0.0}, {"device_flops": -1.0}, {"link_latency_seconds": np.nan}])
def test_impossible_hardware_is_refused(change):
    with pytest.raises(BadInput, match=next(iter(change))):
        HOST.with_(**change)


def test_profiles_of_machines():
    cpu = Hardware.of_profile({"read_bytes_per_second": 3e10, "bfloat16_flops": 4e11, "disk_bytes_per_second": 2e9}, "here")
    assert (cpu.link_bytes_per_second, cpu.device_bytes_per_second, cpu.host_flops) == (2e9, 3e10, 0)
    gpu = Hardware.of_profile({"read_bytes_per_second": 3e12, "bfloat16_flops": 4e14, "machine": {"gpu": "one"}}, "there")
    assert "not measured" in gpu.name and gpu.link_bytes_per_second == 25e9
    with pytest.raises(BadInput, match="bench machine"):
        Hardware.of_profile({}, "nothing")
    assert KNOWN["pcie4"].t_cpu(1, SIZE) < np.inf == cpu.t_cpu(1, SIZE)
