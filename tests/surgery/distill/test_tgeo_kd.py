"""TGeo-KD: the loss's ends, the unrolled gradient against finite differences, and trust that falls where the teacher errs."""

from __future__ import annotations

import json

import pytest
import torch
from torch.nn.functional import cross_entropy, one_hot

from moesaic.cli.main import main
from moesaic.surgery.distill.tgeo_kd import Controller, fused_loss, geometric_state, outer_loss


def problem(samples=12, width=5, classes=4, valid=9):
    torch.manual_seed(1)
    h_TD, w_VD = torch.randn(samples, width).double(), torch.randn(classes, width).double()
    teacher_TV, label_T = torch.randn(samples, classes).double() * 2, torch.randint(0, classes, (samples,))
    return h_TD, w_VD, teacher_TV, label_T, torch.randn(valid, width).double(), torch.randint(0, classes, (valid,))


def test_alpha_0_is_cross_entropy_and_alpha_1_pure_distillation():
    h_TD, w_VD, teacher_TV, label_T, *_ = problem()
    student_TV, tau = h_TD @ w_VD.T, 1.5
    torch.testing.assert_close(
        fused_loss(student_TV, teacher_TV, label_T, torch.zeros(12).double(), tau), cross_entropy(student_TV, label_T)
    )
    p, q = (teacher_TV / tau).softmax(-1), (student_TV / tau).softmax(-1)
    want = tau**2 * (p * (p.log() - q.log())).sum(-1).mean()
    torch.testing.assert_close(fused_loss(student_TV, teacher_TV, label_T, torch.ones(12).double(), tau), want)


def test_the_outer_loss_is_that_of_a_student_whose_head_made_the_step():
    """Twin: autograd's own gradient of the fused loss, and a copy of the head."""
    h_TD, w_VD, teacher_TV, label_T, valid_UD, valid_U = problem()
    alpha_T = torch.rand(12).double()
    w = w_VD.clone().requires_grad_()
    (grad,) = torch.autograd.grad(fused_loss(h_TD @ w.T, teacher_TV, label_T, alpha_T, 1.5), w)
    want = cross_entropy(valid_UD @ (w_VD - 0.3 * grad).T, valid_U)
    found = outer_loss(alpha_T, h_TD, h_TD @ w_VD.T, teacher_TV, label_T, 1.5, 0.3, valid_UD, valid_UD @ w_VD.T, valid_U)
    torch.testing.assert_close(found, want)


def test_the_outer_gradient_is_not_0_and_matches_finite_differences():
    h_TD, w_VD, teacher_TV, label_T, valid_UD, valid_U = problem()
    student_TV, hot_TV = h_TD @ w_VD.T, one_hot(label_T, 4).double()
    s_TS = geometric_state(student_TV.softmax(-1), teacher_TV.softmax(-1), hot_TV, torch.rand(12, 4).double())
    controller = Controller(36).double()

    def value():
        return outer_loss(
            controller(s_TS), h_TD, student_TV, teacher_TV, label_T, 1.5, 0.5, valid_UD, valid_UD @ w_VD.T, valid_U
        )

    value().backward()
    for p in controller.parameters():
        flat, grad = p.data.view(-1), p.grad.view(-1)
        for i in range(0, len(flat), max(1, len(flat) // 7)):
            kept = flat[i].item()
            flat[i] = kept + 1e-5
            up = value().item()
            flat[i] = kept - 1e-5
            down = value().item()
            flat[i] = kept
            assert (up - down) / 2e-5 == pytest.approx(grad[i].item(), rel=1e-4, abs=1e-9)
    assert max(p.grad.abs().max() for p in controller.parameters()) > 1e-4


def test_the_differences_vanish_where_all_four_agree():
    p = torch.rand(6, 4).softmax(-1)
    found = geometric_state(p, p, p, p)
    assert found.shape == (6, 36) and not found[:, 16:].any() and torch.equal(found[:, :4], p)
    assert (geometric_state(p, p.flip(1), p, p)[:, 16:] != 0).any()


def trained(adaptive, seed=0, steps=400):
    """A linear student; the teacher is right but for 30 % of the training samples. Validation accuracy, alpha, the wrong."""
    torch.manual_seed(seed)
    samples, classes, width = 600, 6, 12
    truth_VD = torch.randn(classes, width)
    h_TD, test_UD, valid_UD = torch.randn(samples, width), torch.randn(2000, width), torch.randn(200, width)
    label_T, test_U, valid_U = ((x @ truth_VD.T).argmax(-1) for x in (h_TD, test_UD, valid_UD))
    wrong_T = torch.rand(samples) < 0.3
    teacher_TV = 3 * one_hot(torch.where(wrong_T, (label_T + 1 + torch.randint(0, classes - 1, (samples,))) % classes, label_T),
                             classes).float() + 0.3 * torch.randn(samples, classes)  # fmt: skip
    hot_TV = one_hot(label_T, classes).float()
    mean_VV = torch.stack([teacher_TV.softmax(-1)[label_T == c].mean(0) for c in range(classes)])
    w_VD = torch.zeros(classes, width, requires_grad=True)
    controller = Controller(9 * classes)
    outer = torch.optim.AdamW(controller.parameters(), lr=0.01, weight_decay=0.05)
    inner = torch.optim.SGD([w_VD], lr=0.5)
    for _ in range(steps):
        pick = torch.randint(0, samples, (64,))
        student_TV = h_TD[pick] @ w_VD.T
        now_TV, wanted_TV = student_TV.detach().softmax(-1), teacher_TV[pick].softmax(-1)
        s_TS = geometric_state(now_TV, wanted_TV, hot_TV[pick], mean_VV[label_T[pick]])
        alpha_T = torch.full((64,), 0.5)
        if adaptive:
            v = torch.randint(0, 200, (64,))
            loss = outer_loss(
                controller(s_TS), h_TD[pick], student_TV.detach(), teacher_TV[pick], label_T[pick], 1.5, 0.5, valid_UD[v],
                (valid_UD[v] @ w_VD.T).detach(), valid_U[v],
            )  # fmt: skip
            outer.zero_grad()
            loss.backward()
            outer.step()
            alpha_T = controller(s_TS).detach()
        inner.zero_grad()
        fused_loss(student_TV, teacher_TV[pick], label_T[pick], alpha_T, 1.5).backward()
        inner.step()
    with torch.no_grad():
        s_TS = geometric_state((h_TD @ w_VD.T).softmax(-1), teacher_TV.softmax(-1), hot_TV, mean_VV[label_T])
        return (test_UD @ w_VD.T).argmax(-1).eq(test_U).float().mean().item(), controller(s_TS), wrong_T


@pytest.mark.slow
def test_trust_falls_where_the_teacher_is_wrong_and_the_student_gains():
    gains = []
    for seed in range(3):
        fixed, _, _ = trained(False, seed)
        adaptive, alpha_T, wrong_T = trained(True, seed)
        right, wrong = alpha_T[~wrong_T], alpha_T[wrong_T]
        auc = (right[:, None] > wrong[None]).float().mean().item()
        assert wrong.mean() < right.mean() and auc > 0.7
        gains.append(adaptive - fixed)
    assert sum(gains) / 3 > 0


def test_the_command_moves_its_controller(tmp_path, tiny_moe, tiny_dense, tiny_data, capsys):
    valid = tmp_path / "valid.txt"
    valid.write_text("Other words, for the controller alone: one two three. " * 20)
    with pytest.raises(SystemExit) as stop:
        main(
            ["distill", str(tiny_moe), str(tmp_path / "out"), "--student", str(tiny_dense), "--method", "tgeo_kd", "--data",
             str(tiny_data), "--valid", str(valid), "--steps", "4", "--seq-len", "16", "--batch-size", "2", "--context", "32",
             "--eval-data", str(valid), "--lr", "0.01", "--json"]
        )  # fmt: skip
    done = json.loads(capsys.readouterr().out)
    assert stop.value.code == 0 and done["stock"]
    (step,) = done["steps"]
    assert step["mean_alpha_first"] != step["mean_alpha_last"] and 0 < step["mean_alpha_last"] < 1
