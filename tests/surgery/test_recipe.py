"""Recipes: planned whole, run step by step, gone on with where they broke off; the command line says what they did."""

import json
import subprocess
import sys

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from moesaic.core.errors import BadInput
from moesaic.surgery import recipe as recipes
from moesaic.surgery.recipe import parse, plan_recipe, run_recipe

STEPS = [
    {"prune": "reap", "keep": 0.75},
    {"merge": "hc_smoe", "keep": 8, "router": "collapse", "domain": "a"},
    {"quantize": "rtn", "bits": 4},
    {"unlearn": "seuf", "loss": "ga", "texts": {"forget": "b.txt"}, "training": {"steps": 2, "batch_size": 1, "seq_len": 32}},
]


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    (folder / "a.txt").write_text("Once upon a time there was a little fox who lived in the wood. " * 12)
    (folder / "b.txt").write_text("def add(x, y):\n    return x + y\n\n" * 20)
    return folder


def as_file(folder, steps, **shared):
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump({"data": ".", **shared, "steps": steps}))
    return path


@pytest.mark.slow
def test_one_recipe_prunes_merges_quantises_and_unlearns_and_stock_transformers_loads_it(texts, tmp_path):
    command = [
        sys.executable,
        "-m",
        "moesaic",
        "surgery",
        str(as_file(texts, STEPS)),
        "bundled",
        str(tmp_path / "out"),
        "--json",
    ]
    report = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert [row["method"] for row in report["steps"]] == ["prune reap", "merge hc_smoe", "quantize rtn", "unlearn seuf"]
    assert report["stock"] and report["bytes_after"] < report["bytes_before"]
    held = json.loads((tmp_path / "out" / "surgery.json").read_text())["steps"]
    assert [step["family"] for step in held] == ["prune", "merge", "quantize", "unlearn"]
    card = (tmp_path / "out" / "README.md").read_text()
    assert all(f"| {row['method']} |" in card for row in report["steps"])
    probe = (
        "import sys, torch; from transformers import AutoModelForCausalLM as A;"
        f"m = A.from_pretrained({str(tmp_path / 'out')!r}); assert 'moesaic' not in sys.modules;"
        "print(m.config.num_experts, m(torch.tensor([[5, 6, 7]])).logits.isfinite().all().item())"
    )
    said = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True).stdout
    assert said.split() == ["8", "True"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


@pytest.mark.parametrize(
    ("steps", "match"),
    [
        ([{"prune": "reap", "keep": 0.5}, {"prune": "reap", "keep": 12}], r"step 2 .*has 8 experts"),
        ([{"prune": "reap", "kept": 0.5}], r"step 1: prune reap has no option 'kept'"),
        ([{"prune": "reap", "merge": "m_smoe"}], r"names prune and merge"),
        ([{"keep": 0.5}], r"names no method"),
        ([{"prune": "reap", "domain": "c"}], r"no text of domain 'c': it has a, b"),
        ([{"compress": "low_rank"}, {"quantize": "rtn"}], r"step 2 .*leaves experts as factors.*store=dense"),
        ([{"prune": "reap", "statistics": "nowhere"}], r"nowhere is no calibration"),
        ([{"unlearn": "seuf", "texts": {"forget": "none.txt"}}], r"texts, forget|none.txt"),
        ([], r"a recipe holds a list `steps`"),
    ],
)
def test_what_cannot_apply_stops_at_planning(steps, match, texts, tmp_path):
    with pytest.raises(BadInput, match=match):
        plan_recipe("bundled", parse({"data": ".", "steps": steps}, root=texts), trainer=lambda *_, **__: {})
    assert list(tmp_path.iterdir()) == []


def test_no_text_for_a_method_that_reads_one():
    with pytest.raises(BadInput, match=r"needs calibration \(R0, R1\)"):
        plan_recipe("bundled", parse({"steps": [{"prune": "reap"}]}))
    with pytest.raises(BadInput, match="unknown field 'dta'"):
        parse({"dta": "x", "steps": [{"prune": "reap"}]})


def test_a_plan_says_sizes_of_every_step(texts):
    plans = plan_recipe("bundled", parse({"data": ".", "steps": STEPS[:2]}, root=texts))
    assert [plan.experts for plan in plans] == [[12] * 6, [8] * 6]
    assert plans[0].bytes_after == plans[1].bytes_before > plans[1].bytes_after
    assert all(plan.stock for plan in plans)


def test_broken_off_between_steps_it_goes_on_with_the_next(texts, tmp_path, monkeypatch):
    steps = parse(
        {"data": ".", "steps": [*STEPS[:1], {"prune": "random", "keep": 6}, {"prune": "random", "keep": 4}]}, root=texts
    )
    own, seen = recipes.operate, []

    def until(source, out, family, method, options, **rest):
        seen.append(options["keep"])
        if seen == [0.75, 6, 4]:
            raise KeyboardInterrupt
        return own(source, out, family, method, options, **rest)

    monkeypatch.setattr(recipes, "operate", until)
    with pytest.raises(KeyboardInterrupt):
        run_recipe("bundled", tmp_path / "out", steps)
    assert not (tmp_path / "out").exists()
    with pytest.raises(BadInput, match="--resume"):
        run_recipe("bundled", tmp_path / "out", steps)
    with pytest.raises(BadInput, match="other steps"):
        run_recipe("bundled", tmp_path / "out", steps[1:], resume=True)
    report = run_recipe("bundled", tmp_path / "out", steps, resume=True)
    assert seen == [0.75, 6, 4, 4] and len(report["steps"]) == 3
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).config.num_experts == 4
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]
