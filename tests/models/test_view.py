"""The view, policies and a trace open our own model as they open transformers' architectures."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import moesaic
from moesaic.core.errors import BadInput, NotMoE
from moesaic.serving.streamed import load_streamed


def model_of(**fields):
    torch.manual_seed(0)
    given = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "experts": 4}
    return AutoModelForCausalLM.from_config(AutoConfig.for_model("moesaic", **{**given, **fields})).eval()


IDS = torch.arange(12).view(2, 6)


@pytest.mark.parametrize("router", ["topk", "adamoe", "rmoe", "top_p"])
def test_what_the_view_shows_is_what_the_model_ran(router):
    model = model_of(router=router)
    blocks = moesaic.view(model)
    assert [(block.name, block.layer, block.num_experts) for block in blocks] == [
        ("model.layers.0.moe", 0, 4), ("model.layers.1.moe", 1, 4),
    ]  # fmt: skip
    seen = []
    with blocks.on_route(lambda routing, block: seen.append(routing)):
        ran = model(IDS, output_routings=True).routings
    for a, b in zip(seen, ran, strict=True):
        assert torch.equal(a.experts_TK, b.experts_TK) and torch.equal(a.weights_TK, b.weights_TK)
        assert torch.equal(a.logits_TE, b.logits_TE[:, :4])
    expert = blocks[1].bank[2]
    assert torch.equal(torch.cat([expert.gate, expert.up]), model.model.layers[1].moe.bank.gate_up_EHD[2])
    assert blocks[0].expert_bytes == 3 * 16 * 16 * 4


def test_replacing_an_expert_and_a_routing_hook_change_what_runs():
    model = model_of()
    blocks, before = moesaic.view(model), model(IDS).logits
    kept = blocks[0].bank[1]
    for e in range(4):
        blocks[0].bank[e] = kept
    assert not torch.allclose(model(IDS).logits, before)
    after = model(IDS).logits
    with blocks.on_route(lambda routing, block: routing.replace(experts_TK=torch.full((12, 2), -1))):
        empty = model(IDS).logits
    assert not torch.allclose(empty, after)
    assert torch.equal(model(IDS).logits, after), "the hook is gone"


def test_a_trace_of_it_holds_its_choices(tmp_path):
    model = model_of()
    with moesaic.trace(model, tmp_path / "run.moetrace"):
        ran = model(IDS, output_routings=True).routings
    trace = moesaic.open_trace(tmp_path / "run.moetrace")
    assert trace.experts_TLK.shape == (12, 2, 2)
    for layer, routing in enumerate(ran):
        stored = torch.as_tensor(trace.experts_TLK[:, layer].astype("int64"))
        assert torch.equal(stored.sort(1).values, routing.experts_TK.sort(1).values)


def test_other_banks_are_not_opened_and_streaming_is_refused_in_words(tmp_path):
    with pytest.raises(NotMoE):
        moesaic.view(model_of(bank="unequal", router="top_p"))
    model_of().save_pretrained(tmp_path)
    loaded = moesaic.load(tmp_path)
    assert type(loaded.model).__name__ == "MoesaicForCausalLM"
    with pytest.raises(BadInput, match="bank of a moesaic layer"):
        load_streamed(tmp_path, resident=0.5)


@pytest.mark.parametrize("how", [{"k": 1}, {"without": [2]}, {"bias": torch.zeros(4)}, {"force": torch.zeros(12, 1).long()}])
def test_policies_that_need_a_transformers_router_are_refused_in_words(how):
    model = model_of()
    before = model(IDS).logits
    with pytest.raises(BadInput, match="use fn=, which sees the finished routing"), moesaic.view(model).policy(**how):
        model(IDS)
    assert torch.equal(model(IDS).logits, before), "nothing of the policy is left"


def test_packing_is_refused_in_words_and_writes_nothing(tmp_path, capsys):
    from moesaic.cli.main import main

    model_of().save_pretrained(tmp_path / "model")
    with pytest.raises(SystemExit) as stop:
        main(["pack", str(tmp_path / "model"), str(tmp_path / "out"), "--bits", "4"])
    assert stop.value.code == 2 and "bank of a moesaic layer" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
