"""D²-MoE: what its card promises, with factors of every expert's own and shared ones, and with a pruned base."""

import json

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from moesaic.core.errors import BadInput
from moesaic.models.reshaped.factored import LEAF, Factors, fill
from moesaic.surgery.compress.d2_moe import D2Moe, regmean
from moesaic.surgery.factored import SIDES, moment_of, neurons_at, upright
from moesaic.surgery.memory import measure
from moesaic.surgery.memory import operate as operate_live
from moesaic.surgery.operate import operate
from moesaic.view.block import View

SHARES = ("none", "right", "left")


def at_any_rank(**options):
    """A method whose bytes do not bound its rank."""
    method = D2Moe(0.99, **options)
    method.keep = 100.0
    return method


def many(sequences, seed=4):
    return [torch.randint(8, 80, (sequences, 24), generator=torch.Generator().manual_seed(seed))]


def lost(layer, part, side, e, moment):
    """||(W_e - what stands for it) X||, where X X^T is `moment`."""
    wrong = (upright(layer, e, side) - part.dense(e)).double()
    return float((wrong @ torch.linalg.cholesky(moment)).norm())


@pytest.mark.parametrize("options", [{}, {"share": "right", "whiten": False}, {"share": "left", "prune": 0.4}, {"prune": 0.2}])
def test_full_rank_is_exact(make, ids, logits, options):
    model = make("GptOss")
    before = logits(model, ids)
    changes = operate_live(at_any_rank(base="frequency", **options), measure(model, ids, "R0,R2"))
    torch.testing.assert_close(logits(model, ids), before, rtol=2e-3, atol=2e-3)
    assert all(max(c.report[f"{side}_error"]) < 1e-4 for c in changes for side in SIDES)


@pytest.mark.parametrize("share", SHARES)
def test_identical_experts_have_rank_none(make, ids, logits, share):
    model = make("Mixtral")
    for block in View(model):
        for e in range(1, 8):
            block.bank[e] = block.bank[0]
    before = logits(model, ids)
    changes = operate_live(D2Moe(0.5, base="mean", share=share), measure(model, ids, "R0,R2"))
    torch.testing.assert_close(logits(model, ids), before, rtol=1e-4, atol=1e-4)
    for change in changes:
        assert change.report["first_ranks"] == change.report["down_ranks"] == [0] * 8
        assert change.report["share"] == pytest.approx(1 / 8)


@pytest.mark.parametrize("side", SIDES)
def test_what_is_lost_is_the_discarded_singular_values(make, side):
    """Of the differences times the Cholesky factor: one expert's, all below one another, all side by side; never more
    than the plain SVD loses."""
    layer = measure(make("Qwen3Moe"), many(64), "R0,R2")[0]
    E, keep = layer.facts.experts, 0.5
    base = D2Moe(keep, base="mean").mean(layer, side)
    own, joint = [moment_of(layer, e, side) for e in range(E)], moment_of(layer, None, side)
    deltas = [(upright(layer, e, side) - base).double() for e in range(E)]
    roots = [torch.linalg.cholesky(moment) for moment in own]
    for share in SHARES:
        part = D2Moe(keep, base="mean", share=share).split(layer, side, None)
        plain = D2Moe(keep, base="mean", share=share, whiten=False).split(layer, side, None)
        rank = part.ranks[0]
        assert part.ranks == [rank] * E and 0 < rank < min(base.shape)
        moments = [joint] * E if share == "right" else own
        found = [lost(layer, part, side, e, moments[e]) for e in range(E)]
        if share == "none":
            expected = [float(torch.linalg.svdvals(deltas[e] @ roots[e])[rank:].norm()) for e in range(E)]
            assert found == pytest.approx(expected, rel=1e-3, abs=1e-4)
        else:
            stacked = torch.cat(deltas) @ torch.linalg.cholesky(joint)
            beside = torch.cat([d @ root for d, root in zip(deltas, roots, strict=True)], 1)
            values = torch.linalg.svdvals(stacked if share == "right" else beside)
            assert sum(f**2 for f in found) == pytest.approx(float(values[rank:].square().sum()), rel=1e-3)
        assert sum(f**2 for f in found) <= sum(lost(layer, plain, side, e, moments[e]) ** 2 for e in range(E)) * 1.0001


def test_sharing_buys_rank_and_stores_the_factor_once(make, ids):
    layer = measure(make("Qwen3Moe"), ids, "R0,R2")[0]
    E = layer.facts.experts
    for side in SIDES:
        B, A = upright(layer, 0, side).shape
        parts = {share: D2Moe(0.5, base="mean", share=share).split(layer, side, None) for share in SHARES}
        assert all(part.ranks[0] > parts["none"].ranks[0] for share, part in parts.items() if share != "none")
        right = parts["right"]
        assert len(right.right) == 1 and len(right.left) == E
        assert right.numel == B * A + right.ranks[0] * (E * B + A)
        held = {name: tensor.numel() for name, tensor in right.tensors(side).items()}
        assert sum(held.values()) == right.numel and held[f"{side}.right"] == right.ranks[0] * A


def test_the_base_of_least_error_and_of_equal_inputs(make):
    layer = measure(make("Mixtral"), many(32), "R0,R2")[0]
    E = layer.facts.experts
    sums = layer.statistics["input_gram_sum"].double()

    def error(base):
        return sum(float(torch.trace((d := upright(layer, e, "first").double() - base) @ sums[e] @ d.T)) for e in range(E))

    best = regmean(layer, "first").double()
    noise = torch.randn(best.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    mean = D2Moe(base="mean").mean(layer, "first").double()
    assert error(best) < error(mean) and error(best) < error(best + 1e-2 * noise)
    layer.statistics.sums["input_gram_sum"] = sums.mean(0, keepdim=True).expand_as(sums)
    torch.testing.assert_close(regmean(layer, "first").double(), mean, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", ["GptOss", "NemotronH"])
def test_the_neurons_that_go_add_least_to_the_base(make, ids, name):
    layer = measure(make(name), ids, "R0,R2")[0]
    method = D2Moe(0.6, base="mean", prune=0.25)
    first, down = (method.split(layer, side, None) for side in SIDES)
    inner = layer.facts.inner
    gone = [j for j in range(inner) if j not in down.inputs.tolist()]
    assert len(gone) == int(0.25 * inner) and first.outputs.tolist() == neurons_at(layer, down.inputs).tolist()
    count = float(layer.statistics["selection_count"].sum())
    mean_square = layer.statistics["inner_gram_sum"].double().sum(0).diagonal() / count
    size = mean_square * method.mean(layer, "down").double().square().sum(0)
    assert size[gone].max() <= size[down.inputs].min()
    whole = D2Moe(0.6, base="mean")
    for side, part in (("first", first), ("down", down)):
        assert part.ranks[0] >= whole.split(layer, side, None).ranks[0]  # their bytes became rank
        dropped = part.base_like(upright(layer, 0, side)) == 0
        at = neurons_at(layer, torch.tensor(gone)) if side == "first" else torch.tensor(gone)
        assert bool(dropped[at].all() if side == "first" else dropped[:, at].all())


def test_what_is_left_out_per_token_is_its_own_least():
    """A base that reads 3 of 5 inputs: of each token the three of largest |x| |column|, whatever its neighbours."""
    generator = torch.Generator().manual_seed(0)
    form = {"first": {"ranks": [0]}, "down": {"ranks": [0], "base": True, "active": 3}}
    factors = Factors(1, 4, 5, 5, form)
    base = torch.randn(4, 5, generator=generator)
    empty = {f"{side}.{leaf}": torch.empty(0, 4 if (side, leaf) in {("first", "right"), ("down", "left")} else 5)
             for side in SIDES for leaf in ("left", "right")}  # fmt: skip
    fill(factors, {**empty, "down.base": base})
    down, x = factors.down, torch.randn(6, 5, generator=generator)
    made = down.common(down.read(x, down.column_sizes()))
    for x_A, y_B in zip(x, made, strict=True):
        order = sorted(range(5), key=lambda j: -float(x_A[j].abs() * base[:, j].norm()))
        expected = sum(base[:, j] * x_A[j] for j in order[:3])
        torch.testing.assert_close(y_B, expected)
    torch.testing.assert_close(down.common(down.read(x[2:3], down.column_sizes())), made[2:3])
    form["down"]["active"] = 5
    assert Factors(1, 4, 5, 5, form).down.column_sizes() is None


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss", "nemotron_h"])
def test_shared_factors_on_disk_say_what_the_dense_twin_says(name, on_disk, said, tmp_path):
    """The folder holds a shared factor once, and reads back as the checkpoint of the multiplied-out matrices."""
    _, folder, statistics = on_disk(name, "R0,R1,R2")
    options = {"keep": 0.5, "base": "regmean", "share": "right" if name == "gpt_oss" else "left", "prune": 0.2}
    report = operate(folder, tmp_path / "out", "compress", "d2_moe", options, calibration=statistics)
    dense = operate(folder, tmp_path / "dense", "compress", "d2_moe", {**options, "store": "dense"}, calibration=statistics)
    assert not report.stock and dense.stock and report.bytes_after < dense.bytes_after
    made, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    one, other = said(made), said(AutoModelForCausalLM.from_pretrained(tmp_path / "dense"))
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4 * float(other.abs().max()))
    assert 0.4 < report.blocks[0]["share"] <= 0.5
    shapes = {}
    for path in (tmp_path / "out").glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            shapes |= {key: file.get_slice(key).get_shape() for key in file.keys()}  # noqa: SIM118
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    for block in config["surgery"]["blocks"].values():
        assert block["form"]["down"]["shared"] == options["share"]
    held = [shape[0] for key, shape in shapes.items() if key.endswith(f"{LEAF}.down.{options['share']}")]
    ranks = [max(block["down_ranks"]) for block in report.blocks]
    assert sorted(held) == sorted(ranks)


def test_a_base_read_by_token_survives_the_disk(on_disk, said, tmp_path):
    _, folder, statistics = on_disk("mixtral", "R0,R1,R2")
    options = {"keep": 0.5, "base": "mean", "prune": 0.5, "dynamic": 0.5}
    operate(folder, tmp_path / "out", "compress", "d2_moe", options, calibration=statistics)
    made = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    down = getattr(View(made)[0].experts, LEAF).down
    inner = len(down.right[0])
    assert down.base.shape[1] == inner - inner // 4 and down.active == inner - inner // 2
    before = said(made)
    for block in View(made):
        getattr(block.experts, LEAF).down.active = None
    assert not torch.equal(said(made), before)


@pytest.mark.parametrize("share", ["right", "left"])
def test_a_permutation_of_the_experts_commutes_with_sharing(make, logits, shuffle, share):
    ids = many(8)
    first, second = make("Qwen3Moe"), make("Qwen3Moe")
    shuffle(second)
    method = D2Moe(0.5, base="frequency", share=share, prune=0.2)
    for model in (first, second):
        operate_live(method, measure(model, ids, "R0,R2"))
    torch.testing.assert_close(logits(first, ids), logits(second, ids), rtol=2e-3, atol=2e-3)


def test_whitening_loses_less_of_an_upcycled_layer_at_every_rank(make):
    """Experts that are one expert and some noise: the layer's output on text like the calibration's."""
    generator = torch.Generator().manual_seed(2)
    model = make("Mixtral")
    for block in View(model):
        first = block.bank[0]
        for e in range(1, 8):
            block.bank[e] = first.map(lambda w: w + 0.5 * w.std() * torch.randn(w.shape, generator=generator))
    wrong = {}
    for keep in (0.25, 0.4, 0.6):
        for whiten in (True, False):
            layer = measure(model, many(16), "R0,R2")[0]
            change = D2Moe(keep, base="mean", whiten=whiten).change(layer, None)
            wrong[keep, whiten] = sum(_output_error(layer, e, change, 512, generator) for e in range(layer.facts.experts))
        assert wrong[keep, True] < wrong[keep, False]


def _output_error(layer, e, change, tokens, generator):
    """Of the first product, on inputs drawn from the moment that all experts' inputs have."""
    root = torch.linalg.cholesky(moment_of(layer, None, "first")).float()
    x = root @ torch.randn(len(root), tokens, generator=generator)
    low = sum(change.form["first"]["ranks"][:e])
    rank = change.form["first"]["ranks"][e]
    left, right = (change.bank[f"first.{name}"][low : low + rank] for name in ("left", "right"))
    return float(((upright(layer, e, "first") - change.bank["first.base"] - left.T @ right) @ x).square().sum())


@pytest.mark.parametrize("share", ["right", "left"])
def test_a_shared_factor_and_a_pruned_base_learn(make, ids, share):
    """In mixed precision, as recovery trains; every expert's tokens reach the one factor."""
    model = make("Qwen3Moe")
    operate_live(D2Moe(0.5, base="mean", share=share, prune=0.5, dynamic=0.5), measure(model, ids, "R0,R2"))
    model.requires_grad_(True)
    with torch.autocast("cpu", torch.bfloat16):
        model(input_ids=ids[0], labels=ids[0]).loss.backward()
    for block in View(model):
        for side in SIDES:
            own = getattr(getattr(block.experts, LEAF), side)
            assert all(p.grad is not None and p.grad.any() for p in (own.left, own.right, own.base))


def test_a_form_that_cannot_be_is_refused():
    whole = {"ranks": [1], "base": True}
    for wrong in ({"shared": "both"}, {"active": 0}, {"inputs": 6}, {"outputs": 2, "base": False}):
        with pytest.raises(BadInput, match=r"config\.json"):
            Factors(1, 4, 5, 5, {"first": whole, "down": {**whole, **wrong}})


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"share": "both"}, "share 'both'"),
        ({"prune": 1.0}, "prune 1.0"),
        ({"dynamic": 0.5}, "dynamic 0.5: a share of what `prune` takes"),
        ({"prune": 0.2, "dynamic": 0.5, "store": "dense"}, "reads all inputs"),
        ({"base": "ties"}, "base 'ties'"),
    ],
)
def test_options_that_cannot_be(options, told):
    with pytest.raises(BadInput, match=told):
        D2Moe(0.5, **options)


def test_moments_of_few_different_tokens_still_have_a_factor(make, ids):
    """Thirty times the same text: enough tokens by count, and a moment that float32 sums leave indefinite."""
    layer = measure(make("Qwen3Moe"), ids * 30, "R0,R2")[0]
    for side in SIDES:
        for e in range(layer.facts.experts):
            assert not torch.linalg.cholesky_ex(moment_of(layer, e, side)).info
    D2Moe(0.5, base="regmean", share="left", prune=0.2).change(layer, None)


def test_a_pruned_base_leaves_room_for_smaller_shares(make, ids):
    facts = measure(make("Mixtral"), ids, "R0")[0].facts
    D2Moe(0.11, prune=0.2).plan([facts])
    with pytest.raises(BadInput, match=r"the base alone takes 0\.100"):
        D2Moe(0.09, prune=0.2).plan([facts])
