"""What every registered router and layer earns inside the transformers model: files, a cache, padding, and compilation."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from moesaic.core import registry
from moesaic.core.errors import BadInput

CAUSAL = [entry.name for entry in registry.entries("routing") if entry.causal]
LAYERS = [entry.name for entry in registry.entries("layers") if entry.causal]
GIVES = ["task_ids", "modality_ids", "language_ids", "class_ids", "timesteps"]
LAYER_OPTIONS = {"chain_of_experts": {"k": 2}, "monet": {"heads": 2}}
LAYER_EXPERTS = {"monet": 16}


def model_of(router=None, layer=None, **fields):
    """A tiny model whose routers tell tokens apart; bytes as tokens."""
    torch.manual_seed(0)
    given = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    given |= {"max_position_embeddings": 64, "experts": LAYER_EXPERTS.get(layer, 5), "initializer_range": 0.5, "gives": GIVES}
    given |= {"layer_options": LAYER_OPTIONS.get(layer, {})} if layer else {}
    config = AutoConfig.for_model("moesaic", router=router, layer=layer, **{**given, **fields})
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".moe." in name and parameter.dim() == 2:
                parameter.mul_(5)
    return model


def ids_given(batch):
    """One number per sequence for everything a caller may give, so that a router that needs it has it."""
    return {name: torch.arange(batch) % 2 for name in GIVES}


def methods():
    return [("router", name) for name in CAUSAL] + [("layer", name) for name in LAYERS]


@pytest.mark.parametrize(("kind", "name"), methods())
def test_saved_and_loaded_by_the_auto_class(kind, name, tmp_path):
    model = model_of(**{kind: name})
    for buffer_name, buffer in model.named_buffers():
        if buffer.is_floating_point():  # what a controller or a running mean has made of it
            buffer.add_(0.01 * torch.randn_like(buffer))
        elif buffer_name.endswith("model.step"):
            buffer.fill_(7)
    ids = torch.randint(0, 40, (2, 12))
    model.save_pretrained(tmp_path)
    other, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    assert int(other.model.step) == 7
    for (key, a), (_, b) in zip(model.state_dict().items(), other.state_dict().items(), strict=True):
        assert torch.equal(a, b), key
    given = ids_given(2)
    # A matrix that begins elsewhere in a cache line may round its last bit otherwise.
    torch.testing.assert_close(other(ids, **given).logits, model(ids, **given).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("kind", "name"), methods())
def test_decoding_with_a_cache_equals_the_whole_sequence(kind, name):
    model = model_of(**{kind: name})
    ids, given = torch.randint(0, 40, (2, 14)), ids_given(2)
    whole = model(ids, use_cache=False, **given).logits
    if model.model.no_cache:
        with pytest.raises(BadInput, match="cannot decode with a cache"):
            model(ids, use_cache=True, **given)
    else:
        out = model(ids[:, :6], use_cache=True, **given)
        parts = [out.logits]
        for part in ids[:, 6:].split([3, 1, 1, 1, 1, 1], 1):
            out = model(part, past_key_values=out.past_key_values, **given)
            parts.append(out.logits)
        torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-3, atol=1e-4)
    generated = model.generate(ids[:, :6], max_new_tokens=6, do_sample=False, **given)
    slow = ids[:, :6]
    for _ in range(6):
        slow = torch.cat([slow, model(slow, use_cache=False, **given).logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(generated, slow)


@pytest.mark.parametrize(("kind", "name"), methods())
def test_padding_in_front_changes_nothing(kind, name):
    model = model_of(**{kind: name})
    ids = torch.randint(0, 40, (2, 9))
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[1, :4] = 0
    together = model.generate(ids, attention_mask=mask, max_new_tokens=5, do_sample=False, **ids_given(2))
    for row, start in ((0, 0), (1, 4)):
        given = {key: value[row : row + 1] for key, value in ids_given(2).items()}
        alone = model.generate(ids[row : row + 1, start:], max_new_tokens=5, do_sample=False, **given)
        assert torch.equal(alone[0, -5:], together[row, -5:]), f"row {row}"


@pytest.mark.parametrize(("kind", "name"), methods())
def test_bfloat16_decodes_and_trains_under_autocast(kind, name):
    model, ids, given = model_of(**{kind: name}), torch.randint(0, 40, (2, 8)), ids_given(2)
    with torch.autocast("cpu", torch.bfloat16):
        model.train()(ids, labels=ids, **given).loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    half = model.to(torch.bfloat16).eval()
    assert half(ids, **given).logits.dtype == torch.bfloat16
    assert half.generate(ids, max_new_tokens=3, do_sample=False, **given).shape == (2, 11)
