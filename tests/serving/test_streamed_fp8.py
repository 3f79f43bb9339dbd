"""fp8 checkpoints: streamed logits are those of transformers' own widening, bit for bit; whatever does not fit is named."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from moesaic.core.errors import BadInput
from moesaic.serving.streamed import load_streamed
from moesaic.serving.streamed.packing import pack
from moesaic.view import load, quiet
from moesaic.view.skeleton.fp8 import widen

BLOCK = 32


@pytest.fixture(autouse=True)
def silent():
    with quiet():
        yield


def qwen3():
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    config = Qwen3MoeConfig(
        vocab_size=100, hidden_size=64, intermediate_size=64, moe_intermediate_size=96, num_hidden_layers=2, num_experts=4,
        num_attention_heads=2, num_key_value_heads=2, head_dim=32, num_experts_per_tok=2, initializer_range=0.2,
    )  # fmt: skip
    return Qwen3MoeForCausalLM(config)


def deepseek():
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    config = DeepseekV3Config(
        vocab_size=100, hidden_size=64, intermediate_size=64, moe_intermediate_size=32, num_hidden_layers=2, n_routed_experts=4,
        num_attention_heads=2, num_key_value_heads=2, q_lora_rank=32, kv_lora_rank=32, qk_rope_head_dim=16, qk_nope_head_dim=16,
        v_head_dim=32, num_experts_per_tok=2, n_group=1, topk_group=1, first_k_dense_replace=1, n_shared_experts=1,
        initializer_range=0.2,
    )  # fmt: skip
    return DeepseekV3ForCausalLM(config)


def fp8(tensor):
    """Codes, and the scale of every block of 32 x 32, uneven from block to block."""
    rows, columns = tensor.shape
    blocks = tensor.float().view(rows // BLOCK, BLOCK, columns // BLOCK, BLOCK)
    scale = blocks.abs().amax((1, 3)) / 448
    codes = (blocks / scale[:, None, :, None]).reshape(rows, columns).to(torch.float8_e4m3fn)
    return codes, scale


def write(model, folder, change=lambda tensors: tensors):
    """The checkpoint of a model in bf16 as DeepSeek publishes its own: linear layers of blocks in fp8, scales beside them."""
    model.to(torch.bfloat16).save_pretrained(folder)
    tensors = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        plain = "proj" not in name or any(n % BLOCK for n in tensor.shape)
        tensors |= {name: tensor} if plain else dict(zip((name, name + "_scale_inv"), fp8(tensor), strict=True))
    save_file(change(tensors), folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    quantised = {"quant_method": "fp8", "weight_block_size": [BLOCK, BLOCK], "activation_scheme": "dynamic"}
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": quantised}))
    return folder


@pytest.mark.parametrize("make", [qwen3, deepseek])
def test_logits_are_those_of_the_widened_model(make, tmp_path):
    from transformers import AutoModelForCausalLM, FineGrainedFP8Config

    torch.manual_seed(0)
    folder = write(make(), tmp_path / "fp8")
    assert any(t.dtype == torch.float8_e4m3fn for n, t in load_file(folder / "model.safetensors").items() if ".experts." in n)
    resident = AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=FineGrainedFP8Config(dequantize=True), experts_implementation="moesaic", dtype="auto"
    ).eval()
    ids = torch.randint(0, 100, (1, 17))
    with torch.no_grad():
        expected = resident(ids).logits
        assert expected.dtype == torch.bfloat16 and torch.isfinite(expected).all()
        with load_streamed(folder, resident=0.4) as streamed:
            assert torch.equal(streamed.model(ids).logits, expected)
            size = sum(stored.nbytes for source in streamed.engine.layers[0].sources
                       for stored in (*source.ranges(0), *source.scale_ranges(0)))  # fmt: skip
            stats = streamed.stats
            assert stats.read_bytes == (stats.accesses - stats.hits) * size  # a byte a weight, and the scales
        pack(folder, tmp_path / "out")
        assert torch.equal(load(tmp_path / "out").model(ids).logits, expected)
        with load_streamed(tmp_path / "out", resident=0.4) as streamed:
            assert torch.equal(streamed.model(ids).logits, expected)
            assert not streamed.engine.layers[0].aside


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16, torch.float8_e8m0fnu, torch.uint8])
@pytest.mark.parametrize("blocks", [(1, 1), (3, 2), (6, 1), (6, 10)])
def test_widening_equals_a_loop(kind, blocks):
    torch.manual_seed(1)
    codes = torch.randn(6, 10).to(torch.float8_e4m3fn)
    powers = torch.randint(-3, 4, blocks)
    scale = (powers + 127).to(torch.uint8) if kind == torch.uint8 else torch.exp2(powers.float()).to(kind)
    factor = torch.exp2(powers.float())
    expected = torch.empty(6, 10)
    for i in range(6):
        for j in range(10):
            expected[i, j] = codes[i, j].float() * factor[i * blocks[0] // 6, j * blocks[1] // 10]
    assert torch.equal(widen(codes, scale, torch.float32), expected)
    assert torch.equal(widen(codes, scale, torch.bfloat16), expected.bfloat16())


def test_what_is_refused(tmp_path):
    torch.manual_seed(0)
    model = qwen3()
    name = "model.layers.1.mlp.experts.2.up_proj.weight"

    def refused(number, words, change):
        folder = write(model, tmp_path / str(number), change)
        with pytest.raises(BadInput, match=words):
            load_streamed(folder, resident=0.5)

    refused(1, r"3 scales such as .* for 4 tensors such as .*up_proj", lambda t: (t.pop(name + "_scale_inv"), t)[1])
    refused(2, rf"{name}_scale_inv \[5, 2\] does not cut .*experts\.2\.up_proj\.weight \[96, 64\]",
            lambda t: t | {name + "_scale_inv": torch.ones(5, 2)})  # fmt: skip
    refused(3, "is bfloat16: scaled experts stream from float8_e4m3fn only", lambda t: t | {name: t[name].bfloat16()})
    refused(4, "which is no scale that is read here", lambda t: t | {name + "_scale_inv": torch.ones(3, 2, dtype=torch.int32)})
    refused(
        5,
        "is float8_e4m3fn: experts stream from",
        lambda t: {n: v for n, v in t.items() if not ("experts" in n and "scale" in n)},
    )
    shutil.copytree(tmp_path / "1", tmp_path / "other")
    config = json.loads((tmp_path / "other" / "config.json").read_text())
    for method in ("gptq", "awq", "mxfp4", "bitsandbytes"):
        config["quantization_config"]["quant_method"] = method
        (tmp_path / "other" / "config.json").write_text(json.dumps(config))
        with pytest.raises(BadInput, match=rf"is quantised \({method}\)"):
            load_streamed(tmp_path / "other", resident=0.5)
