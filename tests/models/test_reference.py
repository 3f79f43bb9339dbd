"""The reference host gives what it promises and refuses what it cannot serve."""

from __future__ import annotations

import pytest
import torch

from moesaic.core.errors import BadInput, MissingNeed
from moesaic.experts.unequal import arithmetic_widths
from moesaic.models.reference import ReferenceLM


def test_unequal_experts_with_top_p_and_the_parameter_penalty():
    ids = (torch.arange(8).view(8, 1) * 5 + torch.arange(33)) % 24
    active = {}
    penalty = {"p_penalty": {"coefficient": 0.1, "widths": arithmetic_widths(8, 32)}}
    for name, balance in (("p_penalty", penalty), ("switch", {"switch": 0.01})):
        torch.manual_seed(0)
        options = {"p": 0.6, "renormalise": True}
        model = ReferenceLM(24, 32, 2, 2, 8, "top_p", "unequal", 32, balance=balance, router_options=options)
        optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
        for _ in range(80):
            loss, routings = model(ids)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        widths = torch.tensor(model.blocks[0].moe.bank.widths).float()
        active[name] = sum((r.counts_E() * widths).sum() / r.tokens for r in routings).item()
        assert loss.item() < 2.0
    assert active["p_penalty"] < 0.95 * active["switch"]  # HMoE: the penalty buys fewer activated parameters


def test_non_causal_host_sees_the_whole_sequence_and_causal_does_not():
    for causal in (True, False):
        model = ReferenceLM(dim=32, heads=2, experts=4, causal=causal).eval()
        ids = torch.randint(0, 256, (1, 12))
        later = ids.clone()
        later[0, -1] = (later[0, -1] + 1) % 256
        same = torch.allclose(model.hidden(ids)[0][:, :-1], model.hidden(later)[0][:, :-1], atol=1e-5)
        assert same == causal


def test_refusals():
    with pytest.raises(BadInput, match="causal host"):
        ReferenceLM(router="expert_choice")
    with pytest.raises(MissingNeed, match="activations"):
        ReferenceLM(router="autonomy_of_experts", bank="gated_mlp")
    with pytest.raises(BadInput, match="heads of an even width"):
        ReferenceLM(dim=30, heads=4)
