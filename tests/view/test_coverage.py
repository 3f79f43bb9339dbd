"""The coverage run: six conventions quickly, every architecture slowly; and each check can fail."""

from __future__ import annotations

import json

import pytest
import torch
import transformers
from typer.testing import CliRunner

from moesaic.cli.view import app
from moesaic.core.errors import BadInput
from moesaic.view import coverage, tiny

FAST = ["qwen3_moe", "gpt_oss", "deepseek_v3", "nemotron_h", "gemma4", "zaya"]


@pytest.mark.parametrize("name", FAST)
def test_fast_architectures(name):
    report = coverage.check(name)
    assert report["ok"], report["reason"]
    assert report["blocks"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("name", [a.name for a in tiny.architectures() if a.name not in FAST])
def test_every_other_architecture(name):
    report = coverage.check(name)
    assert report["ok"], report["reason"]


def test_the_list_is_that_of_the_installed_transformers():
    names = coverage.names()
    assert set(FAST) < set(names)
    assert len(names) >= 40
    assert coverage.names("qwen3_moe, gpt_*") == ["gpt_oss", "qwen3_moe"]


@pytest.fixture
def case():
    architecture = next(a for a in tiny.architectures() if a.name == "qwen3_moe")
    return coverage.open_case(transformers.Qwen3MoeForCausalLM, architecture)


def test_each_promise_can_fail(case, monkeypatch):
    """Break what a check looks at; it must notice."""
    from moesaic.view import bank, block, implementation, rerun, tap

    def broken(promise, target, name, value):
        with monkeypatch.context() as patch:
            patch.setattr(target, name, value)
            with pytest.raises((coverage.Failed, KeyError)):
                coverage.PROMISES[promise](case)

    run, capture, after = implementation.run, tap.Tap.capture, tap.Tap._after_experts

    def noisy_route(self, call):
        routing, seen = capture(self, call)
        return routing.replace(weights_TK=routing.weights_TK * 1.01), seen

    def loud(self, module, args, kwargs, output):
        after(self, module, args, kwargs, output)
        return output * 1.0001

    broken("attached", tap.Tap, "_after_experts", loud)
    broken("traced", tap.Tap, "logits", lambda self, output: None)
    broken("routed", tap.Tap, "capture", noisy_route)
    broken("replaced", bank.ViewBank, "__setitem__", lambda self, e, expert: None)
    broken("kernels", implementation, "run", lambda *args: run(*args) * 1.001)
    broken("steered", rerun._Selection, "_altered", lambda self, scores: scores)
    broken("saved", transformers.Qwen3MoeForCausalLM, "from_pretrained", lambda *a, **k: tiny.build(type(case.model), seed=9))
    assert block.Block is not None
    for promise in coverage.PROMISES.values():
        promise(case)


def test_tiny_routers_route(case):
    """No tiny model sends every token to the same experts: the checks would be empty."""
    for other in case.view:
        chosen = torch.cat([r.experts_TK for b, r in coverage._routings(case, None) if b is other])
        assert len(chosen.unique()) > 2


def test_command(tmp_path, tiny_moe):
    runner = CliRunner()
    result = runner.invoke(
        app, ["--coverage", "--only", "olmoe", "--jobs", "1", "--json", "--markdown", str(tmp_path / "c.md")]
    )
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert (report["total"], report["supported"]) == (1, 1)
    assert set(report["architectures"]["olmoe"]) == {"ok", "reason", "blocks", "models", "checks", "seconds"}
    assert "| olmoe | OlmoeForCausalLM | 4 |" in (tmp_path / "c.md").read_text()
    result = runner.invoke(app, [str(tiny_moe), "--json"])
    summary = json.loads(result.stdout)
    assert summary["layers"] == len(summary["blocks"]) == 2
    assert summary["experts"] == 4
    assert "2 blocks" in runner.invoke(app, [str(tiny_moe)]).stdout


def test_a_failed_check_is_exit_code_1(monkeypatch):
    monkeypatch.setattr(coverage, "TOLERANCE", -1.0)
    result = CliRunner().invoke(app, ["--coverage", "--only", "olmoe", "--jobs", "1", "--json"])
    assert result.exit_code == 1
    assert "differs from the block's experts" in json.loads(result.stdout)["architectures"]["olmoe"]["reason"]


def test_command_refuses_nonsense():
    for arguments in ([], ["--coverage", "bundled"], ["--coverage", "--only", "nothing"]):
        assert isinstance(CliRunner().invoke(app, arguments).exception, BadInput)
