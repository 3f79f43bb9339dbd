"""What every registered router earns by existing: it is built, trained, saved, padded, repeated and held to its word."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.utils.flop_counter import FlopCounterMode

from moesaic.core import registry
from moesaic.core.context import RoutingContext
from moesaic.core.errors import BadInput, MissingNeed
from moesaic.core.routing import Dispatch
from moesaic.layers.moe import MoE
from moesaic.models.reference import HOST, ReferenceLM

ROUTERS = [entry.name for entry in registry.entries("routing")]
DIM = 16
GIVEN = {
    "task_ids": lambda n: torch.arange(n) % 2,
    "modality_ids": lambda n: torch.arange(n) // 3 % 2,
    "language_ids": lambda n: torch.arange(n) % 4 - 1,
    "class_ids": lambda n: torch.where(torch.arange(n) % 5 == 0, 1000, torch.arange(n) % 7),
}
"""What a caller hands to a host for the routers that need it: one id for each of n tokens (or sequences)."""


class Uniform:
    """An attention that looks at every earlier token alike."""

    def __init__(self, sequences, length):
        a = torch.ones(length, length).tril()
        self.a = torch.block_diag(*[a / a.sum(1, keepdim=True)] * sequences)

    def mix(self, values_TC):
        return self.a[: len(values_TC), : len(values_TC)].to(values_TC) @ values_TC


def layer(name, experts=8):
    return MoE(DIM, experts, name, host=HOST | GIVEN.keys())


def model_of(name, **options):
    """A small language model with this router, and the ids that its calls must be given, by sequence."""
    entry = registry.get("routing", name)
    given = sorted(entry.needs & GIVEN.keys())
    model = ReferenceLM(dim=32, heads=2, experts=4, router=name, causal=entry.causal, gives=given, **options)
    return model, lambda ids: {key: GIVEN[key](len(ids)) for key in given}


def context(tokens, sequences=1, **kw):
    length = tokens // sequences
    return RoutingContext(
        **{"step": 3, **kw},
        threads_state=True,
        attention=Uniform(sequences, length),
        token_ids=torch.arange(tokens) * 7 % 97,
        positions=torch.arange(length).repeat(sequences),
        sequence_ids=torch.arange(sequences).repeat_interleave(length),
        **{key: ids(tokens) for key, ids in GIVEN.items()},
    )


def naive(moe, x_TD, routing):
    """The layer's definition, one pair at a time."""
    bank = moe.bank
    if routing.soft:
        bank = moe.bank.merge(routing.merge_GE)
        pairs = [(t, int(g), x_TD.new_ones(())) for t, g in enumerate(routing.group_T)]
    elif routing.pairs is not None:
        pairs = list(zip(*(part.unbind() for part in routing.pairs), strict=True))
    else:
        slots = torch.nonzero(routing.experts_TK >= 0).tolist()
        pairs = [(t, int(routing.experts_TK[t, k]), routing.weights_TK[t, k]) for t, k in slots]
    rows = [x_TD.new_zeros(DIM) for _ in range(len(x_TD))]
    for t, e, w in pairs:
        offsets = (torch.arange(bank.num_experts + 1) > int(e)).long()
        rows[int(t)] = rows[int(t)] + w * bank(x_TD[int(t) : int(t) + 1], offsets)[0]
    return torch.stack(rows)


@pytest.mark.parametrize("name", ROUTERS)
def test_the_class_says_what_the_registry_says(name):
    entry = registry.get("routing", name)
    router = layer(name).router
    assert router.needs == entry.needs
    assert router.causal == entry.causal
    if not entry.causal:
        with pytest.raises(BadInput, match="causal"):
            MoE(DIM, 8, name, causal=True)
    for need in entry.needs - {"activations"}:
        with pytest.raises(MissingNeed, match=need):
            MoE(DIM, 8, name, host=(HOST | GIVEN.keys()) - {need})


@pytest.mark.parametrize("name", ROUTERS)
@pytest.mark.parametrize(("tokens", "experts"), [(1, 5), (63, 5), (5, 64)])
def test_output_and_all_gradients_equal_the_naive_layer(name, tokens, experts):
    moe = layer(name, experts).train()
    x = torch.randn(tokens, DIM, requires_grad=True)
    y, routing = moe(x, context(tokens, mode="train"))
    seed = torch.randn_like(y)
    named = [(key, p) for key, p in moe.named_parameters() if p.requires_grad]
    wanted = [x, *(p for _, p in named)]
    got = torch.autograd.grad(y, wanted, seed, allow_unused=True, retain_graph=True)
    want_y = naive(moe, x, routing)
    want = torch.autograd.grad(want_y, wanted, seed, allow_unused=True)
    torch.testing.assert_close(y, want_y, rtol=1e-4, atol=1e-5)
    for (key, _), a, b in zip([("x", x), *named], got, want, strict=True):
        a, b = (torch.zeros(1) if g is None else g for g in (a, b))
        torch.testing.assert_close(a.expand_as(b) if a.numel() == 1 else a, b.expand_as(a), rtol=1e-3, atol=1e-4, msg=key)


@pytest.mark.parametrize("name", ROUTERS)
def test_bfloat16_and_a_thousand_tokens(name):
    moe = layer(name).to(torch.bfloat16).eval()
    x = torch.randn(1000, DIM).to(torch.bfloat16)
    y, routing = moe(x, context(1000, 4))
    assert y.dtype == torch.bfloat16
    assert y.isfinite().all()
    assert routing.logits_TE.dtype == torch.float32, "router arithmetic is float32"


@pytest.mark.parametrize("name", ROUTERS)
def test_deterministic_and_saved(name, tmp_path):
    moe = layer(name).eval()
    x = torch.randn(63, DIM)
    y = moe(x, context(63))[0]
    assert torch.equal(moe(x, context(63))[0], y)
    save_file({k: v.contiguous() for k, v in moe.state_dict().items()}, tmp_path / "moe.safetensors")
    torch.manual_seed(9)
    other = layer(name).eval()
    other.load_state_dict(load_file(tmp_path / "moe.safetensors"))
    assert torch.equal(other(x, context(63))[0], y)


@pytest.mark.parametrize("name", ROUTERS)
def test_padding_does_not_leak(name):
    model, given = model_of(name)
    model.eval()
    ids = torch.randint(0, 256, (3, 20))
    mask = torch.arange(20) < torch.tensor([[20], [13], [7]])
    filled = torch.where(mask, ids, torch.randint(0, 256, ids.shape))
    a, b = (model.hidden(i, mask, **given(i))[0] for i in (ids, filled))
    torch.testing.assert_close(a[mask], b[mask])
    loss_a, loss_b = (model(i, mask, **given(i))[0] for i in (ids, filled))
    torch.testing.assert_close(loss_a, loss_b)


@pytest.mark.parametrize("name", ROUTERS)
def test_the_future_stays_unseen_by_those_that_say_so(name):
    """In both modes; a router that looks ahead in one of them only is not causal."""
    causal = registry.get("routing", name).causal
    moe = layer(name)
    with torch.no_grad():
        for p in moe.router.parameters():
            p.mul_(20)
    x = torch.randn(40, DIM)
    later = x.clone()
    later[25:] += 3 * torch.randn(15, DIM)
    same = []
    for mode in ("train", "eval"):
        moe.train(mode == "train")
        outputs = []
        for tokens in (x, later):
            torch.manual_seed(5)  # the same noise
            outputs.append(moe(tokens, context(40, mode=mode))[0][:25])
        same.append(torch.allclose(*outputs, rtol=1e-4, atol=1e-5))
    assert all(same) == causal


@pytest.mark.parametrize("name", ROUTERS)
def test_its_cost_is_what_it_declares(name):
    router, sequences, length = layer(name).router.train(), 2, 12
    ctx = context(sequences * length, sequences, mode="train")
    x = torch.randn(sequences * length, DIM)
    if "activations" in router.needs:
        ctx = ctx.replace(activations=lambda tokens: torch.ones(len(tokens), 8, 4))
    if "previous" in router.needs:
        ctx = ctx.replace(previous=router(x, ctx).state)
    with FlopCounterMode(display=False) as counter:
        router(x, ctx)
    products = router.flops_per_token(length) - router.sweep_flops
    attended = 2 * length * 8 if "attention" in router.needs else 0  # of one sequence, in a matrix that holds both
    per_token = sequences * length * (products + attended)
    assert counter.get_total_flops() == pytest.approx(per_token + router.fixed_flops)
    assert router.parameter_count == sum(p.numel() for p in router.parameters())


@pytest.mark.parametrize("name", ROUTERS)
def test_trains_inside_a_language_model_and_survives_recomputation(name):
    ids = (torch.arange(8).view(8, 1) * 5 + torch.arange(33)) % 24
    runs = []
    for checkpoint in (False, True):
        torch.manual_seed(0)
        balance = {} if name == "smear" else {"switch": 0.01}
        model, given = model_of(name, vocab_size=24, balance=balance, checkpoint=checkpoint)
        optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
        losses = []
        for _ in range(40):
            loss, routings = model(ids, **given(ids))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            model.after_step()
            losses.append(loss.item())
            assert len(routings) == 2
        runs.append(losses)
    assert runs[0][-1] < 0.6 * runs[0][0], "the model does not learn a pattern that it can see"
    torch.testing.assert_close(runs[0], runs[1], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ROUTERS)
def test_routing_is_callable_outside_its_layer(name):
    moe = layer(name).eval()
    x = torch.randn(12, DIM)
    ctx = context(12, memo={})
    if "activations" in moe.router.needs:
        ctx = ctx.replace(activations=lambda tokens: moe.bank.activations(tokens, {}))
    alone, inside = moe.router(x, ctx), moe(x, context(12))[1]
    torch.testing.assert_close(alone.logits_TE, inside.logits_TE)
    if not alone.soft:
        assert torch.equal(Dispatch.of(alone, None, 8).token_S, Dispatch.of(inside, None, 8).token_S)


@pytest.mark.parametrize("name", ROUTERS)
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_a_call_of_padding_alone_stays_finite(name, mode):
    moe = layer(name)
    y = moe(torch.randn(6, DIM), context(6, mode=mode, mask=torch.zeros(6, dtype=torch.bool)))[0]
    assert y.isfinite().all()
