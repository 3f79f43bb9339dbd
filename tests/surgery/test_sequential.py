"""Sequential surgery out of core against its twin on the live model; what it refuses, and a walk that was broken off."""

import json
import random
from pathlib import Path

import pytest
import torch
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import moesaic
from moesaic.core import registry
from moesaic.core.documents import Document
from moesaic.core.errors import BadInput
from moesaic.surgery import memory, sequential
from moesaic.surgery.estimate import estimate
from moesaic.surgery.measure import measure
from moesaic.surgery.measured import output_error
from moesaic.surgery.operate import operate
from moesaic.surgery.planning import LAYERWISE, build, open_plan, plan_step
from moesaic.surgery.recipe import Step, parse, plan_recipe, run_recipe
from moesaic.surgery.sequential import Text, Walk
from moesaic.surgery.shards import Shards
from moesaic.trace import corpus
from moesaic.view import tiny, view

LETTERS = " abcdefghijklmnopqrstuvwxyz"
CONTEXT, ROWS = 16, 4

ARCHITECTURES = ("deepseek_v3", "glm4_moe", "gpt_oss", "mixtral")
"""Shared experts, a dense first layer and a group-limited router; sigmoid with a correction bias; stacked, transposed and
biased; plain."""

FEW = (
    ("deepseek_v3", "prune", "naee", {"keep": 0.5, "tokens": 64}),
    ("gpt_oss", "prune", "naee", {"keep": 0.5, "tokens": 64}),
    ("glm4_moe", "quantize", "gptq", {"bits": 3, "group": 32, "least": 4}),
    ("mixtral", "merge", "m_smoe", {"keep": 0.5, "scope": "uniform"}),
    ("deepseek_v3", "compress", "d2_moe", {"keep": 0.5, "base": "mean"}),
)
MANY = tuple(
    (name, family, method, options)
    for name in ARCHITECTURES
    for family, method, options in (
        ("prune", "naee", {"keep": 0.5, "tokens": 64}),
        ("prune", "reap", {"keep": 0.5}),
        ("prune", "ean", {"keep": 0.5}),
        ("merge", "m_smoe", {"keep": 0.5, "scope": "uniform"}),
        ("merge", "hc_smoe", {"keep": 0.5, "router": "collapse"}),
        ("compress", "d2_moe", {"keep": 0.5, "base": "mean"}),
        ("compress", "low_rank", {"keep": 0.5, "whiten": True}),
        ("compress", "neurons", {"keep": 0.5}),
        ("quantize", "gptq", {"bits": 3, "group": 32, "least": 4}),
        ("quantize", "awq", {"bits": 4, "group": 32}),
        ("quantize", "pmq", {"bits": 2.5, "group": 32}),
    )
    if (name, family, method, options) not in FEW
)


@pytest.fixture
def texts():
    """Of whole contexts, so that no row is padded; as words of the tokenizer that `saved` writes."""
    drawn = random.Random(5)
    return [Document("".join(drawn.choices(LETTERS, k=CONTEXT)), "ab"[i % 2]) for i in range(3 * ROWS)]


@pytest.fixture
def saved(tmp_path, monkeypatch):
    """saved(architecture) -> the folder of a tiny random model with a tokenizer of letters."""
    monkeypatch.setattr(corpus, "TOKENS_AT_ONCE", ROWS * CONTEXT)

    def save(name):
        (model_class, *_) = tiny.model_classes(next(a for a in tiny.architectures() if a.name == name))
        tiny.build(model_class).save_pretrained(tmp_path / "in")
        letters = Tokenizer(models.WordLevel({letter: 8 + i for i, letter in enumerate(LETTERS)}, unk_token=" "))
        letters.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
        PreTrainedTokenizerFast(tokenizer_object=letters).save_pretrained(tmp_path / "in")
        return tmp_path / "in"

    return save


def ids_of(texts):
    rows = torch.tensor([[8 + LETTERS.index(letter) for letter in each.text] for each in texts])
    return list(rows.split(ROWS))


def as_the_twin(folder, texts, family, method, options):
    """The report of the run out of core, after a comparison with the same method on the live model."""
    entry, _ = build(family, method, options)
    out = folder.with_name("out")
    report = operate(folder, out, family, method, options, sequential=Text(texts, context=CONTEXT))
    twin = moesaic.load(folder).model
    tiers = tuple(sorted({"R0", *entry.needs}))
    changes = memory.progressively(twin, lambda: build(family, method, options)[1], ids_of(texts), tiers)
    made = moesaic.load(out).model
    for block, ours, change, done in zip(view(made), view(twin), changes, report.blocks, strict=True):
        assert done["expert_map"] == change.expert_map(done["experts_before"])
        if not change.form:
            for e in range(len(ours.bank)):
                mine, theirs = block.bank.peek(e), ours.bank.peek(e)
                assert all(torch.equal(mine[name], theirs[name]) for name in theirs)
    for ids_BN in ids_of(texts):
        with torch.no_grad():
            mine, theirs = (each(input_ids=ids_BN, use_cache=False).logits for each in (made, twin))
        assert (mine - theirs).abs().max() <= 1e-5 * theirs.abs().max()
    return report


@pytest.mark.parametrize(("name", "family", "method", "options"), FEW)
def test_as_the_live_model(name, family, method, options, saved, texts):
    as_the_twin(saved(name), texts, family, method, options)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "family", "method", "options"), MANY)
def test_as_the_live_model_for_more_methods(name, family, method, options, saved, texts):
    as_the_twin(saved(name), texts, family, method, options)


@pytest.mark.slow
@pytest.mark.parametrize(
    "before", [("merge", "m_smoe", {"keep": 0.5, "scope": "uniform"}), ("prune", "random", {"keep": 0.5, "scope": "global"})]
)
@pytest.mark.parametrize("step", [("quantize", "gptq", {"bits": 3, "group": 32, "least": 4}), ("prune", "ean", {"keep": 0.75})])
def test_behind_a_step_whose_blocks_share_experts_or_differ(before, step, saved, texts):
    folder = saved("mixtral")
    text = Text(texts, context=CONTEXT) if build(*before)[0].needs else None
    operate(folder, folder.with_name("before"), *before, sequential=text)
    as_the_twin(folder.with_name("before"), texts, *step)


def test_statistics_are_of_the_changed_model(saved, texts):
    folder, options = saved("mixtral"), {"bits": 2, "group": 32, "least": 1}
    entry, _ = build("quantize", "gptq", options)
    untouched = measure(folder, texts, folder.with_name("statistics"), sorted(entry.needs), context=CONTEXT)
    operate(folder, folder.with_name("once"), "quantize", "gptq", options, calibration=untouched)
    operate(folder, folder.with_name("walked"), "quantize", "gptq", options, sequential=Text(texts, context=CONTEXT))
    once, walked = (view(moesaic.load(folder.with_name(name)).model) for name in ("once", "walked"))
    same = [torch.equal(a.experts.down_proj, b.experts.down_proj) for a, b in zip(once, walked, strict=True)]
    assert same[0] and not any(same[1:])


def test_domains_kept_apart(saved, texts):
    folder = saved("mixtral")
    for name, domain, some in (("apart", "a", texts), ("alone", None, texts[::2])):
        text = Text(some, context=CONTEXT, by_domain=domain is not None)
        operate(folder, folder.with_name(name), "prune", "frequency", {"keep": 0.5}, sequential=text, domain=domain)
    first, second = (json.loads((folder.with_name(name) / "surgery.json").read_text()) for name in ("apart", "alone"))
    assert first["steps"][0]["blocks"][0] == second["steps"][0]["blocks"][0]


def broken_off(patch, owner, name, call):
    """Let the `call`-th call of a function end the run."""
    own, calls = getattr(owner, name), []

    def until(*given):
        calls.append(given)
        if len(calls) == call:
            raise KeyboardInterrupt
        return own(*given)

    patch.setattr(owner, name, until)


@pytest.mark.parametrize(
    ("owner", "name", "call", "left"),
    [
        (corpus, "forward", 17, [2, 3]),  # three batches twice a block: some of what enters block 3 is there
        pytest.param(corpus, "forward", 19, [3], marks=pytest.mark.slow),  # the first batch of block 3
        pytest.param(Shards, "write", 3, [2, 3], marks=pytest.mark.slow),
    ],
)
def test_broken_off_it_goes_on_and_ends_the_same(owner, name, call, left, saved, texts, monkeypatch):
    folder, options = saved("mixtral"), {"bits": 3, "group": 32, "least": 4}
    whole, out = folder.with_name("whole"), folder.with_name("out")

    def run(place, some=texts, resume=False):
        operate(folder, place, "quantize", "gptq", options, sequential=Text(some, context=CONTEXT), resume=resume)

    run(whole)
    with monkeypatch.context() as patch:
        broken_off(patch, owner, name, call)
        with pytest.raises(KeyboardInterrupt):
            run(out)
    assert not out.exists()
    with pytest.raises(BadInput, match="other steps"):
        run(out, texts[:-1], resume=True)
    measured, own = [], Walk.measure
    monkeypatch.setattr(Walk, "measure", lambda self, i, *rest: (measured.append(i), own(self, i, *rest))[1])
    run(out, resume=True)
    assert measured == left
    assert not folder.with_name("out.partial").exists()
    assert {path.name for path in out.iterdir()} == {path.name for path in whole.iterdir()}
    for path in whole.glob("*.safetensors"):
        assert path.read_bytes() == (out / path.name).read_bytes()


def test_without_its_hidden_states_it_cannot_go_on(saved, texts, monkeypatch):
    folder, text = saved("mixtral"), Text(texts, context=CONTEXT)
    out = folder.with_name("out")
    with monkeypatch.context() as patch:
        broken_off(patch, Shards, "write", 2)
        with pytest.raises(KeyboardInterrupt):
            operate(folder, out, "prune", "reap", {"keep": 0.5}, sequential=text)
    for path in folder.with_name("out.partial").glob("sequential/relay/1-*"):
        path.unlink()
    with pytest.raises(BadInput, match="lacks the hidden states that enter block 1: delete"):
        operate(folder, out, "prune", "reap", {"keep": 0.5}, sequential=text, resume=True)


REFUSED = [
    ("prune", "reap", {"scope": "global"}, "one ranking of the experts of all layers"),
    ("prune", "reap", {"protect": True}, "compares the peaks of all layers"),
    ("prune", "layer_drop", {}, "compared with all others"),
    ("prune", "moe_i2", {}, "shares out what goes over the layers"),
    ("prune", "gradient_norm", {}, "reads gradients"),
    ("prune", "weight_norm", {}, "reads no text"),
    ("merge", "m_smoe", {}, "one ranking of the experts of all layers"),
    ("compress", "mc_smoe", {}, "reads gradients"),
    ("quantize", "rtn", {"bits": 4}, "reads no text"),
    ("quantize", "gptq", {"bits": 2.5}, "gives 4 bits to those experts of the whole model that 2 hurt most"),
    ("quantize", "edgemoe", {}, "experts of the whole model in one order"),
]


def test_what_needs_all_layers_is_refused_at_planning(tmp_path):
    data = tmp_path / "text.txt"
    data.write_text("Once upon a time there was a text. " * 20)
    opened = open_plan("bundled")
    for family, method, options, why in REFUSED:
        assert plan_step(opened, family, method, options).method == method
        with pytest.raises(BadInput, match=f"{family} {method}, sequential: .*{why}"):
            plan_step(opened, family, method, options, sequential=True)
    with pytest.raises(BadInput, match=r"step 1 \(prune layer_drop\): .*compared with all others"):
        run_recipe("bundled", tmp_path / "out", [Step("prune", "layer_drop", {}, data=str(data), sequential=True)])
    step = Step("prune", "reap", {}, data=str(data), statistics=str(tmp_path), sequential=True)
    with pytest.raises(BadInput, match="of the untouched model"):
        plan_recipe("bundled", [step])
    with pytest.raises(BadInput, match="needs calibration"):
        plan_recipe("bundled", [Step("prune", "reap", {}, sequential=True)])
    assert list(tmp_path.iterdir()) == [data]


def test_layers_that_share_more_than_hidden_states_are_refused(saved, texts):
    folder = saved("glm_moe_dsa")
    with pytest.raises(BadInput, match="share more than hidden states"):
        operate(folder, folder.with_name("out"), "prune", "reap", {}, sequential=Text(texts, context=CONTEXT))


def test_a_recipe_and_its_plan(tmp_path):
    (tmp_path / "text.txt").write_text("Once upon a time there was a text. " * 400)
    given = {"data": "text.txt", "steps": [{"prune": "reap", "keep": 0.5, "sequential": True}]}
    steps = parse(given, root=tmp_path)
    (plan,) = plan_recipe("bundled", steps)
    walked, once = (estimate(plan, step) for step in (steps[0], Step("prune", "reap", {"keep": 0.5}, data=steps[0].data)))
    assert walked["sequential"] and not once["sequential"] and walked["calibration_tokens"] == once["calibration_tokens"]
    report = run_recipe("bundled", tmp_path / "out", steps)
    (step,) = json.loads((tmp_path / "out" / "surgery.json").read_text())["steps"]
    assert step["calibration"]["sequential"] and step["calibration"]["text"] == [steps[0].data]
    assert report["stock"] and not (tmp_path / "out" / sequential.FOLDER).exists()
    for wrong in ({"prune": "reap", "sequential": 1}, {"unlearn": "seuf", "sequential": True}):
        with pytest.raises(BadInput, match="step 1: sequential is true or false"):
            parse({"data": "text.txt", "steps": [wrong]}, root=tmp_path)


def test_methods_that_decide_layer_by_layer_say_of_one_layer_what_they_say_of_it_among_all(saved, texts):
    """What `Method.together` promises where it is empty, for every registered method."""
    layers = memory.measure(moesaic.load(saved("mixtral")).model, ids_of(texts), "R0,R1,R2,A1,C")
    facts, asked = [layer.facts for layer in layers], []
    for family in LAYERWISE:
        for entry in registry.entries(family):
            options = {"group": 32} if "group" in entry.parameters else {}
            entry, method = build(family, entry.name, options)
            if method.together or "B" in entry.needs:
                continue
            looks = [method.look(layer) for layer in layers]
            among = method.decide(looks, facts)
            alone = [method.decide([look], [one])[0] for look, one in zip(looks, facts, strict=True)]
            assert repr(among) == repr(alone), entry.name
            asked.append(entry.name)
    assert len(asked) > 20


@pytest.mark.slow
def test_gptq_errs_less_on_what_the_rounded_layers_give(tmp_path):
    """The error of the last block's outputs, over the text, on the inputs that the rounded blocks before it give it."""
    root = Path(moesaic.__file__).parent / "surgery"
    texts = [Document((root / name).read_text(), "python") for name in ("layer.py", "recipe.py")]
    options = {"bits": 2}
    operate("bundled", tmp_path / "walked", "quantize", "gptq", options, sequential=Text(texts, context=256))
    untouched = measure("bundled", texts, tmp_path / "statistics", ("R0", "R2"), context=256)
    operate("bundled", tmp_path / "once", "quantize", "gptq", options, calibration=untouched)
    walked, once, own = (
        moesaic.load(path, dtype=torch.float32) for path in (tmp_path / "walked", tmp_path / "once", "bundled")
    )
    made = {"walked": list(view(walked.model)[5].bank), "once": list(view(once.model)[5].bank)}
    for e, expert in enumerate(view(own.model)[5].bank):
        view(walked.model)[5].bank[e] = expert
    pieces = [piece.ids for piece in corpus.pieces(texts, own.tokenizer, 256) if len(piece.ids) == 256]
    (layer,) = memory.measure(walked.model, [torch.tensor(pieces)], "R0,C", only=[5])
    errors = {name: sum(output_error(layer, e, bank[e], "features") ** 2 for e in range(16)) for name, bank in made.items()}
    assert errors["walked"] < 0.98 * errors["once"], errors
