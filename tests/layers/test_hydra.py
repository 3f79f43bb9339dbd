"""Card: layers-and-balancing.md, "Hydra": what must hold."""

from __future__ import annotations

import pytest
import torch

from moesaic.core.context import RoutingContext
from moesaic.core.errors import BadInput, MissingNeed
from moesaic.layers.hydra import Hydra, Workspace
from moesaic.layers.moe import MoE
from moesaic.layers.sequences import Sequences
from moesaic.layers.state_space import GatedConvolution, StateSpace, scan
from moesaic.routing.chunk import Chunk
from moesaic.routing.product_key import ProductKey

REAL = torch.ones(2, 40, dtype=torch.bool)


def context(batch, length, **kw):
    sequence = torch.arange(batch).repeat_interleave(length)
    return RoutingContext(sequence_ids=sequence, positions=torch.arange(length).repeat(batch), carry={}, **kw)


def test_with_the_other_paths_off_it_is_the_ssm_block():
    layer = Hydra(16, workspace=False, memory=0).eval()
    with torch.no_grad():
        layer.mix_3[1:] = 0
    x = torch.randn(2, 40, 16)
    want = layer.norm(x + layer.ssm(x, REAL))
    torch.testing.assert_close(layer(x, context(2, 40))[0], want)
    bare = Hydra(16, attention=False, moe=False, workspace=False, memory=0).eval()
    bare.load_state_dict({k: v for k, v in layer.state_dict().items() if k in bare.state_dict()})
    y, routing = bare(x, context(2, 40))
    torch.testing.assert_close(y, want)
    assert routing.counts_E().sum() == 0, "a block without experts routes nothing"


@pytest.mark.parametrize("length", [1, 2, 7, 33])
def test_the_scan_is_the_recurrence(length):
    decay, u = torch.rand(3, length, 5, requires_grad=True), torch.randn(3, length, 5, requires_grad=True)
    s, states = torch.zeros(3, 5), []
    for t in range(length):
        s = decay[:, t] * s + u[:, t]
        states.append(s)
    want, got = torch.stack(states, 1), scan(decay, u)
    torch.testing.assert_close(got, want)
    seed = torch.randn_like(want)
    grads = [torch.autograd.grad(y, [decay, u], seed, allow_unused=True) for y in (got, want)]
    torch.testing.assert_close(grads[0][1], grads[1][1])
    if length > 1:
        torch.testing.assert_close(grads[0][0], grads[1][0])


def test_the_ssm_reads_the_state_before_a_token_and_its_skip_the_token():
    ssm = StateSpace(8)
    ssm.norm = torch.nn.Identity()
    x = torch.randn(1, 6, 8)
    _, _, _, u = ssm.inputs(x).chunk(4, -1)
    y = ssm(x, REAL[:1, :6])
    torch.testing.assert_close(y[:, 0], ssm.skip_D * u[:, 0])
    assert not torch.allclose(y[:, 3], ssm.skip_D * u[:, 3])


def test_the_convolution_starts_as_nothing_and_equals_the_naive_one():
    conv, x = GatedConvolution(4), torch.randn(2, 12, 4)
    assert torch.equal(conv(x, REAL[:, :12]), torch.zeros_like(x))
    torch.nn.init.normal_(conv.kernel_KD)
    want = torch.stack([sum(conv.kernel_KD[b] * x[:, t - b] for b in range(min(8, t + 1))) for t in range(12)], 1)
    torch.testing.assert_close(conv(x, REAL[:, :12]), want * torch.sigmoid(conv.gate(x)))


def test_chunks_of_one_token_are_token_routing_and_a_chunk_shares_its_choice():
    own, token = Chunk(16, 8, source="own", size=1), Chunk(16, 8, granularity="token")
    token.load_state_dict(own.state_dict())
    x, ctx = torch.randn(80, 16), context(2, 40)
    a, b = own(x, ctx), token(x, ctx)
    assert torch.equal(a.experts_TK, b.experts_TK)
    torch.testing.assert_close(a.weights_TK, b.weights_TK)
    chosen = Chunk(16, 8, size=16)(x, ctx).experts_TK.view(2, 40, 2)
    for start in (0, 16, 32):
        part = chosen[:, start : start + 16]
        assert torch.equal(part, part[:, :1].expand_as(part))
    whole = Chunk(16, 8, granularity="sequence", source="own")(x, ctx).experts_TK.view(2, 40, 2)
    assert torch.equal(whole, whole[:, :1].expand_as(whole))


@pytest.mark.parametrize(("source", "causal"), [("previous", True), ("own", False)])
def test_the_mean_of_the_own_chunk_sees_the_future_and_the_one_before_does_not(source, causal):
    router, ctx = Chunk(16, 8, size=8, source=source), context(1, 40)
    x = torch.randn(40, 16)
    later = x.clone()
    later[20:] += 5 * torch.randn(20, 16)
    same = torch.allclose(router(x, ctx).logits_TE[:20], router(later, ctx).logits_TE[:20])
    assert same == causal == router.causal
    if not causal:
        with pytest.raises(BadInput, match="not for a causal host"):
            MoE(16, 8, router, causal=True)


def test_chunks_need_fewer_loads_than_tokens():
    x, ctx = torch.randn(256, 16), context(1, 256)
    loads = {}
    for granularity in ("token", "chunk"):
        chosen = Chunk(16, 8, granularity=granularity)(x, ctx).experts_TK.view(8, 64)
        loads[granularity] = sum(len(set(row.tolist())) for row in chosen)
    assert 2 * loads["chunk"] <= loads["token"]


@pytest.mark.parametrize("experts", [7, 12, 4096])
def test_product_keys_find_the_best_of_all_pairs(experts):
    router, x = ProductKey(16, experts), torch.randn(50, 16)
    routing = router(x, RoutingContext())
    assert router.n1 * router.n2 == experts
    want = routing.logits_TE.topk(4, -1)
    torch.testing.assert_close(routing.logits_TE.gather(1, routing.experts_TK), want.values)
    torch.testing.assert_close(routing.weights_TK, want.values.softmax(-1))
    with pytest.raises(BadInput, match="keep=17"):
        ProductKey(16, 4096, keep=17)


def test_changing_a_token_changes_nothing_before_it_in_the_whole_block():
    layer = Hydra(16, chunk=8, window=8).eval()
    for p in layer.parameters():
        torch.nn.init.normal_(p, std=0.3) if p.dim() > 1 else None
    x = torch.randn(1, 40, 16)
    y = layer(x, context(1, 40))[0]
    for t in (1, 17, 39):
        changed = x.clone()
        changed[:, t] += 3
        other = layer(changed, context(1, 40))[0]
        torch.testing.assert_close(other[:, :t], y[:, :t])
        assert not torch.allclose(other[:, t:], y[:, t:])


def test_attention_keeps_to_its_window():
    at = Sequences(torch.zeros(1, 9, 4), RoutingContext())
    see = at.allowed(True, 3)[0]
    assert torch.equal(see.sum(1), torch.tensor([1, 2, 3, 3, 3, 3, 3, 3, 3]))
    assert not see.triu(1).any()


def test_the_curriculum_follows_the_step_and_is_saved():
    layer = Hydra(16, stages=(10, 20, 30)).train()
    x = torch.randn(1, 12, 16)
    reached = []
    for step in (0, 10, 25, 30):
        routing = layer(x, context(1, 12, mode="train", step=step))[1]
        reached.append((int(layer.stage), routing.counts_E().sum().item()))
    assert reached == [(0, 0), (1, 0), (2, 24), (3, 24)]
    other = Hydra(16, stages=(10, 20, 30)).eval()
    other.load_state_dict(layer.state_dict())
    torch.testing.assert_close(other(x, context(1, 12))[0], layer.eval()(x, context(1, 12))[0])


def test_the_workspace_writes_the_smallest_slot_after_the_step():
    space = Workspace(8, slots=4, active=2, rank=4)
    space.slots_MR.copy_(torch.tensor([3.0, 1.0, 2.0, 4.0]).unsqueeze(1).expand(4, 4))
    before = space.slots_MR.clone()
    space(torch.randn(2, 5, 8), REAL[:, :5], write=False)
    space.after_step()
    assert torch.equal(space.slots_MR, before)
    space(torch.randn(2, 5, 8), REAL[:, :5], write=True)
    assert torch.equal(space.slots_MR, before), "not within the step: a recomputed forward reads the same slots"
    space.after_step()
    changed = (space.slots_MR != before).any(1)
    assert changed.tolist() == [False, True, False, False]


def test_refusals():
    with pytest.raises(MissingNeed, match="positions"):
        Hydra(16, host=["sequence_ids"])
    with pytest.raises(MissingNeed, match="step"):
        Hydra(16, stages=(1, 2, 3), host=["sequence_ids", "positions"])
    with pytest.raises(BadInput, match="three rising steps"):
        Hydra(16, stages=(3, 2, 1))
    with pytest.raises(BadInput, match="heads=3"):
        Hydra(16, heads=3)
    with pytest.raises(BadInput, match="no chunk before"):
        Chunk(16, 8, granularity="sequence")
