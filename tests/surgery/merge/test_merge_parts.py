"""What must hold of M-SMoE, HC-SMoE, UNCURL, Sub-MoE and the parts they share (surgery-and-steering.md)."""

from __future__ import annotations

import pytest
import torch

from moesaic.core import registry
from moesaic.surgery import align, average, cluster
from moesaic.surgery.layer import Layer
from moesaic.surgery.memory import measure, operate
from moesaic.surgery.merge.m_smoe import global_groups
from moesaic.surgery.shapes import facts_of
from moesaic.surgery.similarity import similarity
from moesaic.trace.calibration.store import LayerStatistics
from moesaic.view.bank import ExpertWeights
from moesaic.view.block import View


def build(method, **options):
    return registry.get("merge", method).build(**options)


def layer_with(make, name="Mixtral", number=0, **sums):
    model = make(name)
    statistics = {key: torch.as_tensor(value, dtype=torch.float64) for key, value in sums.items()}
    return Layer(facts_of(View(model))[number], View(model)[number], LayerStatistics(statistics))


@pytest.mark.parametrize("name", ["Mixtral", "GptOss", "NemotronH"])
@pytest.mark.parametrize("how", ["weight", "activation"])
def test_alignment_finds_a_hidden_permutation_and_changes_no_output(make, ids, name, how):
    model = make(name)
    layer = measure(model, ids, "R0,C")[0]
    block, order = layer.block, torch.randperm(16, generator=torch.Generator().manual_seed(2))
    block.bank[3] = align.permuted(block.bank[1], order)
    x_TD = torch.randn(64, block.bank.width)
    layer._features = lambda: (x_TD, x_TD)
    found = align.aligned(layer, 1, [3, 4], how)
    for key, tensor in block.bank[1].items():
        assert torch.equal(found[3][key], tensor), key
    before = block.bank.run_one(4, x_TD)[1].detach()
    block.bank[4] = found[4]
    assert float((block.bank.run_one(4, x_TD)[1].detach() - before).abs().max()) <= 1e-6 * max(1.0, float(before.abs().max()))
    same = align.aligned(layer, 1, [4], "none")[4]
    assert all(torch.equal(same[key], tensor.float()) for key, tensor in block.bank[4].items())


def test_the_true_matching_has_the_largest_affinity(make):
    bank = View(make("Mixtral"))[0].bank
    expert = bank[0]
    order = torch.randperm(16)
    affinity = align.weight_affinity(expert, align.permuted(expert, order))
    back = align.match(affinity)
    assert torch.equal(order[back], torch.arange(16))
    at = torch.arange(16)
    assert float(affinity[at, back].sum()) >= float(affinity[at, torch.randperm(16)].sum())


@pytest.mark.parametrize("how", ["weight", "activation"])
@pytest.mark.parametrize("method", [entry.name for entry in registry.entries("merge")])
def test_merging_aligned_copies_changes_nothing_and_groups_of_one_keep_their_bytes(make, logits, method, how):
    """Copies whose neurons lie in other orders, behind any router: weights of chosen rows add up."""
    ids = [torch.randint(8, 80, (4, 17), generator=torch.Generator().manual_seed(1))]
    groups = [[0], [1], [2, 5, 7], [3], [4], [6]]
    for router in ("map", "repeat"):
        model = make("Mixtral")
        for block in View(model):
            for e in (5, 7):
                order = torch.randperm(16, generator=torch.Generator().manual_seed(e))
                block.bank[e] = align.permuted(block.bank[2], order)
        before, layers = logits(model, ids), measure(model, ids, "R0,A1,C")
        given = {"scope": "uniform"} if method == "m_smoe" else {}
        for aligned in ("none", how):
            merged = build(method, keep=6, router=router, align=aligned, **given)
            merged.group = lambda layer, members, count: (groups, [group[0] for group in groups])
            change = merged.change(layers[0], 6)
            assert set(change.experts) == ({2} if router == "map" else {2, 5, 7})  # all others: byte for byte
            far = float((change.experts[2]["up"] - layers[0].expert(2)["up"]).abs().max())
            assert far < 1e-6 if aligned == how else far > 0.01
        operate(merged, layers)
        torch.testing.assert_close(logits(model, ids), before, rtol=1e-5, atol=1e-5)


def test_group_weights_do_not_depend_on_the_scale_of_usage():
    torch.testing.assert_close(average.shares(torch.tensor([1.0, 3.0])), average.shares(torch.tensor([10.0, 30.0])))
    assert average.shares(torch.zeros(4)).tolist() == [0.25] * 4
    experts = [ExpertWeights({"up": torch.full((2, 3), float(i))}) for i in range(2)]
    torch.testing.assert_close(average.mean(experts, average.shares(torch.tensor([1.0, 3.0])))["up"], torch.full((2, 3), 0.75))


def test_the_global_budget_is_met_up_to_ties():
    generator = torch.Generator().manual_seed(0)
    for total in (4, 10, 16, 31, 32):
        usages = [torch.rand(8, generator=generator) for _ in range(4)]
        counts = global_groups(usages, total)
        assert sum(counts) == total and min(counts) >= 1
    usages = [torch.ones(8), torch.tensor([100.0, 1, 1, 1, 1, 1, 1, 1])]
    assert sum(global_groups(usages, 8)) <= 8  # ties at the bar fall below it
    with_zeros = [torch.tensor([4.0, 3, 2, 1, 0, 0, 0, 0])] * 2
    assert sum(global_groups(with_zeros, 12)) == 8  # nobody is kept for no use


def test_dominant_experts_gather_the_most_similar():
    usage = torch.tensor([5.0, 1, 4, 1, 1, 1])
    alike = torch.eye(6)
    alike[1, 2], alike[3, 0], alike[4, 2], alike[5, 0] = 0.9, 0.8, 0.7, 0.6
    groups, centres = cluster.dominant(usage, alike, 2)
    assert sorted(zip(centres, groups, strict=True)) == [(0, [0, 3, 5]), (2, [1, 2, 4])]


def test_linkage_merges_copies_first_at_growing_heights():
    generator = torch.Generator().manual_seed(1)
    points = torch.randn(12, 5, generator=generator)
    points[7], points[11] = points[3], points[3]
    for linkage in cluster.LINKAGES:
        table = cluster.merges(points, linkage)
        assert table[0, 2] == 0 == table[1, 2]
        if linkage in ("average", "ward", "complete", "single"):
            assert all(a <= b + 1e-12 for a, b in zip(table[:-1, 2], table[1:, 2], strict=True))
        groups = cluster.hierarchical(points, 10, linkage)
        assert len(groups) == 10 and [3, 7, 11] in groups
    assert cluster.hierarchical(points, 12) == [[e] for e in range(12)]
    assert len(cluster.hierarchical(torch.ones(9, 2), 4)) == 4  # all ties


def test_spectral_clusters_find_blocks_whatever_the_labels():
    generator = torch.Generator().manual_seed(3)
    block = torch.arange(12) % 3
    noise = 0.05 * torch.rand(12, 12, generator=generator)
    affinity = 0.5 + 0.4 * (block[:, None] == block).double() + (noise + noise.T)
    affinity.fill_diagonal_(1)
    expected = [[0, 3, 6, 9], [1, 4, 7, 10], [2, 5, 8, 11]]
    assert cluster.spectral(affinity, 3) == expected
    for seed in range(5):
        order = torch.randperm(12, generator=torch.Generator().manual_seed(seed))
        found = cluster.spectral(affinity[order][:, order], 3)
        assert sorted(sorted(order[group].tolist()) for group in found) == expected
    for count in range(1, 13):
        assert len(cluster.spectral(affinity, count)) == count
        assert len(cluster.kmeans(torch.ones(12, 2), count)) == count


def test_kmeans_is_as_good_as_any_of_many_starts():
    points = torch.randn(40, 3, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    cost = lambda groups: sum(float((points[g] - points[g].mean(0)).square().sum()) for g in groups)  # noqa: E731
    ours = cost(cluster.kmeans(points, 5))
    generator = torch.Generator().manual_seed(5)
    drawn = []
    for _ in range(10):
        centres = points[torch.randperm(40, generator=generator)[:5]]
        drawn.append(cluster._lloyd(points, centres, 100)[0])
    assert ours <= sorted(drawn)[5]


def test_experts_that_share_the_task_are_not_merged_together(make):
    """Three experts carry the task and fire on different tokens; the other five are scored alike. K = 4."""
    generator = torch.Generator().manual_seed(0)
    logits_TE = 0.1 * torch.randn(600, 8, generator=generator) - 1
    common = torch.randn(600, generator=generator)
    logits_TE[:, 3:] += common[:, None]
    for e in range(3):
        logits_TE[e * 200 : (e + 1) * 200, e] += 8
    logits_TE = logits_TE.double()
    layer = layer_with(
        make, selection_count=[200, 200, 200, 1, 1, 1, 1, 1], token_count=600.0, logit_gram_sum=logits_TE.T @ logits_TE
    )
    groups, _ = build("uncurl", keep=4).group(layer, list(range(8)), 4)
    assert sorted(groups) == [[0], [1], [2], [3, 4, 5, 6, 7]]


def test_uncurl_reads_the_task_alone(make):
    other = LayerStatistics(
        {"selection_count": torch.arange(8.0), "logit_gram_sum": torch.eye(8).double(), "token_count": torch.tensor(9.0)}
    )
    layer = layer_with(make, selection_count=torch.ones(8), token_count=4.0, logit_gram_sum=torch.ones(8, 8) + torch.eye(8))
    layer.by_domain = {"code": other}
    method = build("uncurl", domain="code")
    assert torch.equal(method.usage(layer), torch.arange(8.0).double())
    assert torch.equal(build("uncurl").usage(layer), torch.ones(8).double())
    logits_TE = torch.randn(40, 4, generator=torch.Generator().manual_seed(0)).double().repeat(1, 2)
    other.sums["logit_gram_sum"] = logits_TE.T @ logits_TE  # in code, e and e + 4 are scored alike; in all text, neighbours
    logits_TE = logits_TE[:, :4].repeat_interleave(2, 1)
    layer.statistics.sums["logit_gram_sum"] = logits_TE.T @ logits_TE
    assert method.group(layer, list(range(8)), 4)[0] == [[0, 4], [1, 5], [2, 6], [3, 7]]
    assert build("uncurl").group(layer, list(range(8)), 4)[0] == [[0, 1], [2, 3], [4, 5], [6, 7]]


def test_features_of_hc_smoe_do_not_depend_on_the_router(make, ids):
    first, second = make("Mixtral"), make("Mixtral")
    View(second)[0].router.weight.data.normal_()
    one, other = (measure(model, ids, "R0,R1,A1")[0] for model in (first, second))
    method = build("hc_smoe")
    torch.testing.assert_close(method.features(one), method.features(other))
    routed = build("hc_smoe", feature="routed_output")
    assert not torch.allclose(routed.features(one), routed.features(other))


def test_sub_moe_uncut_is_the_average_and_cut_is_no_better_than_the_best(make, ids):
    share = average.shares(torch.tensor([3.0, 1.0, 2.0]))
    matrices = [torch.randn(6, 9) for _ in range(3)]
    plain = sum(m.double() * s for m, s in zip(matrices, share.tolist(), strict=True)).float()
    torch.testing.assert_close(average.shared_factor(matrices, share), plain, rtol=1e-5, atol=1e-6)
    for rank in range(1, 6):
        cut = average.shared_factor(matrices, share, rank)
        assert int(torch.linalg.matrix_rank(cut)) <= rank
        best = float(torch.linalg.svdvals(plain)[rank:].norm())
        assert float((cut - plain).norm()) >= best - 1e-5
    same = [matrices[0]] * 3
    torch.testing.assert_close(average.shared_factor(same, share), matrices[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(average.shared_factor(matrices[:1], torch.ones(1)), matrices[0], rtol=1e-5, atol=1e-6)
    for name in ("Mixtral", "GptOss"):
        layer = measure(make(name), ids, "R0,A1")[0]
        full, uncut = (build("sub_moe", rank=rank).change(layer, 4) for rank in (10_000, None))
        assert full.report["groups"] == uncut.report["groups"] and full.experts.keys() == uncut.experts.keys()
        for place, expert in full.experts.items():
            for key, tensor in expert.items():
                torch.testing.assert_close(tensor, uncut.experts[place][key], rtol=1e-4, atol=1e-5)


def test_sub_moe_clusters_directions_not_lengths(make):
    generator = torch.Generator().manual_seed(6)
    direction = torch.nn.functional.normalize(torch.randn(4, 32, generator=generator), dim=1)
    length = torch.tensor([1.0, 30.0, 2.0, 9.0, 20.0, 1.5, 12.0, 40.0])
    outputs = direction.repeat(2, 1) * length[:, None]
    layer = layer_with(make, selection_count=torch.ones(8), all_output_sum=outputs, all_token_count=1.0)
    groups, _ = build("sub_moe").group(layer, list(range(8)), 4)
    assert sorted(groups) == [[0, 4], [1, 5], [2, 6], [3, 7]]


def test_similarity_from_sums_is_that_of_the_columns(make, ids):
    model = make("Olmoe")
    layer = measure(model, ids, "R0,R1,A1,C")[1]
    logits_TE = layer.features()[0].double() @ layer.rows_ED.double().T
    columns = torch.nn.functional.cosine_similarity(logits_TE.T[:, None], logits_TE.T[None], dim=-1)
    torch.testing.assert_close(similarity(layer, "router_logits"), (columns + 1) / 2, rtol=1e-4, atol=1e-5)
    flat = torch.stack([torch.cat([t.flatten() for t in layer.expert(e).values()]) for e in range(8)]).double()
    columns = torch.nn.functional.cosine_similarity(flat[:, None], flat[None], dim=-1)
    torch.testing.assert_close(similarity(layer, "weight"), (columns + 1) / 2, rtol=1e-5, atol=1e-6)
    for kind in ("router_rows", "output", "routed_output"):
        found = similarity(layer, kind)
        assert found.shape == (8, 8) and float(found.min()) >= 0 and float(found.max()) <= 1 + 1e-9


def test_a_collapsed_router_is_exact_for_rows_that_agree(make, ids):
    """Members with one row: their probabilities add to the collapsed row's with log(members), which GPT-OSS has a bias for."""
    model, groups = make("GptOss"), [[0, 4, 5], [1, 6], [2], [3, 7]]
    for block in View(model):
        for group in groups:
            for parameter in (block.router.weight, block.router.bias):
                parameter.data[group] = parameter.data[group[0]].clone()
    layer = measure(model, ids, "R0,C")[0]
    method = build("mean", router="collapse")
    method.group = lambda layer, members, count: (groups, [0, 1, 2, 3])
    change = method.change(layer, 4)
    assert change.report["router_kl_nats"] == pytest.approx(0, abs=1e-9)
    torch.testing.assert_close(change.shift_R, torch.tensor([3.0, 2, 1, 2]).log())
    other = measure(make("GptOss"), ids, "R0,C")[0]
    assert method.change(other, 4).report["router_kl_nats"] > 1e-4
