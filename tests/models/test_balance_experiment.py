"""The cards' small experiment on real text: what keeps the load even, and what it costs."""

from __future__ import annotations

import pytest
import torch

from moesaic.core.documents import read_documents
from moesaic.models.reference import ReferenceLM

STEPS, TAIL = 300, 20


def train(text_ids, balance, options):
    """Mean loss and MaxVio (max load / mean load - 1, worst layer) over the last steps of a byte-level model."""
    torch.manual_seed(0)
    model = ReferenceLM(256, 64, 2, 4, 8, width=64, balance=balance, router_options=options)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses, violations = [], []
    for step in range(STEPS):
        starts = torch.randint(0, len(text_ids) - 129, (8,), generator=torch.Generator().manual_seed(step))
        loss, routings = model(torch.stack([text_ids[s : s + 128] for s in starts]))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        model.after_step()
        plain = loss.item() - sum(v.item() for r in routings for k, v in r.aux.items() if k.startswith("loss/"))
        losses.append(plain)
        violations.append(max((r.counts_E().max() / r.counts_E().mean() - 1).item() for r in routings))
    return sum(losses[-TAIL:]) / TAIL, sum(violations[-TAIL:]) / TAIL


@pytest.mark.slow
@pytest.mark.shared
def test_load_loss_and_bias_controller_even_the_load_at_no_cost(shared):
    text = " ".join(doc.text for doc in read_documents(shared / "data" / "corpus" / "train" / "prose.jsonl.gz"))
    ids = torch.tensor(list(text.encode()[:400_000]))
    none = train(ids, {}, {})
    switch = train(ids, {"switch": 0.01}, {})
    bias = train(ids, {"bias": 0.01}, {"convention": "sigmoid"})
    print(f"\nloss and MaxVio: none {none}, switch {switch}, bias {bias}")
    assert switch[1] < 0.5 * none[1]
    assert bias[1] < 0.5 * none[1]
    assert bias[1] < switch[1] + 0.3
    assert switch[0] <= none[0] + 0.03
    assert bias[0] <= none[0] + 0.03
