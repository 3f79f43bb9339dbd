"""Hash routing: routing.md, the COMET card's item 8 and the table of needs."""

from __future__ import annotations

import pytest
import torch

from moesaic.core.context import RoutingContext
from moesaic.core.errors import BadInput, MissingNeed
from moesaic.routing.hash import Hash


def test_a_token_id_always_goes_to_the_same_experts():
    router = Hash(16, 8, k=2, vocab_size=100)
    ids = torch.randint(0, 100, (50,))
    a = router(torch.randn(50, 16), RoutingContext(token_ids=ids))
    b = router(torch.randn(50, 16), RoutingContext(token_ids=ids))
    assert torch.equal(a.experts_TK, b.experts_TK)
    assert torch.equal(a.weights_TK, torch.full((50, 2), 0.5))
    assert (a.experts_TK[:, 0] != a.experts_TK[:, 1]).all()


def test_balanced_table_beats_random_on_skewed_frequencies():
    frequencies = [10000.0 / (i + 1) for i in range(1000)]
    load = {}
    for name, given in (("balanced", frequencies), ("random", None)):
        table = Hash(16, 8, vocab_size=1000, frequencies=given).table_VK[:, 0]
        load[name] = torch.zeros(8).index_add(0, table, torch.tensor(frequencies))
    heaviest = max(frequencies)
    assert load["balanced"].max() <= max(heaviest, load["balanced"].mean().item() * 1.001)
    assert load["balanced"].max() < load["random"].max()


def test_seed_decides_and_the_table_is_saved():
    a, b, c = Hash(16, 8, vocab_size=50), Hash(16, 8, vocab_size=50), Hash(16, 8, vocab_size=50, seed=1)
    assert torch.equal(a.table_VK, b.table_VK) and not torch.equal(a.table_VK, c.table_VK)
    assert "table_VK" in a.state_dict()


def test_bad_input():
    with pytest.raises(MissingNeed, match="token_ids"):
        Hash(16, 8)(torch.randn(2, 16), RoutingContext())
    with pytest.raises(BadInput, match="token id 60 is outside the hash table of 50"):
        Hash(16, 8, vocab_size=50)(torch.randn(1, 16), RoutingContext(token_ids=torch.tensor([60])))
    with pytest.raises(BadInput, match="frequencies has 3 entries"):
        Hash(16, 8, vocab_size=50, frequencies=[1, 2, 3])
