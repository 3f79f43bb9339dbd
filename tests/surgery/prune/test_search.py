"""What must hold of NAEE, MoE-I2 stage 1 and their parts (surgery-and-steering.md)."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch

from moesaic.core import registry
from moesaic.core.errors import BadInput
from moesaic.surgery import reconstruct, search
from moesaic.surgery.budget import apportion
from moesaic.surgery.memory import best_combination, loss, masked_losses, measure, operate
from moesaic.surgery.reconstruct import Reconstruction, never_chosen
from moesaic.view.block import View


def build(method, **options):
    return registry.get("prune", method).build(**options)


@pytest.mark.parametrize("name", ["Mixtral", "Olmoe", "GptOss", "Phimoe"])
def test_the_reported_error_is_that_of_the_changed_layer(make, ids, name):
    layers = measure(make(name), ids, "R0,C")
    for layer in layers:
        x_TD, z_TD = layer.features()
        output = Reconstruction(layer, 10_000)
        assert output.error(()) == 0
        block, direct = layer.block, {}
        for dropped in combinations(range(8), 2):
            with torch.no_grad():
                routing = block.route_under(never_chosen(dropped, 8, scored=name != "Phimoe"), x_TD)
                new = torch.zeros_like(z_TD, dtype=torch.float64)
                for t in range(len(x_TD)):
                    for e, weight in zip(routing.experts_TK[t].tolist(), routing.weights_TK[t].tolist(), strict=True):
                        assert e not in dropped or weight == 0
                        new[t] += weight * block.bank.run_one(e, x_TD[t : t + 1])[1][0].double()
            direct[dropped] = float((new - z_TD.double()).norm())
        found = build("naee", keep=6, tokens=10_000).change(layer, None)
        assert found.report["error"] == pytest.approx(min(direct.values()), rel=1e-4)
        assert found.report["search"] == "exhaustive"
        break  # one layer is thirty-six checks already


def test_norms_of_batches_are_added_not_their_squares(make, ids, monkeypatch):
    output = Reconstruction(measure(make("Mixtral"), ids, "R0,C")[0], 10_000)
    moved_TD = output.output((1, 4)) - output.target_TD
    assert output.error((1, 4)) == pytest.approx(float(moved_TD.norm()))
    monkeypatch.setattr(reconstruct, "BATCH", 5)
    added = sum(float(moved_TD[at : at + 5].norm()) for at in range(0, len(moved_TD), 5))
    assert output.error((1, 4)) == pytest.approx(added) and added > 1.2 * float(moved_TD.norm())


def test_an_expert_that_nobody_chooses_goes(make, ids, logits):
    model = make("Mixtral")
    for block in View(model):
        block.router.weight.data[5] = 0
        block.router.weight.data[:5] = block.router.weight.data[:5].abs() + 0.1
    layers = measure(model, ids, "R0,C")
    unused = [set(torch.nonzero(layer.statistics["selection_count"] == 0).flatten().tolist()) for layer in layers]
    assert any(unused)
    before = logits(model, ids)
    for layer, never in zip(layers, unused, strict=True):
        if never:
            change = build("naee", keep=7).change(layer, None)
            assert set(range(8)) - set(change.keep) <= never and change.report["error"] < 1e-5
    with pytest.raises(BadInput, match="at least 2"):
        build("naee", keep=1).plan([layers[0].facts])
    assert torch.equal(before, logits(model, ids))


def test_greedy_is_never_better_and_groups_stay_equal():
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        weight = torch.rand(8, 8, generator=generator)
        error = lambda gone, weight=weight: float(weight[list(gone)][:, list(gone)].sum()) if gone else 0.0  # noqa: E731
        for drop, groups in ((3, 1), (4, 2)):
            whole, greedy = (f(error, 8, drop, groups)[0] for f in (search.exhaustive, search.greedy))
            assert greedy[0] >= whole[0] - 1e-9 and len(greedy[1]) == drop
            for _, gone in (whole, greedy):
                assert groups == 1 or sum(e < 4 for e in gone) == drop // 2
    assert len(list(search.every(8, 4, 2))) == search.count(8, 4, 2) == 36


def test_the_skipping_threshold_skips_half(make, ids):
    model = make("Mixtral")
    layers = measure(model, [torch.randint(8, 80, (8, 40))], "R0,C")
    for layer in layers:
        beta = build("naee", keep=7, tokens=64).change(layer, None).report["skip_beta"]
        x_TD = layer.features()[0]
        weights = layer.block.route(x_TD).weights_TK.sort(1, descending=True).values
        share = float((weights[:, 1] < beta * weights[:, 0]).float().mean())
        assert share == pytest.approx(0.5, abs=0.05)
        assert not bool((weights[:, 1] < 0 * weights[:, 0]).any())
        threshold = beta / (1 + beta)
        assert float((weights[:, 1] / weights.sum(1) < threshold).float().mean()) == pytest.approx(share, abs=0.01)


def test_genetic_search_is_exhaustive_when_it_can_be_and_near_it_when_not():
    generator = torch.Generator().manual_seed(2)
    weight = torch.rand(12, 12, generator=generator)
    calls = []

    def error(gone):
        calls.append(gone)
        return float(weight[list(gone)][:, list(gone)].sum())

    everything = search.exhaustive(error, 12, 4)[0]
    assert search.genetic(error, 12, 4, population=495)[0] == everything
    calls.clear()
    found = search.genetic(error, 12, 4, population=40, generations=20, best=3)
    assert len(calls) == len(set(calls)) < 495 and len(found) == 3
    assert found[0][0] <= 1.1 * everything[0] and found == sorted(found)
    grouped = search.genetic(error, 12, 4, 2, population=20, generations=5, seed=1)[0][1]
    assert sum(e < 6 for e in grouped) == 2
    assert search.genetic(error, 12, 4, population=40, generations=20) == search.genetic(
        error, 12, 4, population=40, generations=20
    )


def test_budgets_are_met_exactly():
    assert apportion(8, [1, 1, 1, 1], [6] * 4) == [2] * 4
    assert apportion(7, [1, 2, 4], [6] * 3) == [1, 2, 4]
    assert apportion(10, [1, 1, 100], [6] * 3) == [2, 2, 6]
    assert apportion(3, [0, 0, 0], [2] * 3) == [1, 1, 1] and apportion(0, [1, 2], [3, 3]) == [0, 0]
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        limits = torch.randint(0, 9, (6,), generator=generator).tolist()
        total = int(torch.randint(0, sum(limits) + 1, (1,), generator=generator))
        given = apportion(total, torch.rand(6, generator=generator).tolist(), limits)
        assert sum(given) == total and all(0 <= a <= b for a, b in zip(given, limits, strict=True))
    with pytest.raises(BadInput, match="take 4 at most"):
        apportion(5, [1, 1], [2, 2])


def test_moe_i2_is_uniform_for_equal_importance_and_naee_for_a_large_population(make, ids):
    model = make("Mixtral")
    layers = measure(model, ids, "R0,C")
    facts = [layer.facts for layer in layers]
    method = build("moe_i2", keep=6, importance=[3.0] * 4, tokens=32)
    assert method.plan(facts) == [6] * 4
    decisions = method.decide([method.look(layer) for layer in layers], facts)
    for layer, decision in zip(layers, decisions, strict=True):
        mine, other = method.change(layer, decision), build("naee", keep=6, tokens=32).change(layer, None)
        assert mine.report["error"] == other.report["error"] and list(mine.keep) == list(other.keep)
        assert len(mine.report["candidates"]) == 3
    assert sum(build("moe_i2", keep=6, importance=[1.0, 2.0, 4.0, 1e-9]).plan(facts)) == 24
    assert build("moe_i2", keep=6, importance=[1.0, 1.0, 1.0, 1e-9]).plan(facts)[3] == 2  # k experts stay
    with pytest.raises(BadInput, match="for each of the 4"):
        build("moe_i2", importance=[1.0]).plan(facts)


def test_moe_i2_takes_from_the_layer_whose_experts_are_copies(make, ids):
    model = make("Mixtral")
    block = View(model)[2]
    for e in range(1, 8):
        block.bank[e] = block.bank[0]
    layers = measure(model, ids, "R0,C")
    changes = operate(build("moe_i2", keep=6, tokens=64), layers)
    assert len(changes[2].keep) == 2 and sum(len(change.keep) for change in changes) == 24


def test_importance_and_windows_on_the_whole_model(make, ids):
    model = make("Mixtral")
    block = View(model)[1]
    for e in range(1, 8):
        block.bank[e] = block.bank[0]
    rises = masked_losses(model, ids)
    assert len(rises) == 4 and rises[1] == pytest.approx(0, abs=1e-5) and max(rises) > rises[1]
    never = [[[0, 1], [2, 3]], [[4, 5], [6, 7]], [[0, 1], [2, 3]], [[4, 5], [6, 7]]]
    chosen = best_combination(model, ids, never, window=4)
    assert all(list(mine) in candidates for mine, candidates in zip(chosen, never, strict=True))
    assert loss(model, ids) > 0
    with pytest.raises(BadInput, match="4 MoE blocks"):
        best_combination(model, ids, never[:2])
