"""Masks of Monet's pairs: two forms alike, the limits, rows, masses; knowledge of one domain goes with its pairs."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from moesaic.core.errors import BadInput
from moesaic.experts.monet import Monet
from moesaic.layers.monet import Monet as MonetLayer
from moesaic.steering.monet_mask import MonetMask, read_masks, write_masks
from moesaic.steering.pairs import banks, correlated, dense, instead, masked, measuring, owned, pair_weights, subtracted


def case(kind, n=5, tokens=7, heads=3):
    random = torch.Generator().manual_seed(2)
    bank = Monet(6, n * n, 4, kind)
    for p in bank.parameters():
        p.data = torch.randn(p.shape, generator=random)
    gates = torch.randn(tokens, 2, heads, n, generator=random).mul(2).softmax(-1)
    return bank, torch.randn(tokens, 6, generator=random), gates


def by_definition(bank, x, gates, mask):
    y = torch.zeros_like(x)
    for i in range(bank.n):
        for j in range(bank.n):
            if not mask[i, j]:
                weight = sum(gates[:, 0, h, i] * gates[:, 1, h, j] for h in range(gates.shape[2]))
                y += weight[:, None] * bank.expert(i * bank.n + j, x)
    return y


@pytest.mark.parametrize("kind", ["horizontal", "vertical"])
@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 1.0])
def test_both_forms_are_the_definition(kind, share):
    bank, x, gates = case(kind)
    mask = torch.rand(5, 5, generator=torch.Generator().manual_seed(int(share * 10))) < share
    wanted = by_definition(bank, x, gates, mask)
    for form in (subtracted, dense, masked):
        torch.testing.assert_close(form(bank, x, gates, mask), wanted, rtol=2e-4, atol=2e-4)
    if share == 0.0:
        assert torch.equal(masked(bank, x, gates, mask), bank.run_keyed(x, gates))
    if share == 1.0:
        assert dense(bank, x, gates, mask).abs().max() == 0


@pytest.mark.parametrize("kind", ["horizontal", "vertical"])
def test_a_whole_row_is_a_gate_of_zero(kind):
    bank, x, gates = case(kind)
    mask = torch.zeros(5, 5, dtype=torch.bool)
    mask[3] = True
    gone = gates.clone()
    gone[:, 0, :, 3] = 0
    torch.testing.assert_close(dense(bank, x, gates, mask), bank.run_keyed(x, gone), rtol=1e-4, atol=1e-4)


def test_masses_sum_to_the_heads_and_masks_take_effect_in_a_layer():
    layer = MonetLayer(8, 16, heads=3, bank_options={"width": 4}).eval()
    x = torch.randn(2, 5, 8)
    from moesaic.core.context import RoutingContext

    ctx = RoutingContext(carry={})
    with measuring(layer) as masses:
        y, routing = layer(x, ctx)
    assert float(masses[0].sum()) == pytest.approx(3.0)
    torch.testing.assert_close(masses[0].float(), pair_weights(routing.keyed_T2HN).mean(0))
    steer = MonetMask(rows={0: [0, 1, 2, 3]})
    steer.bind(layer, None)
    with steer.start([]).around():
        assert layer(x, ctx)[0].abs().max() == 0
    assert torch.equal(layer(x, ctx)[0], y)


def test_owners_and_correlation():
    a, b = torch.tensor([[4.0, 1.0], [1.0, 0.0]]), torch.tensor([[1.0, 2.0], [1.0, 0.0]])
    first, second = owned([a, b])
    assert first.tolist() == [[True, False], [False, False]]
    assert second.tolist() == [[False, True], [False, False]]
    masses = torch.stack([a * t for t in (0.1, 0.5, 0.9)])
    masses[:, 0, 1] = 1.0
    assert correlated(masses, torch.tensor([1.0, 2.0, 3.0]), 0.25).sum() == 1
    assert not correlated(masses, torch.tensor([1.0, 2.0, 3.0]), 0.25)[0, 1]


def test_masks_in_a_file(tmp_path):
    masks = [torch.rand(5, 5) < 0.3, torch.rand(4, 4) < 0.5]
    again = read_masks(write_masks(tmp_path / "m.safetensors", masks))
    assert all(torch.equal(x, y) for x, y in zip(masks, again, strict=True))
    with pytest.raises(BadInput, match="no file of Monet masks"):
        read_masks(tmp_path / "none")


def test_bad_input_is_named():
    layer = MonetLayer(8, 16, heads=1)
    for options, message in (({}, "give file"), ({"rows": {3: [0]}}, "no bank 3"), ({"pairs": {0: [[0, 9]]}}, "0 to 3")):
        with pytest.raises(BadInput, match=message):
            MonetMask(**options).bind(layer, None)
    with pytest.raises(BadInput, match="no Monet layer"):
        MonetMask(rows={0: [1]}).bind(nn.Linear(2, 2), None)


def test_a_domain_is_lost_with_its_pairs():
    """Two toy domains, a lookup table each, over disjoint inputs: masking the pairs of one raises its loss; random pairs of
    the same mass raise both alike."""
    torch.manual_seed(0)
    from moesaic.core.context import RoutingContext

    table = torch.randn(2, 24, 16)
    targets = torch.randn(2, 24, 16)
    layer = MonetLayer(16, 64, heads=2, balance=(), bank_options={"width": 8})
    optimiser = torch.optim.Adam(layer.parameters(), lr=1e-2)
    for _ in range(300):
        loss = sum((layer(table[d], RoutingContext(mode="train", carry={}))[0] - targets[d]).square().mean() for d in (0, 1))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    layer.eval()
    ctx = RoutingContext(carry={})

    def losses(mask=None):
        (bank,) = banks(layer)
        run = (
            (lambda at, b, x, g: masked(b, x, g, mask)) if mask is not None else (lambda at, b, x, g: Monet.run_keyed(b, x, g))
        )
        with torch.no_grad(), instead([bank], run):
            return [float((layer(table[d], ctx)[0] - targets[d]).square().mean()) for d in (0, 1)]

    masses = []
    for d in (0, 1):
        with torch.no_grad(), measuring(layer) as found:
            layer(table[d], ctx)
        masses.append(found[0])
    own = owned(masses)[0]
    base, gone = losses(), losses(own)
    assert own.any()
    assert gone[0] - base[0] > 3 * max(gone[1] - base[1], 0.0)
    total, random = float((masses[0] + masses[1])[own].sum()), torch.zeros(8, 8, dtype=torch.bool)
    for at in torch.randperm(64, generator=torch.Generator().manual_seed(1)).tolist():
        if float((masses[0] + masses[1])[random].sum()) < total:
            random[at // 8, at % 8] = True
    hurt = [after - before for after, before in zip(losses(random), base, strict=True)]
    assert gone[0] - base[0] > hurt[0]
    assert hurt[0] < 3 * hurt[1]
