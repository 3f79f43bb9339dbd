"""Steps on what only our classes hold: blocks of unequal size, and router rows that share experts."""

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM

from moesaic.core.errors import BadInput
from moesaic.surgery.apply import apply
from moesaic.surgery.layer import Change
from moesaic.surgery.memory import measure
from moesaic.surgery.memory import operate as operate_live
from moesaic.surgery.operate import operate
from moesaic.surgery.planning import build, open_plan, plan_step
from moesaic.surgery.shapes import facts_of
from moesaic.trace.calibration.store import Calibration, CalibrationHeader
from moesaic.trace.file import TraceLayer
from moesaic.view import tiny
from moesaic.view.block import View

NAMES = ("mixtral", "deepseek_v3", "gpt_oss", "nemotron_h", "granitemoe")
"""Per expert; shared experts, groups and a dense first layer; stacked, transposed, interleaved, biased; ungated; stacked."""

UNEVEN = ("prune", "weight_norm", {"keep": 0.75, "scope": "global"})
MAPPED = ("merge", "m_smoe", {"keep": 0.6, "align": "none"})

STEPS = [
    ("prune", "reap", {"keep": 0.7}),
    ("prune", "frequency", {"keep": 0.75, "scope": "global"}),
    ("merge", "hc_smoe", {"keep": 0.6}),
    ("quantize", "rtn", {"bits": 4, "group": 32}),
    ("quantize", "gptq", {"bits": 3, "group": 32, "least": 1}),
    ("quantize", "hqq", {"bits": 4, "group": 32}),
    ("quantize", "awq", {"bits": 4, "group": 32}),
    ("compress", "neurons", {"keep": 0.5}),
    ("compress", "low_rank", {"keep": 0.6}),
    ("compress", "d2_moe", {"keep": 0.6, "base": "frequency"}),
    ("compress", "moe_i2", {"keep": 0.6, "importance": "uniform"}),
]
FEW = [("deepseek_v3", "mapped"), ("gpt_oss", "uneven")]
MOST = [
    ("deepseek_v3", "uneven"),
    ("deepseek_v3", "mapped"),
    ("gpt_oss", "mapped"),
    ("nemotron_h", "mapped"),
    ("granitemoe", "uneven"),
]
GROUPED = "the rows of .* share experts across its router's groups"


def statistics(model, folder, tiers):
    """What some ids show of a model, as a calibration."""
    ids = [torch.randint(8, 80, (6, 16), generator=torch.Generator().manual_seed(3))]
    layers = measure(model, ids, ",".join(tiers))

    class Held(Calibration):
        hash = "held"

        def layer(self, layer, domain=None):
            return layers[layer].statistics

        def features(self, layer):
            return tuple(side.numpy() for side in layers[layer].features())

    fields = TraceLayer._fields
    rows = [{"name": each.facts.name, "experts": each.facts.experts, "top_k": each.facts.top_k} for each in layers]
    known = tuple(TraceLayer(*(row.get(field, 0) for field in fields)) for row in rows)
    return Held(folder, CalibrationHeader(known, tuple(tiers), progress={"tokens": 96})), layers


def loaded(folder):
    made, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"], info
    return made.eval()


def first_step(on_disk, name, kind, tmp_path):
    """A folder of unequal or mapped blocks, made on disk, and its counts."""
    _, folder, known = on_disk(name, "R0,R1")
    family, method, options = UNEVEN if kind == "uneven" else MAPPED
    report = operate(folder, tmp_path / "first", family, method, options, calibration=known)
    assert not report.stock
    return tmp_path / "first"


def check(folder, tmp_path, said, family, method, options):
    """The step on disk says what the same step says on the live model, up to rounding in what the live one keeps in float32."""
    before = loaded(folder)
    entry, _ = build(family, method, options)
    known, layers = statistics(before, tmp_path, sorted({"R0", *entry.needs}))
    plan = plan_step(open_plan(folder), family, method, options)
    report = operate(folder, tmp_path / "out", family, method, options, calibration=known)
    assert not report.stock and not plan.stock
    made = loaded(tmp_path / "out")
    counts = [block["experts_after"] for block in report.blocks]
    assert [block.num_experts for block in View(made)] == counts
    assert sum(counts) == pytest.approx(sum(plan.experts), abs=len(counts))
    assert abs(report.bytes_after - plan.bytes_after) < 0.1 * report.bytes_before
    operate_live(build(family, method, options)[1], layers)
    one, other = said(made), said(before)
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5 * float(other.abs().max()))
    return report


@pytest.mark.parametrize(("name", "kind"), FEW)
def test_pruned_again_and_rounded(name, kind, on_disk, said, tmp_path):
    folder = first_step(on_disk, name, kind, tmp_path)
    check(folder, tmp_path, said, "quantize", "rtn", {"bits": 4, "group": 32})


@pytest.mark.slow
@pytest.mark.parametrize(("name", "kind"), MOST)
def test_every_step_as_on_the_live_model(name, kind, on_disk, said, tmp_path):
    folder = first_step(on_disk, name, kind, tmp_path)
    refused = []
    for number, (family, method, options) in enumerate(STEPS):
        work = tmp_path / str(number)
        work.mkdir()
        try:
            check(folder, work, said, family, method, options)
        except BadInput as error:
            refused.append((method, str(error)))
            assert not (work / "out").exists()
    grouped = name == "deepseek_v3" and kind == "mapped"
    assert [method for method, _ in refused] == (["reap", "frequency"] if grouped else []), refused


def repeated(model, maps):
    """The stock model of the same function: every row has a copy of its expert; `maps`: expert of each row, by block."""
    twin = copy.deepcopy(model)
    for block, facts, held in zip(View(twin), facts_of(View(twin)), maps, strict=True):
        apply(block, Change(list(held), rows=range(facts.experts)), facts)
    return twin


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_rows_go_with_the_expert_that_they_share(name, on_disk, said, tmp_path):
    """Dropping an expert of a mapped block is dropping all its rows from the model that has a copy of it per row."""
    model_class, folder, _ = on_disk(name, "R0")
    plain, generator = model_class.from_pretrained(folder).eval(), torch.Generator().manual_seed(1)
    blocks, gone = View(plain), 2
    maps = [torch.randint(0, 5, (8,), generator=generator).tolist() for _ in blocks]
    maps = [[*range(5), *held[:3]] for held in maps]
    twin, mapped = repeated(plain, maps), copy.deepcopy(plain)
    for block, facts, held in zip(View(mapped), facts_of(View(mapped)), maps, strict=True):
        apply(block, Change(range(5), rows=range(8), row_to_expert=held), facts)
    assert [(b.num_experts, b.rows) for b in View(mapped)] == [(5, 8)] * len(maps)
    torch.testing.assert_close(said(mapped), said(twin))
    for block, facts in zip(View(mapped), facts_of(View(mapped)), strict=True):
        apply(block, Change([e for e in range(5) if e != gone]), facts)
    for block, facts, held in zip(View(twin), facts_of(View(twin)), maps, strict=True):
        apply(block, Change([row for row in range(8) if held[row] != gone]), facts)
    torch.testing.assert_close(said(mapped), said(twin))
    ids = torch.arange(8, 24)[None]
    seen = [measure(each, [ids], "R0") for each in (mapped, twin)]
    for mine, theirs, held in zip(*seen, maps, strict=True):
        rows = [e - (e > gone) for e in held if e != gone]
        for kind in ("gate_sum", "probability_sum"):
            summed = torch.zeros(4, dtype=torch.float64).index_add(0, torch.tensor(rows), theirs.statistics[kind])
            torch.testing.assert_close(mine.statistics[kind], summed, rtol=1e-5, atol=1e-6)
        assert float(mine.statistics["selection_count"].sum()) <= float(theirs.statistics["selection_count"].sum())


def test_policies_name_experts_whoever_shares_them(on_disk, said):
    model_class, folder, _ = on_disk("mixtral", "R0")
    plain = model_class.from_pretrained(folder).eval()
    held = [0, 1, 2, 3, 0, 1, 1, 2]
    maps = [held] * len(View(plain))
    twin, mapped = repeated(plain, maps), copy.deepcopy(plain)
    for block, facts in zip(View(mapped), facts_of(View(mapped)), strict=True):
        apply(block, Change(range(4), rows=range(8), row_to_expert=held), facts)
    bias, share = [0.3, -0.1, 0.2, 0.0], [0.4, 0.3, 0.2, 0.1]
    per_row = [share[e] / held.count(e) for e in held]
    for ours, theirs in (
        ({"without": [1]}, {"without": [1, 5, 6]}),
        ({"mask": [True, True, False, True]}, {"mask": [e != 2 for e in held]}),
        ({"bias": bias}, {"bias": [bias[e] for e in held]}),
        ({"logits": bias}, {"logits": [bias[e] for e in held]}),
        ({"probs": share}, {"probs": per_row}),
        ({"force": [3, 1]}, {"force": [3, 1]}),
        ({"k": 5}, {"k": 5}),
        ({"rank": 2}, {"rank": 2}),
    ):
        with View(mapped).policy(**ours):
            one = said(mapped)
        with View(twin).policy(**theirs):
            other = said(twin)
        torch.testing.assert_close(one, other, msg=lambda text, ours=ours: f"{ours}: {text}")
    with pytest.raises(BadInput, match="has experts 0 to 3"), View(mapped).policy(without=[4]):
        pass
    x = torch.randn(6, plain.config.hidden_size)
    mine, theirs = View(mapped)[0].route(x), View(twin)[0].route(x)
    shares = torch.zeros(6, 4).index_add(1, torch.tensor(held), theirs.probs_TE)
    torch.testing.assert_close(mine.probs_TE, shares)


def test_what_the_next_step_cannot_do_is_said_at_planning(on_disk, tmp_path):
    _, folder, _ = on_disk("mixtral", "R0,R1")
    start = open_plan(folder)
    uneven = plan_step(start, "prune", "reap", {"keep": 0.5, "scope": "global"})
    assert plan_step(uneven, "prune", "reap", {"keep": 0.9}).experts == [4] * len(start.facts)
    with pytest.raises(BadInput, match=r"as many experts as its statistics say, 2 or more: give a share"):
        plan_step(uneven, "prune", "reap", {"keep": 3})
    with pytest.raises(BadInput, match=r"the base alone takes 1/2 of"):
        plan_step(uneven, "compress", "d2_moe", {"keep": 0.4})
    narrow = plan_step(uneven, "compress", "neurons", {"keep": 0.5})
    assert not narrow.stock and narrow.after[0].inner == start.facts[0].inner // 2
    mapped = plan_step(start, "merge", "hc_smoe", {"keep": 0.5})
    for method, options in (("router_norm", {}), ("dern", {})):
        with pytest.raises(BadInput, match="reads a router row of every expert"):
            plan_step(mapped, "prune", method, options)
    with pytest.raises(BadInput, match="reads a router row of every expert"):
        plan_step(mapped, "merge", "hc_smoe", {"keep": 0.75, "router": "collapse"})
    factored = plan_step(mapped, "compress", "low_rank", {"keep": 0.5})
    for family, method in (("quantize", "rtn"), ("prune", "random"), ("compress", "neurons")):
        with pytest.raises(BadInput, match=r"leaves experts as factors.*store=dense"):
            plan_step(factored, family, method, {})
    dense = plan_step(mapped, "compress", "low_rank", {"keep": 0.5, "store": "dense"})
    assert not plan_step(dense, "quantize", "rtn", {"bits": 4}).stock


def test_groups_of_rows_that_share_stay_whole(on_disk, tmp_path):
    _, folder, known = on_disk("deepseek_v3", "R0,R1")
    mapped = plan_step(open_plan(folder), *MAPPED)
    with pytest.raises(BadInput, match=GROUPED):
        plan_step(mapped, "prune", "reap", {"keep": 0.5})
    operate(folder, tmp_path / "first", *MAPPED, calibration=known)
    with pytest.raises(BadInput, match=GROUPED):
        operate(tmp_path / "first", tmp_path / "out", "prune", "weight_norm", {"keep": 0.5})
    assert not (tmp_path / "out").exists()


def test_factors_are_the_end(on_disk, tmp_path):
    _, folder, _ = on_disk("mixtral", "R0")
    operate(folder, tmp_path / "first", "compress", "low_rank", {"keep": 0.5})
    with pytest.raises(BadInput, match=r"its experts are factors.*store=dense"):
        operate(tmp_path / "first", tmp_path / "out", "quantize", "rtn", {})
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()


def test_nothing_dropped_of_a_mapped_model_is_the_same_bytes(on_disk, tmp_path):
    folder = first_step(on_disk, "gpt_oss", "mapped", tmp_path)
    operate(folder, tmp_path / "out", "prune", "random", {"keep": 1.0})
    before, after = (loaded(each).state_dict() for each in (folder, tmp_path / "out"))
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert any(block.rows > block.num_experts for block in View(loaded(tmp_path / "out")))


def test_tiny_models_are_what_the_names_say():
    kinds = {}
    for name in NAMES:
        (model_class,) = tiny.model_classes(next(a for a in tiny.architectures() if a.name == name))
        kinds[name] = View(tiny.build(model_class))
    assert kinds["deepseek_v3"][0].shared is not None and kinds["deepseek_v3"][0].layer > 0
    assert kinds["gpt_oss"][0].kind.transposed and not kinds["nemotron_h"][0].kind.gated
