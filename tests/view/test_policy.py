"""Policies against oracles: the configuration or buffer that would have had the same effect, or arithmetic by hand."""

from __future__ import annotations

import contextvars
import threading

import pytest
import torch
import transformers

import moesaic
from moesaic.core.errors import BadInput
from moesaic.view import Policy


def capture(view, model, ids, **policy):
    """Routings of all blocks under a policy."""
    seen = []
    with view.policy(**policy), view.on_route(lambda routing, block: seen.append(routing)), torch.no_grad():
        model(input_ids=ids)
    return seen


@pytest.mark.parametrize(
    ("name", "field"),
    [
        ("Qwen3MoeForCausalLM", "num_experts_per_tok"),
        ("MixtralForCausalLM", "num_experts_per_tok"),
        ("OlmoeForCausalLM", "num_experts_per_tok"),
        ("GptOssForCausalLM", "num_experts_per_tok"),
        ("DeepseekV3ForCausalLM", "num_experts_per_tok"),
        ("NemotronHForCausalLM", "num_experts_per_tok"),
        ("InklingForCausalLM", "num_experts_per_tok"),
        ("Gemma4ForCausalLM", "top_k_experts"),
    ],
)
@pytest.mark.parametrize("k", [1, 3])
def test_k_equals_a_model_built_with_that_k(make, ids, logits, name, field, k):
    model = make(name)
    with moesaic.view(model).policy(k=k):
        steered = logits(model, ids)
    assert not torch.equal(steered, logits(model, ids))
    assert torch.equal(steered, logits(make(name, **{field: k}), ids))


def test_bias_and_mask_equal_the_correction_bias(make, ids, logits):
    """DeepSeek-V3 selects by score plus a stored bias: writing into that bias is the oracle, groups included."""
    model = make("DeepseekV3ForCausalLM", n_group=2, topk_group=1)
    view = moesaic.view(model)
    bias = torch.linspace(-0.5, 0.5, 8)
    with view.policy(bias=bias):
        biased = logits(model, ids)
    with view.policy(without=[0, 5]):
        masked = logits(model, ids)
    plain = logits(model, ids)
    for change, steered in ((bias, biased), (torch.tensor([-1e6, 0, 0, 0, 0, -1e6, 0, 0]), masked)):
        oracle = make("DeepseekV3ForCausalLM", n_group=2, topk_group=1)
        for block in moesaic.view(oracle):
            block.router.e_score_correction_bias += change
        assert not torch.equal(steered, plain)
        assert torch.equal(steered, logits(oracle, ids))


def test_masked_experts_are_never_chosen(model, ids):
    view = moesaic.view(model)
    for routing in capture(view, model, ids, without=[0, 1, 2]):
        assert int(routing.experts_TK.min()) >= 3
    mask = torch.ones(8, dtype=torch.bool)
    mask[[0, 1, 2]] = False
    for a, b in zip(capture(view, model, ids, mask=mask), capture(view, model, ids, without=[0, 1, 2]), strict=True):
        assert torch.equal(a.experts_TK, b.experts_TK)


def test_a_mask_reaches_across_groups_when_it_must(make, ids):
    """Only one expert left in every group, one group allowed: the second expert comes from outside, never masked."""
    model = make("DeepseekV3ForCausalLM", n_group=2, topk_group=1)
    for routing in capture(moesaic.view(model), model, ids, without=[0, 1, 2, 5, 6, 7]):
        assert routing.experts_TK.sort(1).values.tolist() == [[3, 4]] * ids.numel()


def test_mask_renormalises_as_the_architecture_does(qwen, ids):
    """Qwen3: softmax over all, the best allowed, weights over their sum."""
    for routing in capture(moesaic.view(qwen), qwen, ids, without=[0, 3]):
        probs = routing.logits_TE.softmax(1)
        allowed = probs.clone()
        allowed[:, [0, 3]] = -1
        weights, chosen = allowed.topk(2)
        if qwen.config.norm_topk_prob:
            weights = weights / weights.sum(1, keepdim=True)
        assert torch.equal(routing.experts_TK, chosen)
        torch.testing.assert_close(routing.weights_TK, weights)


def test_forced_experts_are_weighed_by_the_architecture(model, ids):
    """Forcing what the model would choose changes nothing; forcing others uses exactly them, with finite weights."""
    view = moesaic.view(model)
    free = capture(view, model, ids)
    same = {block.name: routing.experts_TK for block, routing in zip(view, free, strict=True)}
    forced = capture(view, model, ids, force=same)
    if type(model).__name__ == "PhimoeForCausalLM":
        # It weighs an expert against near rivals, which forcing removes: same experts, other weights from there on.
        assert torch.equal(free[0].experts_TK, forced[0].experts_TK)
    else:
        for a, b in zip(free, forced, strict=True):
            assert torch.equal(a.experts_TK, b.experts_TK)
            torch.testing.assert_close(a.weights_TK, b.weights_TK)
    k = view[0].top_k
    other = torch.stack([torch.randperm(8)[:k] for _ in range(ids.numel())])
    for routing in capture(view, model, ids, force=other):
        assert torch.equal(routing.experts_TK.sort(1).values, other.sort(1).values)
        assert torch.isfinite(routing.weights_TK).all()


def test_hash_routers_keep_their_table_first(make, ids):
    model = make("DeepseekV4ForCausalLM")
    view = moesaic.view(model)
    hashed = [i for i, block in enumerate(view) if hasattr(block.router, "tid2eid")]
    assert hashed
    for i in hashed:
        table = view[i].router.tid2eid[ids.reshape(-1)]
        assert torch.equal(capture(view, model, ids, k=1)[i].experts_TK, table[:, :1])
        more = capture(view, model, ids, k=4)[i].experts_TK
        assert torch.equal(more[:, :2], table)
        assert all(len(set(row)) == 4 for row in more.tolist())
        banned = int(table[0, 0])
        without = capture(view, model, ids, without=[banned])[i].experts_TK
        assert (without != banned).all()
        kept = (table != banned).all(1)
        assert torch.equal(without[kept], table[kept])


def test_sparse_mixer_refuses_what_it_cannot_do(make, ids):
    model = make("PhimoeForCausalLM")
    view = moesaic.view(model)
    with view.policy(k=3), pytest.raises(BadInput, match="PhimoeTopKRouter always chooses 2"):
        model(input_ids=ids)
    free, one = capture(view, model, ids), capture(view, model, ids, k=1)
    assert torch.equal(one[0].experts_TK, free[0].experts_TK[:, :1])


@pytest.mark.parametrize("implementation", ["eager", "moesaic"])
def test_two_requests_follow_two_policies(model, ids, logits, implementation):
    """Each row of a batch comes out as if it had been alone under its own policy."""
    model.set_experts_implementation(implementation)
    view = moesaic.view(model)
    policies = [Policy(k=1), Policy(without=[0, 1, 2, 3])]
    with view.policy(rows=policies):
        both = logits(model, ids)
    for row, policy in enumerate(policies):
        with view.policy(policy):
            alone = logits(model, ids)
        torch.testing.assert_close(both[row], alone[row], rtol=1e-5, atol=1e-5)
    with view.policy(rows=[None, policies[1]]):
        half = logits(model, ids)
    torch.testing.assert_close(half[0], logits(model, ids)[0], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(half[1], logits(model, ids)[1])


def test_rows_show_as_empty_slots_and_sequence_ids_pick_them(qwen, ids):
    view = moesaic.view(qwen)
    k_T = torch.tensor([1, 3, 2, 1, 3, 2, 1, 3, 2, 1, 3, 2, 1, 3])
    rows = [Policy(k=1), Policy(k=2), Policy(k=3)]
    for routing in capture(view, qwen, ids, rows=rows, sequence_ids=k_T - 1):
        assert torch.equal((routing.experts_TK >= 0).sum(1), k_T)
        assert routing.weights_TK[routing.experts_TK < 0].abs().sum() == 0
    with view.policy(rows=rows), pytest.raises(BadInput, match="3 rows given, but the call has 14 tokens"):
        qwen(input_ids=ids)


def test_fn_sees_the_finished_routing_of_its_own_rows(qwen, ids):
    def to_seven(routing, block):
        return routing.replace(experts_TK=torch.full_like(routing.experts_TK, 7))

    for routing in capture(moesaic.view(qwen), qwen, ids, rows=[None, Policy(fn=to_seven)]):
        assert (routing.experts_TK[7:] == 7).all()
        assert not (routing.experts_TK[:7] == 7).all()


def test_policies_differ_by_layer(qwen, ids):
    view = moesaic.view(qwen)
    seen = capture(view, qwen, ids, k={0: 1, view[2].name: 4})
    assert [routing.experts_TK.shape[1] for routing in seen] == [1, 2, 4, 2]
    mask = torch.ones(4, 8, dtype=torch.bool)
    mask[1, :6] = False
    seen = capture(view, qwen, ids, mask=mask)
    assert int(seen[1].experts_TK.min()) == 6
    assert int(seen[0].experts_TK.min()) < 6


def test_a_policy_stays_in_its_thread_and_its_block(qwen, ids, logits):
    view = moesaic.view(qwen)
    plain, elsewhere = logits(qwen, ids), []
    with view.policy(k=1):
        with view.policy(k=4):
            four = logits(qwen, ids)
        steered = logits(qwen, ids)
        threads = [
            threading.Thread(target=lambda: elsewhere.append(logits(qwen, ids))),
            threading.Thread(target=contextvars.copy_context().run, args=(lambda: elsewhere.append(logits(qwen, ids)),)),
        ]
        for thread in threads:
            thread.start()
            thread.join()
    assert torch.equal(elsewhere[0], plain)
    assert torch.equal(elsewhere[1], steered)
    assert not torch.equal(four, steered)
    assert torch.equal(logits(qwen, ids), plain)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"k": 9}, "cannot choose 9 experts per token of 8"),
        ({"k": 0}, "cannot choose 0"),
        ({"without": range(7)}, "cannot choose 2 experts per token of 1"),
        ({"without": [8]}, "has experts 0 to 7"),
        ({"mask": [True] * 7}, r"has 8 experts, given \[7\]"),
        ({"bias": [0.0] * 9}, r"has 8 experts, given \[9\]"),
        ({"k": {17: 1}}, "no MoE block 17; layers are"),
        ({"force": [[0, 8]]}, "within 0 to 7"),
        ({"rows": []}, "rows is empty"),
        ({"rows": [None], "k": 1}, "not both"),
    ],
)
def test_impossible_policies_are_refused_before_anything_runs(qwen, fields, message):
    with pytest.raises(BadInput, match=message), moesaic.view(qwen).policy(**fields):
        pass


def test_generate_follows_rows(qwen, ids):
    """Decoding with a cache: every row continues as it would alone under its policy."""
    view = moesaic.view(qwen)
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    with view.policy(rows=[Policy(k=1), None]):
        both = qwen.generate(ids, **options)
    with view.policy(k=1):
        one = qwen.generate(ids[:1], **options)
    assert torch.equal(both[0], one[0])
    assert torch.equal(both[1], qwen.generate(ids[1:], **options)[0])
    assert isinstance(qwen, transformers.GenerationMixin)
