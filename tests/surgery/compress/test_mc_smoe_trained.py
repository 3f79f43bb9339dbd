"""MC-SMoE trained: what its card says must hold, on tiny models; from checkpoint to checkpoint; resumed after a kill."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from moesaic.cli.surgical import trainer
from moesaic.core.errors import BadInput
from moesaic.models.reshaped.factored import LEAF
from moesaic.surgery.compress.mc_smoe import McSmoe
from moesaic.surgery.factored import low_rank
from moesaic.surgery.objective import Given, nats
from moesaic.surgery.progressive import GONE, RowPruner, cubic
from moesaic.surgery.recipe import parse, plan_recipe, run_recipe
from moesaic.view.block import View

TEXT = "the quick brown fox jumps over the lazy dog. " * 200


def given(steps=12, **fields):
    return Given(None, seq_len=9, steps=steps, **fields)


def rows_of(model):
    return [getattr(getattr(block.experts, LEAF), side).rows for block in View(model) for side in ("first", "down")]


@pytest.mark.parametrize("name", ["Mixtral", "GptOss", "NemotronH"])
def test_at_step_0_the_parts_add_up_and_the_factors_are_the_best_of_their_rank(make, ids, logits, name):
    model = make(name)
    before = logits(model, ids)
    weight = [block.experts.down_proj[0].detach().clone() for block in View(model)]
    transposed = [block.bank.transposed for block in View(model)]
    objective = McSmoe(0.6, rho=0.3, warm_up=2, cool_down=2).objective()
    objective.prepare(model, given())
    torch.testing.assert_close(logits(model, ids), before, rtol=1e-4, atol=1e-4)
    side = getattr(View(model)[0].experts, LEAF).down
    rank, left, right = side.ranks[0], side.left[side.span("left", 0)], side.right[side.span("right", 0)]
    own_BA = weight[0].T if transposed[0] else weight[0]
    rest = (own_BA - left.T @ right).norm()
    assert rank == math.ceil(0.3 * own_BA.numel() / sum(own_BA.shape))
    torch.testing.assert_close(rest, torch.linalg.svdvals(own_BA)[rank:].norm(), rtol=1e-4, atol=1e-5)


def test_the_cubic_schedule_falls_from_one_to_its_end():
    shares = [cubic(step, 1000, 0.25) for step in range(1001)]
    assert shares[0] == shares[99] == 1 and shares[600] == shares[1000] == 0.25
    assert all(a >= b for a, b in pairwise(shares)) and cubic(350, 1000, 0.25) == pytest.approx(0.34375)
    assert all(cubic(step, 1000, 1.0) == 1 for step in range(0, 1001, 50))


def learned(final, steps=40, dead=()):
    """Rows of two parameters that learn under a pruner; the pruner and how many stayed after every step."""
    generator = torch.Generator().manual_seed(0)
    rows = [nn.Parameter(torch.randn(n, 6, generator=generator)) for n in (7, 12)]
    wanted = [torch.randn(n, 6, generator=generator) for n in (7, 12)]
    pruner = RowPruner(rows, lambda done: cubic(done, steps, final, 5, 10))
    counts = []
    for done in range(1, steps + 1):
        loss = sum(((p - w) ** 2).sum(1)[i] for p, w in zip(rows, wanted, strict=True) for i in range(len(p)) if i not in dead)
        loss.backward()
        with torch.no_grad():
            for p in rows:
                p -= 0.01 * p.grad
                p.grad = None
        counts.append(pruner.step(done))
        zero = torch.cat([~p.detach().any(1) for p in rows])
        gone = torch.cat(pruner.scores) == GONE
        assert torch.equal(zero, gone)
    return rows, pruner, counts


@pytest.mark.parametrize("final", [1.0, 0.37, 0.0])
def test_rows_shrink_to_the_schedule_over_all_parameters_together(final):
    rows, _, counts = learned(final)
    assert counts == [math.ceil(cubic(done, 40, final, 5, 10) * 19 - 1e-9) for done in range(1, 41)]
    assert counts[-1] == math.ceil(final * 19) and all(a >= b for a, b in pairwise(counts))
    if final == 0.37:
        assert len({int(p.detach().any(1).sum()) / len(p) for p in rows}) == 2  # one threshold, not one for each


def test_rows_without_gradient_go_first():
    rows, _, counts = learned(0.6, dead=(0, 3))
    assert not rows[0][[0, 3]].any() and not rows[1][[0, 3]].any() and counts[-1] == 12


def test_a_score_is_the_moving_mean_of_a_row_of_s_times_its_gradient():
    rows, want = nn.Parameter(torch.tensor([[1.0, -2.0], [3.0, 0.5]])), torch.zeros(2)
    pruner = RowPruner([rows], lambda done: 1.0, beta=0.85)
    for factor in (1.0, -4.0):
        gradient = torch.tensor([[2.0, 1.0], [0.0, 6.0]]) * factor
        (rows * gradient).sum().backward()
        want = 0.85 * want + 0.15 * (rows.detach() * gradient).abs().mean(1)
    torch.testing.assert_close(pruner.scores[0], want)


def test_matrices_of_the_factors_rank_lose_all_rows_and_nothing_else(make, ids, logits):
    model = make("Qwen3Moe")
    method = McSmoe(0.5, rho=0.5, warm_up=1, cool_down=1)
    with torch.no_grad():
        for block in View(model):
            for name in ("gate_up_proj", "down_proj"):
                stack = getattr(block.experts, name)
                for e in range(len(stack)):
                    left, right = low_rank(stack[e], method.rank(*stack[e].shape))
                    stack[e] = left.T @ right
    before, objective = logits(model, ids), method.objective()
    objective.prepare(model, given())
    for done in range(1, 13):
        objective.stepped(done)
    made = objective.finish(model)
    torch.testing.assert_close(logits(made, ids), before, rtol=1e-4, atol=1e-4)
    assert objective.facts()["share"] <= 0.5 and made.config.model_type == "moesaic_surgery"


def test_rows_that_share_an_expert_learn_it_together(make, ids):
    from moesaic.surgery.memory import measure
    from moesaic.surgery.memory import operate as operate_live
    from moesaic.surgery.merge.m_smoe import MSmoe

    model = make("Mixtral")
    operate_live(MSmoe(keep=0.5, router="map"), measure(model, ids, "R0"))
    objective = McSmoe(0.6, rho=0.2, warm_up=1, cool_down=1).objective()
    learn = objective.prepare(model, given())
    held = [len(getattr(block.experts, LEAF).down.ranks) for block in View(model)]
    assert sum(held) < 8 * len(held) and len({id(p) for p in learn}) == len(learn)
    objective.loss(model, {"text": ids[0]}).backward()
    assert all(rows.grad is not None for rows in rows_of(model))


def test_kl_is_0_before_the_first_step_and_the_task_is_the_models_own_loss(make, ids):
    model = make("Mixtral")
    before = float(nats(model, ids[0]))
    objective = McSmoe(0.6, warm_up=2, cool_down=2).objective()
    objective.prepare(model, given())
    loss = float(objective.loss(model, {"text": ids[0]}))
    assert loss == pytest.approx(before, abs=1e-3) and objective.seen[0][1] == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize(
    ("options", "steps", "says"),
    [
        ({"store": "dense"}, 20, "store=dense"),
        ({}, 100, "warm_up=100 and cool_down=400"),
        ({"beta": 1.0}, 20, "beta=1.0"),
        ({"train": "heads"}, 20, "train='heads'"),
        ({"kd": -1}, 20, "kd=-1"),
    ],
)
def test_what_cannot_be_trained_is_refused(make, options, steps, says):
    with pytest.raises(BadInput, match=says):
        McSmoe(0.5, **options).objective().prepare(make("Mixtral"), given(steps))


def steps_of(folder, **training):
    (folder / "text.txt").write_text(TEXT)
    fields = {"steps": 8, "seq_len": 32, "batch_size": 2, "lr": 1e-4, **training}
    step = {"compress": "mc_smoe", "keep": 0.5, "warm_up": 1, "cool_down": 2, "texts": {"text": "text.txt"}, "training": fields}
    return parse({"steps": [step]}, root=folder)


def test_a_plan_says_whether_it_trains(tmp_path):
    (plan,) = plan_recipe("bundled", steps_of(tmp_path), trainer)
    assert not plan.stock and "learn" in plan.reason and plan.bytes_after < plan.bytes_before
    step = {"compress": "mc_smoe", "data": "text.txt"}
    (plan,) = plan_recipe("bundled", parse({"steps": [step]}, root=tmp_path), trainer)
    assert "without the published training" in plan.reason
    with pytest.raises(BadInput, match="neurons does not train"):
        parse({"steps": [{"compress": "neurons", "texts": {"text": "text.txt"}}]}, root=tmp_path)


@pytest.mark.slow
def test_from_checkpoint_to_checkpoint_and_on_after_a_kill(tmp_path, monkeypatch):
    from moesaic.surgery.progressive import Progressive
    from moesaic.training import snapshots

    monkeypatch.setattr(snapshots, "EVERY", 0.0)
    whole = run_recipe("bundled", tmp_path / "whole", steps_of(tmp_path), trainer=trainer)
    assert not whole["stock"] and not (tmp_path / "whole.training").exists()
    stepped = Progressive.stepped

    def killed(self, done):
        if done == 5:
            raise KeyboardInterrupt
        stepped(self, done)

    monkeypatch.setattr(Progressive, "stepped", killed)
    with pytest.raises(KeyboardInterrupt):
        run_recipe("bundled", tmp_path / "out", steps_of(tmp_path), trainer=trainer)
    assert not (tmp_path / "out").exists() and (tmp_path / "out.training").is_dir()
    monkeypatch.setattr(Progressive, "stepped", stepped)
    with pytest.raises(BadInput, match="pass --resume"):
        run_recipe("bundled", tmp_path / "out", steps_of(tmp_path), trainer=trainer)
    run_recipe("bundled", tmp_path / "out", steps_of(tmp_path), trainer=trainer, resume=True)
    assert (tmp_path / "out/model.safetensors").read_bytes() == (tmp_path / "whole/model.safetensors").read_bytes()
    made, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    rows = [float((p.detach().any(1)).float().mean()) for p in rows_of(made)]
    assert all(share > 0.99 for share in rows)  # only rows that stayed are stored
