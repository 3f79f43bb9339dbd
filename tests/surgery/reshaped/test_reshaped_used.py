"""Blocks of unequal size, rows that share experts, and factors: run, scored, traced, served, streamed, packed, fitted."""

import json
import subprocess
import sys
import threading

import httpx
import pytest
import torch

from moesaic.core.documents import Document
from moesaic.core.errors import BadInput
from moesaic.fitting.plans import Candidate
from moesaic.fitting.trial import Trials
from moesaic.serving.http.app import build
from moesaic.serving.http.engine import Engine
from moesaic.serving.http.server import Server, listen, serve
from moesaic.serving.http.service import Service
from moesaic.serving.streamed import load_streamed
from moesaic.serving.streamed.bits import Bits
from moesaic.serving.streamed.packing import pack
from moesaic.surgery.measure import measure
from moesaic.surgery.operate import operate
from moesaic.surgery.recipe import parse, plan_recipe, run_recipe
from moesaic.view import load, view

KINDS = ("uneven", "mapped", "factors")
TEXT = "Once upon a time there was a little fox who lived in the wood. " * 8


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """kind -> folder; factors are of the unequal one, so that they differ per block, too."""
    folder = tmp_path_factory.mktemp("models")
    known = measure("bundled", [Document(TEXT, "a")], folder / "s", ("R0",))
    operate("bundled", folder / "uneven", "prune", "frequency", {"keep": 0.5, "scope": "global"}, calibration=known)
    operate("bundled", folder / "mapped", "merge", "m_smoe", {"keep": 0.5, "align": "none"}, calibration=known)
    operate(folder / "uneven", folder / "factors", "compress", "low_rank", {"keep": 0.6})
    return folder


def logits(model, ids):
    with torch.no_grad():
        return model(ids).logits


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS[:2])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_streamed_and_packed_say_what_the_resident_model_says(kind, dtype, models, tmp_path):
    model, tokenizer = load(models / kind, dtype=dtype)
    ids = tokenizer(TEXT[:60], return_tensors="pt").input_ids
    assert len({block.num_experts for block in view(model)}) > 1
    expected = logits(model, ids)
    assert pack(models / kind, tmp_path / "whole").lossless
    for source in (models / kind, tmp_path / "whole"):
        for resident in (0.2, 0.5):
            with load_streamed(source, resident=resident, dtype=dtype) as streamed:
                assert torch.equal(logits(streamed.model, ids), expected)
                assert torch.equal(logits(streamed.model, ids[:, :5]), logits(model, ids[:, :5]))
                row, experts = streamed.stats.row(), sum(block.num_experts for block in view(streamed.model))
                fetched = (row["loads"] + row["streamed"]) * streamed.engine.shape.total_bytes // experts
                stored = fetched // (2 if dtype == "float32" else 1)  # the checkpoint is in bfloat16
                padding = 4096 * streamed.stats.reads if source != models / kind else 0
                assert 0 < stored <= streamed.stats.read_bytes <= stored + padding
    pack(models / kind, tmp_path / "four", bits=Bits(4))
    rounded = load(tmp_path / "four", dtype=dtype).model
    with load_streamed(tmp_path / "four", resident=0.5, dtype=dtype) as streamed:
        assert torch.equal(logits(streamed.model, ids), logits(rounded, ids))


def test_factors_say_why_they_are_not_streamed_or_packed(models, tmp_path):
    for attempt in (lambda: load_streamed(models / "factors", resident=0.5), lambda: pack(models / "factors", tmp_path / "p")):
        with pytest.raises(BadInput, match=r"its experts are factors: they run from memory.*store=dense"):
            attempt()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS[1:])
def test_the_commands_take_it(kind, models, tmp_path):
    (tmp_path / "a.txt").write_text(TEXT)
    folder, last = str(models / kind), len(view(load(models / kind).model)) - 1

    def say(*words):
        done = subprocess.run([sys.executable, "-m", "moesaic", *words, "--json"], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    report = say(
        "run", folder, "Once upon", "--max-new-tokens", "6", "--no-page", "--routing", json.dumps({"without": {"0": [0]}})
    )
    assert report["tokens"] == 6 and report["load"][0]["load"][0] == 0
    assert len(report["load"]) == last + 1
    assert say("eval", folder, "--data", str(tmp_path / "a.txt"))["bits_per_byte"] > 0
    say("trace", folder, "-o", str(tmp_path / "t.moetrace"), "--data", str(tmp_path / "a.txt"))
    assert (tmp_path / "t.moetrace").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_served_at_once_each_request_by_its_own_routing(kind, models):
    """Real requests, side by side: each text is that of a run under its policy alone."""
    model, tokenizer = load(models / kind, dtype="float32")
    blocks = view(model)
    busiest = max(range(len(blocks)), key=lambda i: blocks[i].num_experts)
    most = blocks[busiest].num_experts - 1
    wanted = [
        None,
        {"k": 1},
        {"without": {str(busiest): [most]}},
        {"bias": {str(busiest): [9.0] + [0.0] * most}},
        {"without": [0]},
    ]
    prompt = "Once upon a time"
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    expected = []
    for fields in wanted:
        given = {k: {int(n): x for n, x in v.items()} if isinstance(v, dict) else v for k, v in (fields or {}).items()}
        with blocks.policy(**given):
            out = model.generate(ids, max_new_tokens=10, do_sample=False)
        expected.append(tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True))
    engine = Engine(model, tokenizer, threads=1)
    server = Server(build(Service(engine, ("m",))), engine, grace=1)
    socket = listen("127.0.0.1", 0)
    thread = threading.Thread(target=serve, args=(server, socket), daemon=True)
    thread.start()
    url, said = f"http://127.0.0.1:{socket.getsockname()[1]}/v1/completions", [None] * len(wanted)

    def ask(i):
        routing = {} if wanted[i] is None else {"routing": wanted[i]}
        body = {"model": "m", "prompt": prompt, "max_tokens": 10, "temperature": 0, **routing}
        said[i] = httpx.post(url, json=body, timeout=60)

    try:
        clients = [threading.Thread(target=ask, args=(i,)) for i in range(len(wanted))]
        for client in clients:
            client.start()
        for client in clients:
            client.join()
        assert [answer.status_code for answer in said] == [200] * len(wanted), [answer.text for answer in said]
        assert [answer.json()["choices"][0]["text"] for answer in said] == expected
        wrong = httpx.post(url, json={"model": "m", "prompt": "a", "routing": {"without": [most + 1]}}, timeout=60)
        assert wrong.status_code == 400 and "has experts 0 to" in wrong.text
    finally:
        server.grace = 0
        server.quit()
        thread.join(20)


@pytest.mark.slow
def test_moe_i2_in_two_stages(tmp_path):
    """Budgets hold exactly over both stages, and stage 2 shares a layer's rank out among the experts that stage 1 left."""
    (tmp_path / "a.txt").write_text(TEXT)
    stages = [{"prune": "moe_i2", "keep": 12, "tokens": 128}, {"compress": "moe_i2", "keep": 0.7, "tokens": 128}]
    steps = parse({"data": "a.txt", "steps": stages}, root=tmp_path)
    assert [plan.stock for plan in plan_recipe("bundled", steps)] == [False, False]
    report = run_recipe("bundled", tmp_path / "out", steps)
    one, two = (row["blocks"] for row in report["steps"])
    counts = [block["experts_after"] for block in one]
    assert sum(counts) == 12 * 6 and len(set(counts)) > 1
    model, tokenizer = load(tmp_path / "out")
    assert [block.num_experts for block in view(model)] == counts == [block["experts_after"] for block in two]
    for block, found in zip(view(model), two, strict=True):
        E, D, inner = block.num_experts, block.bank.width, block.experts.down_proj.shape[2]
        for side, rows, columns in (("first", 2 * inner, D), ("down", D, inner)):
            assert sum(found[f"{side}_ranks"]) == int(0.7 * E * rows * columns / (rows + columns) + 1e-9)
    assert model.generate(**tokenizer("Once", return_tensors="pt"), max_new_tokens=3).shape[1] > 3


@pytest.mark.slow
def test_fit_builds_and_runs_what_one_ranking_of_all_layers_leaves(tmp_path):
    from moesaic.view import resolve_model

    known = measure("bundled", [Document(TEXT, "a")], tmp_path / "s", ("R0", "R1"))
    (tmp_path / "test.jsonl").write_text(json.dumps({"text": TEXT, "domain": "a"}) + "\n")
    trials = Trials(resolve_model("bundled"), tmp_path, lambda folder: known, tmp_path / "test.jsonl", "Once", 4, None, 1)
    seen = []
    for bits, resident in ((4, 1.0), (16, 0.5)):
        plan = Candidate("prune reap", 0.5, bits, resident, expert_bytes=7 << 20, scope="global")
        row = trials.measure(plan)
        seen.append(row["folder"])
        assert row["tokens_per_second"] > 0 and row["bits_per_byte"] > 0 and "over all layers" in row["plan"]
        assert (row["hit_rate"] is not None) == (resident < 1)
        assert len({block.num_experts for block in view(load(row["folder"]).model)}) > 1
    assert all("reap-global-0.5" in folder for folder in seen)
