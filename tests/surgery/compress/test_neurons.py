"""Neuron pruning: fewer neurons in every expert of every architecture, which its own class loads at the new width."""

import pytest
import torch

from moesaic.core.errors import BadInput
from moesaic.surgery.compress.neurons import Neurons
from moesaic.surgery.memory import measure
from moesaic.surgery.memory import operate as operate_live
from moesaic.surgery.operate import operate
from moesaic.surgery.planning import open_plan, plan_step
from moesaic.surgery.shapes import facts_of
from moesaic.view.block import View

NAMES = ("mixtral", "qwen3_moe", "deepseek_v3", "gpt_oss", "nemotron_h", "granitemoe")


@pytest.mark.parametrize("name", NAMES)
def test_out_of_core_as_live_and_stock(on_disk, said, name, tmp_path):
    model_class, folder, statistics = on_disk(name, "R0,R1")
    planned = plan_step(open_plan(folder), "compress", "neurons", {"keep": 0.5})
    report = operate(folder, tmp_path / "out", "compress", "neurons", {"keep": 0.5}, calibration=statistics)
    assert report.stock and planned.stock and planned.fields
    assert abs(planned.bytes_after - report.bytes_after) < 0.02 * report.bytes_before
    made, info = model_class.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    twin = model_class.from_pretrained(folder).eval()
    layers = measure(twin, [torch.randint(8, 80, (6, 16), generator=torch.Generator().manual_seed(3))], "R0,R1")
    before = facts_of(View(twin))
    operate_live(Neurons(0.5), layers)
    for now, facts in zip(facts_of(View(made)), before, strict=True):
        assert now.inner == facts.inner // 2 and now.experts == facts.experts
    one, other = said(made), said(twin)
    assert float((one - other).abs().max()) <= 1e-6 * float(other.abs().max())
    if name == "mixtral":  # a second step meets the new width
        assert plan_step(planned, "compress", "neurons", {"keep": 0.5}).facts[0].inner == before[0].inner // 4


@pytest.mark.parametrize("by", ["abs", "square", "output", "norm"])
def test_dead_neurons_go_first_and_nothing_changes(make, ids, logits, by):
    model = make("Qwen3Moe")
    for block in View(model):
        for e in range(8):
            expert = block.bank[e]
            for name in ("up", "gate"):
                expert[name][::2] = 0
            expert["down"][:, ::2] = 0
            block.bank[e] = expert
    before = logits(model, ids)
    (change, *_) = operate_live(Neurons(0.5, by), measure(model, ids, "R0,R1"))
    assert change.report["inner_after"] == 8 and max(change.report["score_lost"]) < 1e-12
    torch.testing.assert_close(logits(model, ids), before)


def test_scores_by_hand(make):
    """Over the tokens routed to the expert; one without tokens is ranked by its weights."""
    ids = [torch.randint(8, 80, (6, 17), generator=torch.Generator().manual_seed(2))]
    layer = measure(make("Mixtral"), ids, "R0,R1,C")[0]
    x_TD = layer.features()[0]
    e = int(layer.statistics["selection_count"].argmax())
    expert = layer.expert(e)
    h_SI = layer.run(e, x_TD[(layer.block.route(x_TD).experts_TK == e).any(1)])[0].double()
    down_I = expert["down"].double().norm(dim=0)
    norm_I = expert["gate"].double().norm(dim=1) * expert["up"].double().norm(dim=1) * down_I
    wanted = {"abs": h_SI.abs().mean(0), "square": h_SI.square().mean(0), "output": h_SI.abs().mean(0) * down_I, "norm": norm_I}
    for by, want_I in wanted.items():
        torch.testing.assert_close(Neurons(0.5, by).score(layer, e, expert), want_I, rtol=1e-4, atol=1e-9)
    layer.statistics.sums["selection_count"] = torch.zeros(8, dtype=torch.float64)
    torch.testing.assert_close(Neurons(0.5, "abs").score(layer, e, expert), norm_I, rtol=1e-6, atol=0)


def test_bad_sizes_are_named(make):
    facts = facts_of(View(make("Mixtral")))
    with pytest.raises(BadInput, match="have 16 neurons"):
        Neurons(17).plan(facts)
    with pytest.raises(BadInput, match=r"keep 1\.5"):
        Neurons(1.5)
    with pytest.raises(BadInput, match="by 'size'"):
        Neurons(by="size")
    assert Neurons(0.4, multiple=4).inner(facts[0]) == 8
