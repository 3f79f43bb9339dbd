"""Cards: routing.md "Is Temperature Sample Efficient", "Statistical Perspective"; the dual of bias controllers."""

from __future__ import annotations

import json
import math
import xml.etree.ElementTree as ET

import pytest
import torch

from moesaic.evaluation.theory import EXPERIMENTS, activation_gate, alf_lb, over_specified
from moesaic.evaluation.theory.activation_gate import degeneracy, gate
from moesaic.evaluation.theory.activation_gate import truth as gate_truth
from moesaic.evaluation.theory.alf_lb import descend, scores
from moesaic.evaluation.theory.fitting import fit, log_density, near, sample, slope
from moesaic.evaluation.theory.over_specified import copies_change, split, truth, voronoi
from moesaic.evaluation.theory.over_specified import gate as selecting


def nll(p, x, y, bend):
    return -log_density(y, x, gate(x, p, bend), p).mean()


def test_scaling_the_linear_gate_changes_nothing_and_the_tanh_gate_something():
    assert degeneracy("linear") < 1e-12
    assert degeneracy("tanh") > 0.1


def test_the_likelihood_is_flat_along_the_scaling_of_a_linear_gate_alone():
    p = {name: value.requires_grad_() for name, value in gate_truth().items()}
    generator = torch.Generator().manual_seed(0)
    x, y = sample(500, lambda x, q: gate(x, q, "linear"), gate_truth(), generator)
    found = {}
    for bend in ("linear", "tanh"):
        off = {name: value + 0.3 for name, value in p.items()}
        grads = torch.autograd.grad(nll(off, x, y, bend), [off["b1"], off["b0"], off["log_tau"]])
        # along (b1, b0, tau): b1 d/db1 + b0 d/db0 + d/d(log tau)
        found[bend] = (off["b1"] * grads[0] + off["b0"] * grads[1] + grads[2]).abs().item()
    assert found["linear"] < 1e-12 < 1e-3 < found["tanh"]


def test_the_fitted_temperature_of_a_linear_gate_is_that_of_its_start_and_b1_over_tau_is_not():
    generator = torch.Generator().manual_seed(0)
    x, y = sample(4000, lambda x, q: gate(x, q, "linear"), gate_truth(), generator)
    fits = []
    for scale in (0.5, 2.0):
        p = near(gate_truth(), generator)
        start = {**p, "b1": scale * p["b1"], "b0": scale * p["b0"], "log_tau": p["log_tau"] + math.log(scale)}
        fits.append(fit(lambda q: nll(q, x, y, "linear"), start))
    taus, ratios = (
        [float(v) for v in values]
        for values in zip(*[(f["log_tau"].exp(), f["b1"] / f["log_tau"].exp()) for f in fits], strict=True)
    )
    assert taus[1] / taus[0] > 1.5
    assert ratios[1] / ratios[0] == pytest.approx(1, abs=0.01)


def test_regions_are_rays_when_selection_ignores_biases():
    p = split(truth(), 0)
    x = torch.rand(50, dtype=torch.float64) * 2 - 1
    kept = [selecting(x * scale, p, 2) > -1e6 for scale in (1.0, 0.1, 7.0)]
    assert torch.equal(kept[0], kept[1]) and torch.equal(kept[0], kept[2])
    torch.testing.assert_close(selecting(x, truth(), 2), (x[:, None] * truth()["b1"] + truth()["b0"]).log_softmax(1))


def test_copies_of_an_expert_count_only_where_selection_cuts_one_off():
    whole, cut = copies_change()
    assert whole < 1e-12 < 1e-2 < cut


def test_voronoi_loss_is_zero_for_the_same_mixture_in_any_order_and_shift():
    p = truth()
    turned = {name: value.flip(0) for name, value in p.items()}
    turned["b0"] = turned["b0"] + 3
    assert voronoi(p, p) == pytest.approx(0, abs=1e-9)
    assert voronoi(turned, p) == pytest.approx(0, abs=1e-9)
    assert voronoi(split(p, 1), p) == pytest.approx(0, abs=1e-9)
    assert voronoi(near(p, torch.Generator().manual_seed(0)), p) > 0.05


def test_sampling_follows_the_density():
    p, generator = truth(), torch.Generator().manual_seed(0)
    x, y = sample(40_000, lambda x, q: selecting(x, q, 2), p, generator)
    mean = (selecting(x, p, 2).exp() * (x[:, None] * p["a"] + p["c"])).sum(1)
    assert abs(float((y - mean).mean())) < 0.02
    assert float(x.min()) >= -1 and float(x.max()) <= 1
    at = torch.linspace(-20, 20, 4001, dtype=torch.float64)
    one = torch.full_like(at, 0.3)
    assert float(log_density(at, one, selecting(one, p, 2), p).exp().sum() * 0.01) == pytest.approx(1, abs=1e-4)


def test_slope():
    assert slope([1, 10, 100], [5, 0.5, 0.05]) == pytest.approx(-1)


def test_dual_steps_descend_and_move_tokens_the_right_way():
    g = scores(96, 6, torch.Generator().manual_seed(1))
    run = descend(g, "sign", 1e-3, 300, 1)
    assert run["wrong"] == 0 < run["moves"]
    assert run["dual"][-1] < run["dual"][0] and run["max_vio"][-1] < 0.3 * run["max_vio"][0]
    assert descend(g, "sign", 0.3, 50, 1)["falling"] < 1, "large steps overshoot"
    assert descend(g, "proportional", 0.3, 50, 1)["wrong"] > 0, "what holds for signs does not for other rules"


@pytest.mark.slow
@pytest.mark.parametrize("name", EXPERIMENTS)
def test_experiments_run_and_say_what_they_saw(name):
    found = EXPERIMENTS[name](repetitions=2, quick=True)
    assert {c["shows"] for c in found["claims"]} <= {"yes", "no", "unclear"} and len(found["claims"]) >= 4
    assert found == EXPERIMENTS[name](repetitions=2, quick=True), "the seed decides"


def test_the_command_writes_json_and_a_picture(tmp_path, capsys):
    from moesaic.cli.main import main

    with pytest.raises(SystemExit) as stop:
        main(["theory", "over_specified", "--quick", "--repetitions", "1", "--out", str(tmp_path), "--json"])
    assert not stop.value.code
    (said,) = json.loads(capsys.readouterr().out)["experiments"]
    assert json.loads((tmp_path / "over_specified.json").read_text())["claims"] == said["claims"]
    picture = ET.parse(tmp_path / "over_specified.svg").getroot()
    assert len(picture.findall("{http://www.w3.org/2000/svg}polyline")) == 6
    with pytest.raises(SystemExit) as stop:
        main(["theory", "gravity"])
    assert stop.value.code == 2 and "one of activation_gate" in capsys.readouterr().err


def test_every_experiment_is_listed():
    assert {"activation_gate": activation_gate, "alf_lb": alf_lb, "over_specified": over_specified} == EXPERIMENTS
