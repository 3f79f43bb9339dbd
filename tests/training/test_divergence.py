"""Runs that go wrong stop in time, say which step and tensor, and keep a checkpoint from before."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch import nn

from moesaic.core.errors import BadInput
from moesaic.training import divergence
from moesaic.training.config import TrainConfig
from moesaic.training.divergence import DivergenceRule, Watch
from moesaic.training.trainer import Trainer

QUIET = Console(quiet=True)


def told(watch, losses, norms=None, start=0):
    """What the watch says to each step."""
    norms = norms or [1.0] * len(losses)
    return [watch.told(start + i, loss, norm) for i, (loss, norm) in enumerate(zip(losses, norms, strict=True))]


def test_a_loss_that_rises_and_stays_stops_a_run():
    watch = Watch(DivergenceRule(loss_rise=1.0, patience=4))
    assert not any(told(watch, [6.0, 5.0, 4.0, 3.5] * 10 + [3.0] * 40))
    assert not any(told(watch, [4.5, 4.5, 4.5, 3.0], start=80)), "a spike of three steps is none"
    said = told(watch, [3.2, 4.6, 4.7, 5.0, 9.0], start=84)
    assert said[:4] == [""] * 4
    assert "loss 9.000, lowest before 3." in said[4] and "for 4 steps from step 85" in said[4]
    assert watch.in_doubt


def test_a_gradient_norm_that_bursts_and_stays_stops_a_run():
    watch = Watch(DivergenceRule(grad_ratio=50.0, patience=2))
    assert not any(told(watch, [3.0] * 40, [2.0] * 40))
    said = told(watch, [3.0] * 4, [101.0, 2.0, 101.0, 150.0], start=40)
    assert said[:3] == ["", "", ""]
    assert said[3] == "gradient norm 150, usual 2, for 2 steps from step 42"


def test_a_watch_decides_alike_after_a_resume():
    rule = DivergenceRule(loss_rise=0.5, patience=3)
    losses = [5 - 0.05 * i + 0.4 * math.sin(i) for i in range(60)] + [4.0, 4.1, 4.2, 4.3]
    whole, first = Watch(rule), Watch(rule)
    said = told(whole, losses)
    assert any(said)
    told(first, losses[:61])
    second = Watch(rule)
    second.restore(first.state())
    assert told(second, losses[61:], start=61) == said[61:]
    fresh = Watch(rule)
    fresh.restore(Watch(rule).state())
    assert fresh.lowest == math.inf


def test_the_first_bad_tensor_is_named():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    x = torch.ones(2, 3)
    assert divergence.bad_parameter(model) == "" and divergence.bad_output(model, lambda: model(x)) == ""
    model(x).sum().backward()
    assert divergence.bad_gradient(model) == ""
    model[1].weight.grad[0, 1] = math.inf
    assert divergence.bad_gradient(model) == "the gradient of 1.weight has 1 of 9 entries that are not finite"
    with torch.no_grad():
        model[0].bias[2] = math.nan
    assert divergence.bad_parameter(model) == "0.bias has 1 of 3 entries that are not finite"
    assert divergence.bad_output(model, lambda: model(x)) == "the output of 0 is not finite first"


def test_training_that_goes_wrong_names_step_and_tensor(recipe):
    trainer = Trainer(TrainConfig(**recipe), QUIET)
    real, done = trainer.optimizer.step, []

    def spoil(*args):
        real(*args)
        done.append(1)
        if len(done) == 6:
            with torch.no_grad():
                trainer.model.model.layers[1].mlp.gate.weight[0, 0] = math.nan

    trainer.optimizer.step = spoil
    words = r"step 6: loss nan.*model\.layers\.1\.mlp\.gate\.weight has 1 of \d+ entries.*step-000004 is from before"
    with pytest.raises(BadInput, match=words):
        trainer.run()
    assert [path.name for path in Path(recipe["out"], "checkpoints").iterdir()] == ["step-000004"]


def test_a_gradient_alone_is_named(recipe):
    trainer = Trainer(TrainConfig(**recipe), QUIET)
    weight = trainer.model.model.layers[0].self_attn.q_proj.weight
    weight.register_hook(lambda grad: grad * (math.inf if len(seen) == 3 else 1.0))
    seen, real = [], trainer.step
    trainer.step = lambda step: (real(step), seen.append(1))[0]
    before = []
    real_check = trainer._check
    trainer._check = lambda *args: (before.append(weight.detach().clone()), real_check(*args))
    with pytest.raises(BadInput, match=r"step 3: loss \d.*gradient norm (inf|nan).*gradient of .*layers\.0\.self_attn\.q_proj"):
        trainer.run()
    assert torch.equal(weight, before[-1]) and weight.isfinite().all(), "the step was not taken"


def test_while_in_doubt_the_last_good_checkpoint_stays(recipe):
    rule = {"loss_rise": 0.5, "patience": 6}
    trainer = Trainer(TrainConfig(**{**recipe, "steps": 40, "save_every": 2, "divergence": rule}), QUIET)
    real = trainer.local_loss

    def climbing(rows):
        loss, *rest = real(rows)
        return loss + (5.0 if len(steps) >= 20 and trainer.model.training else 0.0), *rest

    steps, real_step = [], trainer.step
    trainer.step = lambda step: (real_step(step), steps.append(1))[0]
    trainer.objective = climbing
    with pytest.raises(
        BadInput, match=r"step 25: loss .*for 6 steps from step 20: training diverged; .*step-000020 is from before"
    ):
        trainer.run()
    kept = sorted(path.name for path in Path(recipe["out"], "checkpoints").iterdir())
    assert kept == ["step-000018", "step-000020"]


def test_the_rule_can_be_switched_off_and_is_checked(recipe):
    assert Trainer(TrainConfig(**{**recipe, "divergence": None}), QUIET).watch is None
    with pytest.raises(ValueError, match="patience"):
        TrainConfig(**{**recipe, "divergence": {"patience": 0}})
