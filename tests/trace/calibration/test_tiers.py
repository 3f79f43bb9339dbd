"""Every statistic against a naive sum over tokens, with padding left out, on stock and odd architectures."""

from __future__ import annotations

import math

import pytest
import torch

import moesaic
from moesaic.core.errors import BadInput
from moesaic.trace.calibration import tiers
from moesaic.trace.calibration.collect import Collector
from moesaic.view import coverage, tiny


def naive(blocks, model, call):
    """Per layer, token by token: the rows (x, ids, weights, logits) and every expert's (h, f) for them."""
    seen = [[] for _ in blocks]

    def keep(i):
        def hook(x, routing, y, block):
            rows = (routing.experts_TK, routing.weights_TK, routing.logits_TE)
            seen[i].append((x.reshape(-1, x.shape[-1]), *rows, y.reshape(-1, y.shape[-1])))

        return hook

    handles = [block.on_experts(keep(i)) for i, block in enumerate(blocks)]
    with torch.no_grad():
        call()
    for handle in handles:
        handle.remove()
    return [[torch.cat(part) for part in zip(*rows, strict=True)] for rows in seen]


@pytest.fixture(scope="module")
def loaded(tiny_moe):
    return moesaic.load(tiny_moe, dtype="float32")


@pytest.fixture
def batch():
    ids = torch.randint(1, 200, (3, 7))
    mask = torch.ones_like(ids)
    mask[1, 4:] = 0
    mask[2, 1:] = 0
    return ids, mask


def collect(model, call, names, **options):
    blocks = moesaic.view(model)
    collector = Collector(blocks, names, range(len(blocks)), **options)
    with collector, torch.no_grad():
        call(collector)
    return collector.sums


def test_r0_r1_a1_are_sums_over_real_tokens(loaded, batch):
    ids, mask = batch
    model = loaded.model
    blocks = moesaic.view(model)

    def call(*_):
        model(input_ids=ids, attention_mask=mask)

    sums = collect(model, call, ("R0", "R1", "R2", "A1"))
    real = mask.reshape(-1).bool()
    for layer, (x, chosen, weights, logits, _) in enumerate(naive(blocks, model, call)):
        x, chosen, weights, logits = x[real], chosen[real], weights[real], logits[real]
        found, E = sums[layer][""], 4
        assert found["token_count"] == 12
        want = {name: torch.zeros(E, dtype=torch.float64) for name in ("count", "gate", "norm", "gated", "square", "max")}
        moments = torch.zeros(E, 16, dtype=torch.float64)
        inner, gram = torch.zeros(E, 8, dtype=torch.float64), torch.zeros(E, 16, 16)
        everywhere, together = torch.zeros(E, 16, dtype=torch.float64), torch.zeros(E, E)
        for t in range(len(x)):
            for e in range(E):
                w = blocks[layer].bank[e]
                h = torch.nn.functional.silu(w.gate @ x[t]) * (w.up @ x[t])
                f = (w.down @ h).double()
                everywhere[e] += f
                for k in range(2):
                    if chosen[t, k] == e:
                        want["count"][e] += 1
                        want["gate"][e] += weights[t, k].double()
                        want["norm"][e] += f.norm()
                        want["gated"][e] += weights[t, k].double() * f.norm()
                        want["square"][e] += f.norm() ** 2
                        want["max"][e] = max(want["max"][e], f.norm())
                        moments[e] += f.square()
                        inner[e] += h.double().abs()
                        gram[e] += torch.outer(x[t], x[t])
            for a in chosen[t].tolist():
                for b in chosen[t].tolist():
                    together[a, b] += 1
        names = {
            "count": "selection_count", "gate": "gate_sum", "norm": "norm_sum", "gated": "gated_norm_sum",
            "square": "norm_square_sum", "max": "norm_max",
        }  # fmt: skip
        for short, name in names.items():
            assert torch.allclose(found[name], want[short], rtol=1e-5, atol=1e-7), name
        assert torch.allclose(found["output_square_sum"], moments, rtol=1e-4, atol=1e-9)
        assert torch.allclose(found["inner_abs_sum"], inner, rtol=1e-4, atol=1e-9)
        assert torch.allclose(found["input_gram_sum"], gram, rtol=1e-4, atol=1e-5)
        assert torch.allclose(found["all_output_sum"], everywhere, rtol=1e-4, atol=1e-7)
        assert found["all_token_count"] == 12
        assert torch.equal(found["co_selection_count"], together.double())
        probs = torch.softmax(logits.double(), -1)
        assert torch.allclose(found["probability_sum"], probs.sum(0))
        assert torch.allclose(found["logit_gram_sum"], logits.double().T @ logits.double())
        assert found["entropy_hist"].sum() == found["second_over_first_hist"].sum() == 12
        entropy = -(probs * probs.log()).sum(-1) / math.log(E)
        assert torch.equal(found["entropy_hist"], torch.histc(entropy, 64, 0, 1))


def test_domains_add_up_to_the_whole(loaded, batch):
    ids, mask = batch

    def call(collector):
        collector.domains = ["a", "b", "a"]
        loaded.model(input_ids=ids, attention_mask=mask)

    apart = collect(loaded.model, call, ("R0", "R1"), by_domain=True)
    whole = collect(loaded.model, call, ("R0", "R1"))
    for layer in range(2):
        assert set(apart[layer]) == {"a", "b"}
        assert apart[layer]["b"]["token_count"] == 4
        for name, tensor in whole[layer][""].items():
            parts = apart[layer]["a"][name], apart[layer]["b"][name]
            assert torch.allclose(tiers.combine(name, *parts), tensor, rtol=1e-4, atol=1e-5), name


def test_an_expert_nobody_chose_has_zeros(loaded):
    model = loaded.model
    blocks = moesaic.view(model)
    ids = torch.randint(1, 200, (1, 5))
    with blocks.policy(without=[2]):
        found = collect(model, lambda c: model(input_ids=ids), ("R0", "R1"))[0][""]
    assert found["selection_count"][2] == found["norm_sum"][2] == found["output_sum"][2].abs().sum() == 0
    assert found["selection_count"].sum() == 10


@pytest.mark.parametrize("name", ["gpt_oss", "deepseek_v3", "mixtral", "llama4"])
def test_one_expert_computes_what_the_model_computes(name):
    """Biases, interleaved and clamped gates, transposed storage: weighted outputs of `run_one` add up to the bank's own."""
    if name not in {a.name for a in tiny.architectures()}:
        pytest.skip(f"transformers here has no {name} behind the experts decorator")
    architecture = next(a for a in tiny.architectures() if a.name == name)
    case = coverage.open_case(tiny.model_classes(architecture)[0], architecture)
    for block, (x, chosen, weights, _, y) in zip(case.view, naive(case.view, case.model, case.run), strict=True):
        total = torch.zeros_like(y)
        for e in range(block.num_experts):
            rows, slots = torch.nonzero(chosen == e, as_tuple=True)
            with torch.no_grad():
                _, f = block.bank.run_one(e, x[rows])
            total.index_add_(0, rows, f * weights[rows, slots, None].to(f.dtype))
        assert torch.allclose(total, y, rtol=1e-4, atol=1e-6), block.name


def test_tier_names():
    assert tiers.parse("b, r0") == ("R0", "B")
    with pytest.raises(BadInput, match="tier 'R9'"):
        tiers.parse("R9")
    with pytest.raises(BadInput, match="no tier"):
        tiers.parse("")


def test_second_moments_of_further_calls_need_no_second_place(loaded, batch):
    ids, mask = batch
    kept = []

    def call(collector):
        for part in range(3):
            loaded.model(input_ids=ids[part : part + 1], attention_mask=mask[part : part + 1])
            kept.append({n: t.data_ptr() for n, t in collector.sums[0][""].items() if "gram_sum" in n and t.dim() == 3})

    sums = collect(loaded.model, call, ("R0", "R1", "R2"))
    assert kept[0] == kept[1] == kept[2] and len(kept[0]) == 2
    whole = collect(loaded.model, lambda _: loaded.model(input_ids=ids, attention_mask=mask), ("R0", "R1", "R2"))
    for name, value in whole[0][""].items():
        torch.testing.assert_close(sums[0][""][name], value, rtol=1e-5, atol=1e-6)
