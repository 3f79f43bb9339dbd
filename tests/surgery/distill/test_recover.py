"""Recovery: its loss, its teacher, what learns, and a recipe that prunes and recovers."""

from __future__ import annotations

import pytest
import torch

from moesaic.cli.surgical import trainer
from moesaic.core.errors import BadInput
from moesaic.surgery.distill.recover import Recover
from moesaic.surgery.objective import Given, nats
from moesaic.surgery.recipe import parse, plan_recipe, run_recipe
from moesaic.surgery.recovery import softened_kl
from moesaic.view import load
from moesaic.view.block import View

TEXT = "the quick brown fox jumps over the lazy dog. " * 200


def test_softened_kl_is_0_where_both_agree_and_else_that_of_the_softened_distributions():
    one, other = torch.randn(2, 3, 7), torch.randn(2, 3, 9)
    assert softened_kl(one + 5, one, 2.0).item() == pytest.approx(0, abs=1e-6)
    teacher, student = (other[..., :7] / 2).softmax(-1), (one / 2).softmax(-1)
    want = (teacher * (teacher / student).log()).sum(-1).mean()
    torch.testing.assert_close(softened_kl(one, other, 2.0), want)


def test_the_loss_is_task_and_kl_and_the_teacher_stays(make, ids):
    student, teacher = make("Mixtral"), make("Mixtral")
    with torch.no_grad():
        for p in teacher.parameters():
            p += 0.05 * torch.randn_like(p)
    objective = Recover(kd=0.3, task=0.5)
    learn = objective.prepare(student, Given(None, teacher=teacher))
    loss = objective.loss(student, {"text": ids[0]})
    far = softened_kl(student(ids[0]).logits[:, :-1], teacher(ids[0]).logits[:, :-1], 2.0)
    torch.testing.assert_close(loss, 0.5 * nats(student, ids[0]) + 0.3 * far)
    loss.backward()
    assert len(learn) == len(list(student.parameters())) and all(p.grad is None for p in teacher.parameters())


@pytest.mark.parametrize(("train", "owner"), [("moe", "parent"), ("experts", "experts")])
def test_what_learns(make, train, owner):
    model = make("Mixtral")
    found = {id(p) for p in Recover(train=train).prepare(model, Given(None))}
    assert found == {id(p) for block in View(model) for p in getattr(block, owner).parameters()}


def test_bad_options_are_named():
    for options, says in (({"kd": 0, "task": 0}, "kd=0"), ({"temperature": 0}, "temperature=0"), ({"train": "x"}, "train='x'")):
        with pytest.raises(BadInput, match=says):
            Recover(**options)


def steps_of(folder, steps):
    (folder / "text.txt").write_text(TEXT)
    training = {"steps": steps, "seq_len": 64, "batch_size": 2, "lr": 3e-4}
    recover = {"distill": "recover", "texts": {"text": "text.txt"}, "training": training}
    return parse({"steps": [{"prune": "weight_norm", "keep": 0.5}, recover]}, root=folder)


def test_a_recipe_learns_from_its_own_model(tmp_path):
    seen = []

    def told(step, source, out, resume=False):
        seen.append(step)
        return {}

    plans = plan_recipe("bundled", steps_of(tmp_path, 5), told)
    assert [plan.family for plan in plans] == ["prune", "distill"] and plans[-1].stock and not seen  # nothing to open yet


@pytest.mark.slow
def test_what_was_pruned_recovers(tmp_path):
    first = steps_of(tmp_path, 25)
    run_recipe("bundled", tmp_path / "pruned", first[:1])
    run_recipe("bundled", tmp_path / "out", first, trainer=trainer)
    found = {}
    for name in ("pruned", "out"):
        model, tokenizer = load(tmp_path / name)
        rows = torch.tensor(tokenizer(TEXT)["input_ids"][:128])[None]
        with torch.no_grad():
            found[name] = float(nats(model, rows))
        assert {block.num_experts for block in View(model)} == {8}
    assert found["out"] < found["pruned"]
