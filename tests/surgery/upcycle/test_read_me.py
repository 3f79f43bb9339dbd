"""Read-ME: masks, residual, a router that reads token ids alone, and what it learns."""

import pytest
import torch
from transformers import AutoModelForCausalLM

import moesaic  # noqa: F401 - registers the classes
from moesaic.core.documents import Document
from moesaic.core.errors import BadInput
from moesaic.surgery.conversion import Told
from moesaic.surgery.convert import convert, plan_conversion
from moesaic.surgery.passes import rows
from moesaic.surgery.upcycle.read_me import domain_masks, matches, router_loss
from moesaic.training.finetune import finetune
from moesaic.view.load import load

TEXTS = {
    "code": [Document("def add(x, y):\n    return x + y\n" * 12, "code")],
    "tale": [Document("Once upon a time there was a little fox who lived in the wood. " * 12, "tale")],
}
QUICK = {"rounds": 1, "router_steps": 2, "expert_steps": 0}
IDS = torch.randint(1, 90, (2, 9), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def made(folder, tmp_path):
    def run(**options):
        source = folder("qwen3", tokenizer=True)
        told = Told(texts=TEXTS, seq_len=32, train=finetune)
        convert([source], tmp_path / "out", "read_me", {**QUICK, **options}, told=told)
        return AutoModelForCausalLM.from_pretrained(source), load(tmp_path / "out", dense_ok=True)

    return run


@torch.no_grad()
def test_with_rate_1_all_is_residual_and_the_model_is_the_dense_one(made, near):
    """Card (a)."""
    dense, (moe, _) = made(rate=1.0)
    assert moe.config.upcycle["inner"] == [0] * 4 and moe.config.upcycle["shared"] == [48] * 4
    assert near(moe(IDS).logits, dense(IDS).logits) < 2e-6


@torch.no_grad()
def test_residual_and_expert_together_are_the_masked_ffn(made):
    """Card (b): of each expert and layer, against the dense FFN with all other neurons at zero."""
    dense, (moe, tokenizer) = made(rate=0.4)
    from moesaic.surgery.passes import activations

    mean_ELI = torch.stack([activations(dense, rows(tokenizer, TEXTS[name], 32, 65536)) for name in sorted(TEXTS)])
    masks_ELI, x = domain_masks(mean_ELI, 0.4), torch.randn(1, 5, 32)
    for e in range(2):
        moe.schedule.experts_BN = torch.full((1, 5), e)
        for at in range(4):
            mlp = dense.model.layers[at].mlp
            h = torch.nn.functional.silu(mlp.gate_proj(x)) * mlp.up_proj(x)
            want = mlp.down_proj(h * masks_ELI[e, at])
            assert torch.allclose(moe.model.layers[at].mlp(x), want, atol=1e-5)


@torch.no_grad()
def test_decisions_read_token_ids_alone_and_are_causal(made):
    """Card (c), (d)."""
    _, (moe, _) = made()
    moe(IDS)
    chosen = moe.schedule.experts_BN
    for p in moe.model.parameters():
        p.mul_(1.3)
    moe(IDS)
    assert torch.equal(moe.schedule.experts_BN, chosen)
    later = IDS.clone()
    later[:, 5:] += 1
    logits, other = moe.token_router(IDS), moe.token_router(later)
    assert torch.equal(logits[:, :5], other[:, :5]) and not torch.equal(logits[:, 5:], other[:, 5:])


def test_masks_have_so_many_ones_and_ties_drop():
    """Card (e)."""
    mean_ELI = torch.rand(3, 2, 11)
    assert (domain_masks(mean_ELI, 0.5).sum(-1) == 5).all()
    mean_ELI[0, 0] = 1.0
    assert domain_masks(mean_ELI, 0.5)[0, 0].sum() == 0
    assert domain_masks(mean_ELI, 1.0).all()


def test_decoding_with_a_cache_is_decoding_without(made):
    _, (moe, _) = made()
    with_cache, without = (moe.generate(IDS, max_new_tokens=8, do_sample=False, use_cache=cache) for cache in (True, False))
    assert torch.equal(with_cache, without)
    first = moe(IDS, use_cache=True)
    with pytest.raises(BadInput, match="does not know its tokens"):
        moe(IDS[:, :1], past_key_values=first.past_key_values)


def test_the_router_learns_the_domain_and_experts_learn(made):
    """Small but real: a router trained on matches sends most of each domain's tokens to that domain's expert."""
    dense, (moe, tokenizer) = made(router_steps=60, expert_steps=3, router_lr=3e-3)
    shares = []
    for name in sorted(TEXTS):
        ids = rows(tokenizer, TEXTS[name], 32, 64)[0]
        shares.append((moe.token_router(ids).argmax(-1) == 0).float().mean())
    assert shares[0] > 0.6 and shares[1] < 0.4
    assert not torch.equal(moe.model.embed_tokens.weight, torch.zeros(1)) and torch.equal(
        moe.model.embed_tokens.weight, dense.model.embed_tokens.weight
    )


def test_router_loss_falls_towards_the_matches(dense):
    model = dense("qwen3")
    masks_ELI = torch.rand(2, 4, 48) > 0.5
    scores = matches(model, masks_ELI, IDS)
    assert scores.shape == (4, 2, 9, 2) and scores.sum(-1).abs().max() < 1e-4
    best = scores.sum(0)
    assert router_loss(best, scores) < router_loss(-best, scores)


def test_router_loss_by_hand():
    """0.75 CE to the best match, smoothed by 0.5, + 0.25 CE to the softmax of the matches, each layer's added."""
    logits_BNE, scores_LBNE = torch.randn(2, 3, 4), 3 * torch.randn(5, 2, 3, 4)
    log_TE, want = logits_BNE.log_softmax(-1).flatten(0, 1), 0.0
    for score_BNE in scores_LBNE:
        score_TE = score_BNE.flatten(0, 1)
        hard_TE = torch.nn.functional.one_hot(score_TE.argmax(-1), 4) * 0.5 + 0.5 / 4
        want = want - ((0.75 * hard_TE + 0.25 * score_TE.softmax(-1)) * log_TE).sum(-1).mean()
    torch.testing.assert_close(router_loss(logits_BNE, scores_LBNE), want)


@pytest.mark.parametrize(
    ("options", "domains", "match"),
    [
        ({}, 1, "reads text of 2 domains, given 1"),
        ({"rate": 0}, 2, "rate=0"),
        ({"heads": 5}, 2, "heads=5"),
    ],
)
def test_what_cannot_apply_stops_at_planning(options, domains, match, folder):
    with pytest.raises(BadInput, match=match):
        plan_conversion([folder("qwen3")], "read_me", options, domains)
