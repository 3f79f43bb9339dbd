"""What must hold of REAP and of the one-shot scores (surgery-and-steering.md)."""

from __future__ import annotations

import pytest
import torch

from moesaic.core import registry
from moesaic.surgery.layer import Layer
from moesaic.surgery.memory import in_rounds, measure, operate, progressively, round_sizes
from moesaic.surgery.prune.reap import super_experts
from moesaic.surgery.select import select
from moesaic.surgery.shapes import facts_of
from moesaic.trace.calibration.store import LayerStatistics, added
from moesaic.trace.calibration.tiers import Seen, collect
from moesaic.view.block import View


def build(method, **options):
    return registry.get("prune", method).build(**options)


def score(method, layer, **options):
    return build(method, **options).score(layer)


def seen(block, x_TD, ids, weights, logits=None):
    return Seen(x_TD, torch.tensor(ids), torch.tensor(weights), logits)


def layer_of(model, given, tiers=("R0", "R1"), number=0):
    block = View(model)[number]
    found: dict = {}
    collect(found, given, block, tiers)
    return Layer(facts_of(View(model))[number], block, LayerStatistics(found))


@pytest.fixture
def one(make):
    """Three tokens on Mixtral's first block: expert 0 twice, 1 twice, 2 and 5 once."""
    model = make("Mixtral")
    x_TD = torch.randn(3, 32)
    return model, x_TD, seen(View(model)[0], x_TD, [[0, 1], [1, 2], [0, 5]], [[0.75, 0.25], [0.5, 0.5], [0.9, 0.1]])


def test_reap_by_hand(one):
    model, x_TD, given = one
    bank = View(model)[0].bank
    norm = lambda e, t: bank.run_one(e, x_TD[t : t + 1])[1].double().norm()  # noqa: E731
    found = score("reap", layer_of(model, given))
    expected = torch.zeros(8, dtype=torch.float64)
    expected[0] = (0.75 * norm(0, 0) + 0.9 * norm(0, 2)) / 2
    expected[1] = (0.25 * norm(1, 0) + 0.5 * norm(1, 1)) / 2
    expected[2], expected[5] = 0.5 * norm(2, 1), 0.1 * norm(5, 2)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-9)  # experts without a token score 0


def test_reap_scales_with_an_expert_and_is_ean_under_weights_of_one(one):
    model, _, given = one
    before = score("reap", layer_of(model, given))
    View(model)[0].experts.down_proj.data[1] *= 3
    after = score("reap", layer_of(model, given))
    torch.testing.assert_close(after[1], 3 * before[1], rtol=1e-6, atol=0)
    torch.testing.assert_close(after[[0, 2, 5]], before[[0, 2, 5]])
    ones = given._replace(weights_TK=torch.ones(3, 2))
    layer = layer_of(model, ones)
    torch.testing.assert_close(score("reap", layer), score("ean", layer))
    layer = layer_of(model, given)
    counts = layer.statistics["selection_count"]
    torch.testing.assert_close(score("weighted_ean", layer), score("reap", layer) * counts)
    torch.testing.assert_close(score("ean", layer, over="sum"), score("ean", layer) * counts)


def test_a_silent_expert_scores_nothing_and_dropping_it_only_lets_another_in(make, ids, logits):
    model = make("Mixtral")
    for block in View(model):
        block.experts.down_proj.data[3] = 0
    layers = measure(model, ids)
    assert all(float(score("reap", layer)[3]) == 0 for layer in layers)
    rows = [layer.rows_ED.clone() for layer in layers]
    changes = operate(build("reap", keep=7), layers)
    assert all(3 not in change.keep for change in changes)
    for layer, change, old in zip(layers, changes, rows, strict=True):
        x_TD = torch.randn(5, 32)
        new = layer.block.route(x_TD).logits_TE
        torch.testing.assert_close(new, (x_TD @ old.T)[:, list(change.keep)])


@pytest.mark.parametrize("where", [0, 3])
def test_super_experts_are_protected_in_the_first_layers_only(make, ids, where):
    layers = measure(make("Mixtral"), ids)
    sums = layers[where].statistics.sums
    weakest = int(score("reap", layers[where]).argmin())
    sums["output_max"] = sums["output_max"].clone()
    sums["output_max"][weakest] = 100 * max(float(layer.statistics["output_max"].max()) for layer in layers)
    facts = [layer.facts for layer in layers]
    reap = build("reap", keep=2, protect=True)
    decided = reap.decide([reap.look(layer) for layer in layers], facts)
    for number, (_, kept, guarded) in enumerate(decided):
        assert guarded == ([weakest] if number == where == 0 else []) and (weakest in kept) >= (number == where == 0)
    plain = build("reap", keep=2)
    assert weakest not in plain.decide([plain.look(layer) for layer in layers], facts)[where][1]


def test_the_bar_of_super_experts_is_a_quantile_or_a_tenth_of_the_largest():
    peaks = [torch.full((100,), 1.0) for _ in range(8)]
    peaks[0][3], peaks[1][4], peaks[2][5], peaks[7][6] = 100.0, 11.0, 9.0, 50.0
    assert super_experts(peaks) == [[3], [4], [], [], [], [], [], []]  # 9 is above the quantile, and not above 100 / 10
    for peak_E in peaks:
        peak_E[10:20] = 12.0  # a tenth of all: the quantile is above 10 now
    assert super_experts(peaks) == [[3], [], [], [], [], [], [], []]


def test_counts_and_masses_add_up(make, ids):
    for layer in measure(make("Olmoe"), ids):
        tokens = float(layer.statistics["token_count"])
        assert float((score("frequency", layer) * tokens).sum()) == pytest.approx(2 * tokens)
        assert float(score("gate_mass", layer).sum()) == pytest.approx(1)
        given = float(score("gate_mass", layer, of="chosen").sum())
        assert given == pytest.approx(float(score("weighted_frequency", layer).sum())) and given < 1
        together = layer.statistics["co_selection_count"]
        chosen = score("co_selection", layer) * 7  # every token pairs each of its two with one other
        torch.testing.assert_close(chosen, together.diagonal())


def test_shards_merge_to_the_single_run(make):
    ids = [torch.randint(8, 80, (2, 9)) for _ in range(4)]
    whole = measure(make("DeepseekV3"), ids)
    halves = [measure(make("DeepseekV3"), part) for part in (ids[:1], ids[1:])]
    for number, layer in enumerate(whole):
        merged = LayerStatistics(added([half[number].statistics.sums for half in halves]))
        joined = Layer(layer.facts, layer.block, merged)
        for method in ("reap", "ean", "frequency", "gate_mass", "output_variance", "weighted_ean"):
            torch.testing.assert_close(score(method, joined), score(method, layer), rtol=1e-9, atol=1e-12)


def test_a_constant_expert_has_no_variance_and_its_mean_replaces_it(make, logits):
    ids = [torch.randint(8, 80, (8, 17))]  # every expert has tokens that differ
    model = make("GptOss")
    for block in View(model):
        block.experts.down_proj.data[4] = 0
    before = logits(model, ids)
    layers = measure(model, ids)
    for layer in layers:
        score_E = score("output_variance", layer)
        assert float(score_E[4]) < 1e-12 < 1e-6 < float(score_E[[e for e in range(8) if e != 4]].min())
    means = [layer.statistics.mean("output")[4].float() for layer in layers]
    changes = operate(build("output_variance", keep=7, replace=True), layers)
    for change, block, mean_D in zip(changes, View(model), means, strict=True):
        assert list(change.keep) == list(range(8)) and change.report["replaced_by_mean"] == [4]
        expert = block.bank[4]
        assert not any(tensor.any() for name, tensor in expert.items() if name != "down_bias")
        torch.testing.assert_close(expert["down_bias"], mean_D)
    torch.testing.assert_close(logits(model, ids), before)
    with pytest.raises(Exception, match="no bias"):
        operate(build("output_variance", keep=7, replace=True), measure(make("Mixtral"), ids))


def test_dropping_a_layer_that_says_nothing_is_exact(make, ids, logits):
    model = make("DeepseekV3")
    View(model)[1].experts.down_proj.data.zero_()
    before = logits(model, ids)
    changes = operate(build("layer_drop", drop=1), measure(model, ids, "C"))
    assert [change.report["dropped"] for change in changes] == [False, True, False]
    assert View(model)[1].num_experts == 4  # two of each group: what its router needs
    torch.testing.assert_close(logits(model, ids), before)


def test_a_near_copy_goes_first_and_a_rank_one_expert_has_stable_rank_one(make):
    model = make("Mixtral")
    block = View(model)[0]
    block.bank[6] = block.bank[1].map(lambda tensor: tensor + 1e-3 * torch.randn_like(tensor))
    for name in ("gate_up_proj", "down_proj"):
        stack = getattr(block.experts, name).data
        stack[3] = torch.outer(torch.randn(stack.shape[1]), torch.randn(stack.shape[2]))
    layer = Layer(facts_of(View(model))[0], block)
    near = score("similarity", layer)
    assert set(torch.argsort(near)[:2].tolist()) == {1, 6} and float(near.min()) < -0.99
    rank = score("stable_rank", layer)
    assert int(rank.argmin()) == 3 and float(rank[3]) < 2 < float(rank[[0, 1, 2]].min())
    flat = torch.cat([block.experts.gate_up_proj.flatten(1), block.experts.down_proj.flatten(1)], 1).detach().double()
    torch.testing.assert_close(score("weight_norm", layer), flat.norm(dim=1), rtol=1e-6, atol=0)


def test_gradients_of_an_expert_that_no_token_reaches_are_zero(make, ids):
    model = make("Olmoe")
    layer = measure(model, ids, "R0,B")[2]
    unused = torch.nonzero(layer.statistics["selection_count"] == 0).flatten()
    found = score("gradient_norm", layer)
    assert (found > 0).any() and (found[unused] == 0).all()


def test_lengths_of_rows_and_gradients_by_hand(make):
    """The root of the mean over sequences of the squared gradient of each one's own loss, all tensors together."""
    ids, model = torch.randint(8, 80, (3, 9)), make("GptOss")
    layer = measure(model, [ids], "B")[1]
    rows_ED = layer.block.router.weight.detach().double()
    torch.testing.assert_close(score("router_norm", layer).double(), rows_ED.square().sum(1).sqrt(), rtol=1e-6, atol=0)
    total_E = torch.zeros(8, dtype=torch.float64)
    for row_N in ids:
        model.zero_grad()
        model(input_ids=row_N[None], labels=row_N[None], use_cache=False).loss.backward()
        for p in layer.block.experts.parameters():
            total_E += p.grad.double().square().flatten(1).sum(1)
    torch.testing.assert_close(score("gradient_norm", layer), (total_E / 3).sqrt(), rtol=1e-4, atol=1e-9)


def test_the_layers_that_change_their_input_least_go(make, ids):
    layers = measure(make("Olmoe"), ids, "C")
    method = build("layer_drop", drop=2)
    cosines = []
    for layer in layers:
        x_TD, y_TD = (side.double() for side in layer.features())
        sums_TD = x_TD + y_TD
        cosines.append(float(((x_TD * sums_TD).sum(1) / (x_TD.norm(dim=1) * sums_TD.norm(dim=1))).mean()))
    looks = [method.look(layer) for layer in layers]
    assert looks == pytest.approx(cosines)
    gone = [gone for _, gone in method.decide(looks, [layer.facts for layer in layers])]
    assert gone == [sum(other > cosine for other in cosines) < 2 for cosine in cosines] and sum(gone) == 2


def test_selection_is_exact_over_the_model_and_fair_to_groups(make):
    facts = facts_of(View(make("DeepseekV3")))
    generator = torch.Generator().manual_seed(1)
    scores = [torch.rand(8, generator=generator) + number for number in range(3)]  # later layers score higher
    kept = select(scores, facts, 6, "global")
    assert sum(map(len, kept)) == 18 and len(kept[0]) < 6 < len(kept[2])
    for mine, each in zip(kept, facts, strict=True):
        assert len(mine) >= each.least and sum(e < 4 for e in mine) == sum(e >= 4 for e in mine)
    plain = facts_of(View(make("Mixtral")))
    scores = [torch.rand(8, generator=generator) for _ in plain]
    kept = select(scores, plain, 0.5, "global", protected=[[int(score.argmin())] for score in scores])
    assert sum(map(len, kept)) == 16 and all(int(score.argmin()) in mine for score, mine in zip(scores, kept, strict=True))
    assert select(scores, plain, 8) == [list(range(8))] * 4


def test_iterative_and_progressive_measure_again(make, ids):
    facts = facts_of(View(make("Mixtral")))[0]
    assert round_sizes(facts, 0.5, 0.125) == [7, 6, 5, 4] and round_sizes(facts, 8, 0.125) == []
    assert round_sizes(facts_of(View(make("DeepseekV3")))[0], 4, 0.125) == [6, 4]
    model, rounds = make("Mixtral"), []
    kept = in_rounds(
        model, lambda count: build("ean", keep=count), ids, 0.5, between=lambda model, number: rounds.append(number)
    )
    assert rounds == [0, 1, 2, 3] and all(len(mine) == 4 for mine in kept)
    original = make("Mixtral")
    for block, untouched, mine in zip(View(model), View(original), kept, strict=True):
        assert torch.equal(block.experts.down_proj, untouched.experts.down_proj[mine])
    model = make("Mixtral")
    changes = progressively(model, lambda: build("naee", keep=6, tokens=32), ids)
    assert [len(change.keep) for change in changes] == [6] * 4
    again = measure(make("Mixtral"), ids, "R0,C")
    first = build("naee", keep=6, tokens=32)
    assert list(first.change(again[0], None).keep) == list(changes[0].keep)  # nothing comes before the first layer
