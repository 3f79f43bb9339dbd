"""A change applied in memory is what the router and the experts would have done without the experts that went."""

from __future__ import annotations

import pytest
import torch

from moesaic.core.errors import BadInput
from moesaic.surgery.apply import apply
from moesaic.surgery.layer import Change
from moesaic.surgery.reconstruct import never_chosen
from moesaic.surgery.shapes import facts_of
from moesaic.view.block import View

NAMES = [
    "Mixtral", "Qwen3Moe", "DeepseekV3", "GptOss", "Olmoe", "GraniteMoe", "Phimoe", "NemotronH", "Gemma4", "Inkling", "Zaya",
    "Ernie4_5_Moe", "Lfm2Moe", "MiniMaxM2",
]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_dropping_experts_is_never_choosing_them(make, ids, logits, name):
    model = make(name)
    blocks = View(model)
    kept = [0, 2, 3, 5, 6, 7]  # one of each half is gone: the groups stay equal
    with blocks.policy(never_chosen([1, 4], 8, scored=name != "Phimoe")):
        expected = logits(model, ids)
    assert not torch.equal(expected, logits(model, ids))
    for block, facts in zip(blocks, facts_of(blocks), strict=True):
        apply(block, Change(kept), facts)
    torch.testing.assert_close(logits(model, ids), expected)


@pytest.mark.parametrize("name", NAMES)
def test_a_permutation_of_the_experts_changes_nothing(make, ids, logits, shuffle, name):
    model = make(name)
    before = logits(model, ids)
    shuffle(model)
    torch.testing.assert_close(logits(model, ids), before)


@pytest.mark.parametrize("name", ["Mixtral", "DeepseekV3", "GptOss", "DeepseekV4"])
def test_rows_that_share_an_expert_run_it_for_both(make, ids, logits, name):
    shared, copied = make(name), make(name)
    keep, rows = [0, 1, 2, 3, 4, 6, 7], [0, 1, 2, 3, 4, 1, 5, 6]  # row 5 runs expert 1
    for model in (shared, copied):
        blocks = View(model)
        for block, facts in zip(blocks, facts_of(blocks), strict=True):
            if model is shared:
                apply(block, Change(keep, rows=range(8), row_to_expert=rows), facts)
                assert block.experts.down_proj.shape[0] == 7
            else:
                block.bank[5] = block.bank[1]
    torch.testing.assert_close(logits(shared, ids), logits(copied, ids))


def test_experts_of_another_width_stand_in_every_layout(make):
    for name in ("Mixtral", "GptOss", "NemotronH"):
        model = make(name)
        block, facts = View(model)[0], facts_of(View(model))[0]
        half = {
            e: block.bank[e].map(
                lambda t: t[..., :8] if t.shape[-1] == 16 and t.dim() == 2 else t[:8] if t.shape[0] == 16 else t
            )
            for e in range(8)
        }
        apply(block, Change(range(8), half), facts)
        for e in (0, 7):
            for key, tensor in half[e].items():
                assert torch.equal(block.bank[e][key], tensor)
        x_TD = torch.randn(3, block.bank.width)
        h_TI, f_TD = block.bank.run_one(2, x_TD)
        assert h_TI.shape == (3, 8) and f_TD.shape == (3, block.bank.width)


def test_mixed_rows_reach_every_vector_of_the_router(make):
    model = make("GptOss")
    block, facts = View(model)[0], facts_of(View(model))[0]
    weight, bias = block.router.weight.detach().clone(), block.router.bias.detach().clone()
    mix = torch.zeros(2, 8)
    mix[0, :4], mix[1, 4:] = 0.25, 0.25
    apply(block, Change([0, 4], matrix_RD=mix @ weight, mix_RE=mix, shift_R=torch.tensor([1.0, 2.0])), facts)
    torch.testing.assert_close(block.router.weight.data, mix @ weight)
    torch.testing.assert_close(block.router.bias.data, mix @ bias + torch.tensor([1.0, 2.0]))


def test_what_cannot_be_applied_is_said(make):
    model = make("DeepseekV4")
    block, facts = View(model)[0], facts_of(View(model))[0]
    before = block.experts.down_proj.shape
    with pytest.raises(BadInput, match="looks experts up in a table"):
        apply(block, Change(range(4)), facts)
    assert block.experts.down_proj.shape == before
    with pytest.raises(ValueError, match="experts"):
        apply(block, Change([0, 99]), facts)
