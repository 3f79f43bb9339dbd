"""`moesaic run`: what it prints, its JSON object, chatting, and every bad input in one clear line."""

from __future__ import annotations

import errno
import io
import json
import os
import shutil
import struct
import sys

import pytest

SHORT = ("--max-new-tokens", "12", "--threads", "1")


def test_prints_facts_text_tables_and_page(moesaic, tiny_moe, tmp_path):
    result = moesaic("run", tiny_moe, "the router", *SHORT)
    assert result.code == 0
    for words in (
        "Qwen3MoeForCausalLM",
        "2 MoE layers of 4 experts, top 2",
        "resident of",
        "kernels",
        "the router",
        "tokens/s",
    ):
        assert words in result.out, words
    assert "moesaic-run.html" in result.out
    page = (tmp_path / "moesaic-run.html").read_text()
    assert "</html>" in page
    assert len(page) < 300_000


def test_json_is_one_object_with_the_promised_keys(moesaic, tiny_moe, tmp_path):
    result = moesaic("run", tiny_moe, "the router", "--json", "--page", tmp_path / "p.html", *SHORT)
    assert result.code == 0
    found = json.loads(result.out)
    assert len(result.out.strip().splitlines()) == 1
    promised = "model architecture layers experts top_k text tokens tokens_per_second time_to_first_token_seconds"
    for key in [*promised.split(), "resident_bytes", "total_bytes", "exact", "page"]:
        assert key in found, key
    assert (found["layers"], found["experts"], found["top_k"], found["exact"]) == (2, 4, 2, True)
    assert found["tokens"] == 12 or found["stopped"] == "end of text"
    assert found["tokens_per_second"] > 0
    assert found["time_to_first_token_seconds"] > 0
    assert found["page"] == str(tmp_path / "p.html")
    seen = found["prompt_tokens"] + found["tokens"] - 1
    assert [sum(layer["load"]) for layer in found["load"]] == [2 * seen] * 2
    assert "kernels" in result.err


def test_the_seed_decides_the_text(moesaic, tiny_moe):
    texts = [
        json.loads(moesaic("run", tiny_moe, "the", "--json", "--no-page", "--seed", s, *SHORT).out)["text"] for s in (1, 1, 2)
    ]
    assert texts[0] == texts[1] != texts[2]


def test_greedy_equals_transformers(moesaic, tiny_moe):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = AutoModelForCausalLM.from_pretrained(tiny_moe), AutoTokenizer.from_pretrained(tiny_moe)
    ids = torch.tensor([tokenizer("the router")["input_ids"]])
    expected = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False, pad_token_id=0)
    result = moesaic("run", tiny_moe, "the router", "--temperature", 0, "--json", "--no-page", *SHORT)
    assert json.loads(result.out)["text"] == tokenizer.decode(expected[0, ids.shape[1] :], skip_special_tokens=True)


def test_a_narrower_dtype_is_not_exact(moesaic, tiny_moe):
    result = moesaic("run", tiny_moe, "the", "--dtype", "bfloat16", "--json", "--no-page", *SHORT)
    assert json.loads(result.out)["exact"] is False


def test_rounded_while_loading(moesaic):
    done = moesaic("run", "bundled", "--quantize", "int4:linear=8", "--no-page", "--max-new-tokens", 4, "--json")
    facts = json.loads(done.out)
    whole = json.loads(moesaic("run", "bundled", "--no-page", "--max-new-tokens", 1, "--json").out)
    assert not facts["exact"] and facts["rounding"]["experts_by_bits"] == {"4": 96} and facts["rounding"]["linear_bits"] == 8
    assert facts["total_bytes"] == whole["total_bytes"]
    assert facts["resident_bytes"] < 0.6 * facts["total_bytes"]
    shown = moesaic("run", "bundled", "--quantize", "int4", "--no-page", "--max-new-tokens", 2)
    assert "no: experts rounded to 4 bits" in shown.out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--quantize", "int5"], "one of int8, int4, int2, mixed"),
        (["--quantize", "mixed"], "mixed widths take an importance"),
        (["--quantize", "int4", "--resident", "0.5"], "needs all experts in memory"),
        (["--quantize", "int4", "--experts", "eager"], "leave --experts eager out"),
    ],
)
def test_rounding_that_cannot_be(moesaic, arguments, words):
    done = moesaic("run", "bundled", *arguments)
    assert done.code == 2 and words in " ".join(done.err.split())


def test_generation_stops_at_the_end_of_the_context(moesaic, tiny_moe):
    result = moesaic("run", tiny_moe, "the router " * 5, "--max-new-tokens", 500, "--json", "--no-page", "--threads", 1)
    found = json.loads(result.out)
    if found["stopped"] != "end of text":
        assert found["stopped"] == "context full"
        assert found["prompt_tokens"] + found["tokens"] == 64
        assert "context full (64 tokens)" in result.err


def test_prompt_from_file_and_from_standard_input(moesaic, tiny_moe, tmp_path, monkeypatch):
    (tmp_path / "p.txt").write_text("the router")
    common = ("--json", "--no-page", "--temperature", 0, *SHORT)
    expected = json.loads(moesaic("run", tiny_moe, "the router", *common).out)["text"]
    assert json.loads(moesaic("run", tiny_moe, "--prompt-file", "p.txt", *common).out)["text"] == expected
    monkeypatch.setattr(sys, "stdin", io.StringIO("the router"))
    assert json.loads(moesaic("run", tiny_moe, "-", *common).out)["text"] == expected


def test_a_dense_model_runs_only_when_asked(moesaic, tiny_dense, tmp_path):
    refused = moesaic("run", tiny_dense, "the", *SHORT)
    assert "not a Mixture-of-Experts model" in refused.complaint
    assert "--dense-ok" in refused.complaint
    found = json.loads(moesaic("run", tiny_dense, "the", "--dense-ok", "--json", *SHORT).out)
    assert (found["layers"], found["experts_used"]) == (0, [])
    assert "Qwen3ForCausalLM" in (tmp_path / "moesaic-run.html").read_text()


def test_interactive_keeps_the_conversation(moesaic, tiny_moe, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("the router\nkeeps the best\n\n/reset\nx = 1\n/exit\nnever read"))
    result = moesaic("run", tiny_moe, "-i", "--json", "--no-page", "--max-new-tokens", 4, "--threads", 1)
    assert result.code == 0
    found = json.loads(result.out)
    assert [turn["prompt"] for turn in found["turns"]] == ["the router", "keeps the best", "x = 1"]
    assert found["prompt_tokens"] < 6, "/reset forgets"


def test_interactive_goes_on_after_a_message_that_does_not_fit(moesaic, tiny_moe, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("router " * 60 + "\nthe\n"))
    result = moesaic("run", tiny_moe, "--interactive", "--no-page", "--max-new-tokens", 4, "--threads", 1)
    assert result.code == 0
    assert "the context of this model 64" in " ".join(result.out.split())
    assert "tokens/s" in result.out


def test_interactive_uses_the_chat_template(moesaic, tiny_moe, tmp_path, monkeypatch):
    folder = tmp_path / "chatty"
    shutil.copytree(tiny_moe, folder)
    (folder / "chat_template.jinja").write_text("{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<answer>")
    monkeypatch.setattr(sys, "stdin", io.StringIO("hi\nyes\n"))
    asked = []
    from moesaic.cli import run_session

    real = run_session.generate
    monkeypatch.setattr(run_session, "generate", lambda m, t, ids, *a: asked.append(t.decode(ids)) or real(m, t, ids, *a))
    moesaic("run", folder, "-i", "--no-page", "--max-new-tokens", 3, "--threads", 1)
    assert asked[0] == "<user>hi<answer>"
    assert asked[1].startswith("<user>hi<assistant>")
    assert asked[1].endswith("<user>yes<answer>")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["/nowhere/model", "x"], "no such model folder: /nowhere/model"),
        (["Once upon a time"], 'moesaic run bundled "Once upon a time"'),
        (["MOE", ""], "the prompt is empty"),
        (["MOE", "  \n"], "the prompt is empty"),
        (["MOE", "x", "--dtype", "float12"], "unknown dtype 'float12'"),
        (["MOE", "x", "--temperature", "-1"], "--temperature -1"),
        (["MOE", "x", "--temperature", "nan"], "--temperature nan"),
        (["MOE", "x", "--top-p", "1.5"], "--top-p 1.5"),
        (["MOE", "x", "--top-k", "0"], "--top-k 0"),
        (["MOE", "x", "--repetition-penalty", "0"], "--repetition-penalty 0"),
        (["MOE", "x", "--max-new-tokens", "0"], "--max-new-tokens 0"),
        (["MOE", "x", "--seed", "-5"], "--seed -5"),
        (["MOE", "x", "--threads", "0"], "--threads 0"),
        (["MOE", "x", "--prompt-file", "gone.txt"], "not both"),
        (["MOE", "--prompt-file", "gone.txt"], "--prompt-file gone.txt: No such file"),
        (["MOE", "x", "--page", "gone/p.html"], "no folder gone"),
        (["MOE", "x", "--page", "."], "it is a folder"),
        (["MOE", "x", "--page", "/dev/full"], "not a regular file"),
        (["MOE", "x", "--experts", "magic"], "magic"),
    ],
)
def test_bad_input(moesaic, tiny_moe, arguments, words):
    result = moesaic("run", *[tiny_moe if a == "MOE" else a for a in arguments])
    assert words in result.complaint
    assert result.out == ""


def test_prompt_longer_than_the_context_names_both_numbers(moesaic, tiny_moe):
    complaint = moesaic("run", tiny_moe, "x" * 300, "--no-page").complaint
    assert "the prompt is 300 tokens, the context of this model 64" in complaint


@pytest.mark.parametrize("kind", ["cut", "header", "shape"])
def test_a_broken_shard_is_named_with_its_tensor(moesaic, tiny_moe, tmp_path, kind):
    folder = tmp_path / "broken"
    shutil.copytree(tiny_moe, folder)
    shard = folder / "model.safetensors"
    data = shard.read_bytes()
    if kind == "cut":
        shard.write_bytes(data[:-50])
    elif kind == "header":
        shard.write_bytes(data[:8] + b"#" + data[9:])
    else:
        (length,) = struct.unpack("<Q", data[:8])
        header = json.loads(data[8 : 8 + length])
        header["model.norm.weight"]["shape"] = [17]
        encoded = json.dumps(header).encode()
        shard.write_bytes(struct.pack("<Q", len(encoded)) + encoded + data[8 + length :])
    complaint = moesaic("run", folder, "x", "--no-page").complaint
    assert str(shard) in complaint
    assert {"cut": "truncated: tensor model.", "header": "corrupted", "shape": "tensor model.norm.weight"}[kind] in complaint


@pytest.mark.parametrize("as_json", [False, True])
def test_a_full_disk_loses_the_page_but_not_the_text(moesaic, tiny_moe, tmp_path, monkeypatch, as_json):
    page = tmp_path / "p.html"
    page.write_text("the page of before")

    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("moesaic.core.files.os.fsync", full)
    result = moesaic("run", tiny_moe, "the router", "--page", page, *SHORT, *(["--json"] if as_json else []))
    assert "No space left on device" in result.complaint
    assert str(page) in result.complaint
    assert page.read_text() == "the page of before"
    assert [p.name for p in tmp_path.iterdir()] == ["p.html"]
    if as_json:
        assert json.loads(result.out)["page"] is None
        assert json.loads(result.out)["text"]
    else:
        assert "the router" in result.out
        assert "tokens/s" in result.out


def test_debug_shows_the_traceback(tiny_moe):
    from moesaic.cli.main import main
    from moesaic.core.errors import BadInput

    with pytest.raises(BadInput):
        main(["run", str(tiny_moe), "", "--debug"])


def test_help_names_every_option(moesaic):
    out = moesaic("run", "--help").out
    for option in ("--interactive", "--prompt-file", "--dense-ok", "--no-page", "--json", "--trust-remote-code"):
        assert option in out
