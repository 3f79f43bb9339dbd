"""The model that ships: small, stock, trained, and better than the compressors on what it was trained on."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from transformers import AutoConfig

import moesaic
from moesaic.core.documents import read_documents
from moesaic.view import resolve_model, view

FOLDER = resolve_model("bundled")


def test_it_is_a_small_stock_moe():
    config = AutoConfig.from_pretrained(FOLDER)
    assert config.architectures == ["Qwen3MoeForCausalLM"]
    assert config.num_hidden_layers >= 6
    assert config.num_experts >= 16
    assert config.num_experts_per_tok >= 2
    assert sum(f.stat().st_size for f in FOLDER.glob("*.safetensors")) <= 20_000_000
    assert not [f for f in FOLDER.iterdir() if f.suffix in (".bin", ".pt", ".py", ".pkl")]


def test_transformers_alone_loads_it_and_agrees_with_ours():
    code = (
        "import sys, torch\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        f"model = AutoModelForCausalLM.from_pretrained({str(FOLDER)!r}, dtype=torch.float32)\n"
        f"ids = AutoTokenizer.from_pretrained({str(FOLDER)!r})('def main():', return_tensors='pt').input_ids\n"
        "assert 'moesaic' not in sys.modules\n"
        "print(ids.tolist(), model(ids).logits[0, -1, :50].tolist(), sep='\\n')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    ids, logits = (torch.tensor(json.loads(line)) for line in done.stdout.splitlines()[-2:])
    model, _ = moesaic.load("bundled", dtype="float32")
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits[0, -1, :50], logits, rtol=1e-3, atol=1e-3)


def test_any_text_round_trips_and_every_layer_is_a_block():
    model, tokenizer = moesaic.load("bundled")
    for text in ("It is a truth universally acknowledged", "ગુજરાતી Українська ñ 𝄞 \t\n  x", "\x00\x7f"):
        assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert len(view(model)) == model.config.num_hidden_layers


@pytest.mark.slow
@pytest.mark.shared
def test_it_beats_both_compressors_in_every_domain(shared, capsys):
    from moesaic.cli.main import main

    data = shared / "data" / "corpus" / "valid"
    with pytest.raises(SystemExit) as done:
        main(f"eval bundled --data {data} --context 512 --compare-compressors --max-bytes 12000 --json".split())
    assert not done.value.code
    domains = json.loads(capsys.readouterr().out)["domains"]
    assert len(domains) == len({doc.domain for doc in read_documents(data)}) == 11
    for name, row in domains.items():
        for compressor in ("xz", "zstd"):
            (key,) = [k for k in row if k.startswith(compressor)]
            assert row["bits_per_byte"] < 0.9 * row[key], f"{name}: {row}"
