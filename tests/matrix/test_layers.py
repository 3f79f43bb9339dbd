"""What every registered layer earns by existing: built, compared with its twin, trained, saved, padded, held to its word."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file

from moesaic.core import registry
from moesaic.core.context import RoutingContext
from moesaic.core.errors import BadInput, MissingNeed
from moesaic.layers.layer import Layer
from moesaic.models.reference import HOST, ReferenceLM

LAYERS = [entry.name for entry in registry.entries("layers")]
GIVES = HOST | {"task_ids", "language_ids"}
DIM, EXPERTS = 16, 16
FEW = {"hecto": 2, "duo": 3}


def build(name, **options):
    entry = registry.get("layers", name)
    if "host" in entry.parameters:
        options = {"host": GIVES, **options}
    return entry.build(DIM, FEW.get(name, EXPERTS), **options)


def context(tokens, sequences=1, **kw):
    length = tokens // sequences
    fields = {
        "threads_state": True,
        "carry": {},
        "token_ids": torch.arange(tokens) * 7 % 97,
        "positions": torch.arange(length).repeat(sequences),
        "sequence_ids": torch.arange(sequences).repeat_interleave(length),
        "task_ids": torch.arange(sequences).repeat_interleave(length) % 2,
        "language_ids": torch.arange(sequences).repeat_interleave(length) % 2,
        "step": 0,
    }
    return RoutingContext(**{**fields, **kw})


def one_by_one(bank, x_TD, routing):
    """A bank's definition: one (token, expert) pair at a time."""
    rows = [torch.zeros_like(x_TD[0]) for _ in x_TD]
    for t, e in torch.nonzero(routing.experts_TK >= 0).tolist():
        expert = int(routing.experts_TK[t, e])
        offsets = (torch.arange(bank.num_experts + 1) > expert).long()
        rows[t] = rows[t] + routing.weights_TK[t, e] * bank(x_TD[t : t + 1], offsets)[0]
    return torch.stack(rows)


def plain(layer, x_TD, ctx, router=None):
    y_TD = one_by_one(layer.bank, x_TD, (router or layer.router)(x_TD, ctx))
    return y_TD if layer.shared is None else y_TD + layer.shared(x_TD)


def chain(layer, x_TD, ctx):
    for router in layer.routers():
        x_TD = plain(layer, x_TD, ctx, router) + x_TD
    return x_TD


def halves(layer, x_TD, ctx):
    gates_T2HN = layer.router(x_TD, ctx).keyed_T2HN
    weight_TNN = torch.einsum("thi,thj->tij", *gates_T2HN.unbind(1)).flatten(1)
    return sum(weight_TNN[:, e : e + 1] * layer.bank.expert(e, x_TD) for e in range(len(layer.bank)))


TWINS = {
    "monet": halves,
    "deepseekmoe": plain,
    "chain_of_experts": chain,
    "momentum": plain,
    "openmoe": plain,
    "maestro": plain,
}


@pytest.mark.parametrize("name", LAYERS)
def test_the_class_says_what_the_registry_says(name):
    entry, layer = registry.get("layers", name), build(name)
    assert isinstance(layer, Layer) and entry.summary
    assert set(type(layer).needs) == set(entry.needs)
    assert layer.causal == entry.causal
    if not entry.causal:
        with pytest.raises(BadInput, match="causal"):
            build(name, causal=True)
    for need in entry.needs:
        with pytest.raises(MissingNeed, match=need):
            build(name, host=GIVES - {need})


@pytest.mark.parametrize("name", sorted(TWINS))
@pytest.mark.parametrize("tokens", [1, 23])
def test_output_and_all_gradients_equal_the_definition(name, tokens):
    layer = build(name).train()
    x = torch.randn(tokens, DIM, requires_grad=True)
    y = layer(x, context(tokens))[0]
    want_y = TWINS[name](layer, x, context(tokens))
    torch.testing.assert_close(y, want_y, rtol=1e-4, atol=1e-5)
    seed, wanted = torch.randn_like(y), [x, *layer.parameters()]
    got = torch.autograd.grad(y, wanted, seed, allow_unused=True)
    want = torch.autograd.grad(want_y, wanted, seed, allow_unused=True)
    for (key, p), a, b in zip([("x", x), *layer.named_parameters()], got, want, strict=True):
        a, b = (torch.zeros_like(p) if g is None else g for g in (a, b))
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4, msg=key)


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_two_precisions_deterministic_and_saved(name, dtype, tmp_path):
    layer = build(name).to(dtype).eval()
    x = torch.randn(4, 50, DIM).to(dtype)
    y = layer(x, context(200, 4))[0]
    assert y.dtype == dtype and y.shape == x.shape and y.isfinite().all()
    assert torch.equal(layer(x, context(200, 4))[0], y)
    save_file({k: v.clone().contiguous() for k, v in layer.state_dict().items()}, tmp_path / "layer.safetensors")
    torch.manual_seed(9)
    other = build(name).to(dtype).eval()
    other.load_state_dict(load_file(tmp_path / "layer.safetensors"))
    assert torch.equal(other(x, context(200, 4))[0], y)


@pytest.mark.parametrize("name", LAYERS)
def test_a_batch_of_nothing(name):
    y, routing = build(name).eval()(torch.zeros(0, DIM), context(0))
    assert y.shape == (0, DIM) and routing.tokens == 0


@pytest.mark.parametrize("name", LAYERS)
def test_padding_and_other_sequences_do_not_leak(name):
    layer = build(name).eval()
    mask = torch.arange(20) < torch.tensor([[20], [13], [7]])
    x = torch.randn(3, 20, DIM)
    ctx = context(60, 3, mask=mask.flatten())
    y = layer(x, ctx)[0]
    torch.testing.assert_close(layer(torch.where(mask[..., None], x, 9 * torch.randn_like(x)), ctx)[0][mask], y[mask])
    other = x.clone()
    other[1] = torch.randn(20, DIM)
    torch.testing.assert_close(layer(other, ctx)[0][[0, 2]], y[[0, 2]], rtol=1e-4, atol=1e-5)
    short = layer(x[1:2, :13], context(13))[0]
    torch.testing.assert_close(short, layer(x[1:2], context(20, mask=mask[1]))[0][:, :13], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", LAYERS)
def test_the_future_stays_unseen_by_those_that_say_so(name):
    layer = build(name).eval()
    with torch.no_grad():
        for p in layer.parameters():
            p.add_(0.5 * torch.randn_like(p))
    x = torch.randn(80, DIM)
    later = x.clone()
    later[50:] += 30 * torch.randn(30, DIM)
    runs = [layer(rows, context(80)) for rows in (x, later)]
    same = all(
        torch.allclose(a[:50], b[:50], rtol=1e-4, atol=1e-5)
        for a, b in zip(*[(y, routing.logits_TE) for y, routing in runs], strict=True)
    )
    assert same == layer.causal


@pytest.mark.parametrize("name", LAYERS)
def test_trains_inside_a_model_and_survives_recomputation(name):
    causal = registry.get("layers", name).causal
    ids = (torch.arange(6).view(6, 1) * 5 + torch.arange(25)) % 24
    runs = []
    for checkpoint in (False, True):
        torch.manual_seed(0)
        model = ReferenceLM(vocab_size=24, dim=DIM, layers=3, heads=2, experts=4, causal=causal, checkpoint=checkpoint)
        for block in model.blocks:
            block.moe = build(name, causal=causal) if "causal" in registry.get("layers", name).parameters else build(name)
        optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
        losses = []
        for _ in range(20):
            torch.manual_seed(len(losses))
            loss, _ = model(ids)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            model.after_step()
            losses.append(loss.item())
        runs.append(losses)
    enough = 0.75 if causal else 0.95  # a masked model is taught by a seventh of its tokens
    assert runs[0][-1] < enough * runs[0][0], "the model does not learn a pattern that it can see"
    torch.testing.assert_close(runs[0], runs[1], rtol=1e-3, atol=1e-4)
