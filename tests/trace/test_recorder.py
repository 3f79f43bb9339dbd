"""What is recorded is what ran: forward and generate, padded and packed, steered, cut short, and on every architecture."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch

import moesaic
from moesaic.core.errors import BadInput
from moesaic.trace.recorder import fingerprint
from moesaic.view import coverage, tiny


@pytest.fixture(scope="module")
def loaded(tiny_moe):
    return moesaic.load(tiny_moe, dtype="float32")


def watched(model, call):
    """Ids and weights per layer as the view's own hooks report them, and the trace of the same call."""
    blocks = moesaic.view(model)
    seen = [[] for _ in blocks]
    with moesaic.trace(model) as recorder:
        handles = [b.on_route(lambda r, block, i=i: seen[i].append(r) and None) for i, b in enumerate(blocks)]
        call()
        for handle in handles:
            handle.remove()
    return seen, recorder.result


def test_forward_rows_are_the_routing(loaded):
    ids = torch.randint(1, 200, (3, 17))
    seen, trace = watched(loaded.model, lambda: loaded.model(input_ids=ids))
    assert len(trace) == 51
    assert trace.lengths_S.tolist() == [17, 17, 17]
    assert trace.tokens_T.tolist() == ids.reshape(-1).tolist()
    for layer, routings in enumerate(seen):
        assert np.array_equal(trace.experts_TLK[:, layer], routings[0].experts_TK.numpy())
        assert np.allclose(trace.weights_TLK[:, layer], routings[0].weights_TK.detach().numpy(), atol=1e-3)
    assert trace.choices == 51 * 2 * 2


def test_the_watched_model_gives_the_same_output(loaded):
    ids = torch.randint(1, 200, (2, 9))
    before = loaded.model(input_ids=ids).logits
    with moesaic.trace(loaded.model, logits=True, lookahead=1, hidden=0.5):
        during = loaded.model(input_ids=ids).logits
    after = loaded.model(input_ids=ids).logits
    assert torch.equal(before, during)
    assert torch.equal(before, after)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in loaded.model.modules())


def test_generate_goes_on_with_its_sequences(loaded):
    prompts = torch.randint(1, 200, (2, 5))
    mask = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]])
    with moesaic.trace(loaded.model, domain=["one", "two"]) as recorder:
        out = loaded.model.generate(
            prompts, attention_mask=mask, max_new_tokens=6, min_new_tokens=6, do_sample=False, pad_token_id=299
        )
    trace = recorder.result
    assert trace.lengths_S.tolist() == [10, 8]  # the last token of an answer is never routed
    assert trace.runs_N4.tolist() == [[0, 0, 5, 5], [0, 1, 5, 1], [1, 0, 3, 3], [1, 1, 5, 1]]
    assert trace.tokens_T[:10].tolist() == out[0, :10].tolist()
    assert trace.tokens_T[10:].tolist() == out[1, 2:10].tolist()
    assert [trace.domains[d] for d in trace.domain_S] == ["one", "two"]
    assert trace.step_T[:10].tolist() == [0] * 5 + [1, 2, 3, 4, 5]


def test_rows_that_ended_are_padding(loaded):
    """A row that has ended is fed padding that the attention mask shows as real."""
    model, pad = loaded.model, 7
    held = model.generation_config.pad_token_id
    model.generation_config.pad_token_id = pad
    try:
        with moesaic.trace(model) as recorder:
            first = model(input_ids=torch.tensor([[3, 4], [5, 6]]), use_cache=True)
            mask = torch.ones(2, 3, dtype=torch.long)
            model(input_ids=torch.tensor([[9], [pad]]), attention_mask=mask, past_key_values=first.past_key_values)
    finally:
        model.generation_config.pad_token_id = held
    assert recorder.result.lengths_S.tolist() == [3, 2]


def test_a_cache_that_is_a_tuple_begins_new_sequences():
    """Old models and remote code hand keys and values on as tuples, which nothing can be remembered by."""
    from moesaic.trace.calls import Sequences, read_call

    tokens = torch.ones(2, 3, dtype=torch.long)
    call = read_call(None, (), {"input_ids": tokens, "past_key_values": ((tokens, tokens),)}, [])
    numbers = Sequences()
    assert call.continues
    assert numbers.rows(call, "", 2) == (range(2), True)
    numbers.keep(call.cache, "", range(2))
    assert numbers.rows(call, "", 2) == (range(2, 4), True)


def test_padding_is_not_recorded_and_rows_match_unpadded_runs(loaded):
    texts = [torch.randint(1, 200, (n,)) for n in (4, 9, 1)]
    ids, mask = torch.zeros(3, 9, dtype=torch.long), torch.zeros(3, 9, dtype=torch.long)
    for row, text in enumerate(texts):
        ids[row, : len(text)], mask[row, : len(text)] = text, 1
    with moesaic.trace(loaded.model, logits=True, hidden=1.0) as padded:
        loaded.model(input_ids=ids, attention_mask=mask)
    with moesaic.trace(loaded.model, logits=True, hidden=1.0) as alone:
        for text in texts:
            loaded.model(input_ids=text[None])
    one, two = padded.result, alone.result
    assert one.lengths_S.tolist() == two.lengths_S.tolist() == [4, 9, 1]
    assert np.array_equal(one.experts_TLK, two.experts_TLK)
    assert np.allclose(one.logits_TLE, two.logits_TLE, atol=2e-2)
    assert one.hidden_rows_H.tolist() == list(range(14))
    assert np.allclose(one.hidden_HLD, two.hidden_HLD, atol=2e-2)


def test_packed_sequences_are_told_apart(loaded):
    positions = torch.tensor([[0, 1, 2, 0, 1, 0, 1, 2, 3]])
    with moesaic.trace(loaded.model) as recorder:
        loaded.model(input_ids=torch.randint(1, 200, (1, 9)), position_ids=positions)
    assert recorder.result.lengths_S.tolist() == [3, 2, 4]


def test_what_a_policy_made_of_it_is_recorded(loaded):
    blocks = moesaic.view(loaded.model)
    ids = torch.randint(1, 200, (1, 12))
    with moesaic.trace(loaded.model) as recorder, blocks.policy(k=1):
        loaded.model(input_ids=ids)
    trace = recorder.result
    assert ((trace.experts_TLK == trace.empty).sum(-1) == 1).all()
    with moesaic.trace(loaded.model) as recorder, blocks.policy(without=[0]):
        loaded.model(input_ids=ids)
    assert not (recorder.result.experts_TLK == 0).any()


def test_look_ahead_is_the_next_router_on_this_layers_input(loaded):
    ids = torch.randint(1, 200, (1, 11))
    with moesaic.trace(loaded.model, lookahead=1, hidden=1.0) as recorder:
        loaded.model(input_ids=ids)
    trace = recorder.result
    assert trace.ahead_TLAM.shape == (11, 2, 1, 4)
    block = moesaic.view(loaded.model)[1]
    inputs = torch.tensor(np.asarray(trace.hidden_HLD[:, 0]), dtype=torch.float32)
    routing = block.route(inputs)
    foreseen = trace.ahead_TLAM[:, 0, 0]
    assert (np.sort(foreseen, 1) == np.arange(4)).all()
    agree = (foreseen[:, :2] == routing.experts_TK.numpy()).mean()
    assert agree > 0.95  # hidden states are kept in half precision: near ties may turn
    assert (trace.ahead_TLAM[:, 1] == trace.empty).all()


def test_training_with_recomputation_counts_once(loaded):
    model = loaded.model
    model.train()
    model.gradient_checkpointing_enable()
    try:
        ids = torch.randint(1, 200, (1, 8))
        with moesaic.trace(model) as recorder:
            model(input_ids=ids, labels=ids).loss.backward()
    finally:
        model.gradient_checkpointing_disable()
        model.eval()
        model.zero_grad()
    assert len(recorder.result) == 8


def test_threads_do_not_mix(loaded):
    texts = [torch.randint(1, 200, (1, n)) for n in (5, 9, 13, 7)]
    with moesaic.trace(loaded.model) as recorder:
        threads = [threading.Thread(target=loaded.model, kwargs={"input_ids": text}) for text in texts]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    trace = recorder.result
    found = {tuple(part) for part in np.split(np.asarray(trace.tokens_T), trace.starts_S1[1:-1])}
    assert found == {tuple(text[0].tolist()) for text in texts}


def test_a_pass_that_fails_leaves_no_half_rows(loaded):
    class Stop(Exception):
        pass

    def fail(*_):
        raise Stop

    ids = torch.randint(1, 200, (1, 6))
    with moesaic.trace(loaded.model) as recorder:
        loaded.model(input_ids=ids)
        handle = moesaic.view(loaded.model)[1].on_experts(fail)
        with pytest.raises(Stop):
            loaded.model(input_ids=ids)
        handle.remove()
        loaded.model(input_ids=ids)
    assert recorder.result.lengths_S.tolist() == [6, 6]


def test_blocks_run_by_hand_are_recorded_too(loaded):
    blocks = moesaic.view(loaded.model)
    with moesaic.trace(loaded.model) as recorder:
        loaded.model.model(input_ids=torch.randint(1, 200, (2, 5)))  # not through the model that was traced
        blocks[0].parent(torch.randn(1, 4, blocks[0].width))
    trace = recorder.result
    assert len(trace) == 14
    assert (trace.experts_TLK[10:, 1] == trace.empty).all()


def test_nothing_recorded_is_nothing_written(loaded, tmp_path):
    with moesaic.trace(loaded, tmp_path / "a.moetrace") as recorder:
        pass
    assert recorder.result is None
    assert list(tmp_path.iterdir()) == []


def test_header_names_the_model(loaded, tmp_path):
    with moesaic.trace(loaded, tmp_path / "a.moetrace", source="a text", name="mine") as recorder:
        loaded.model(input_ids=torch.ones(1, 3, dtype=torch.long))
    header = recorder.result.header
    assert (header.model, header.architecture, header.source) == ("mine", "Qwen3MoeForCausalLM", "a text")
    assert header.tokenizer == fingerprint(loaded.tokenizer) != ""
    assert [layer.experts for layer in header.layers] == [4, 4]
    assert header.layers[0].expert_bytes == 3 * 16 * 8 * 4
    total = sum(p.numel() * p.element_size() for p in loaded.model.parameters())
    assert header.resident_bytes == total - 2 * 4 * header.layers[0].expert_bytes


@pytest.mark.parametrize(
    ("options", "words"),
    [({"lookahead": 5}, "lookahead=5"), ({"hidden": 2.0}, "hidden=2.0"), ({"path": "/nowhere/a.moetrace"}, "/nowhere")],
)
def test_bad_options(loaded, options, words):
    with pytest.raises(BadInput, match=words):
        moesaic.trace(loaded, **options)


def test_a_dense_model_has_no_routing(tiny_dense):
    with pytest.raises(moesaic.core.errors.NotMoE):
        moesaic.trace(moesaic.load(tiny_dense, dense_ok=True))


def check_architecture(name):
    """Every block's choices in the trace, in the rows of its own stream, are those that the view reports."""
    torch.set_num_threads(1)
    architecture = next(a for a in tiny.architectures() if a.name == name)
    for model_class in tiny.model_classes(architecture):
        case = coverage.open_case(model_class, architecture)
        seen, trace = watched(case.model, case.run)
        for layer, routings in enumerate(seen):
            rows = (trace.experts_TLK[:, layer] != trace.empty).any(-1)
            want = torch.cat([r.experts_TK for r in routings]).numpy()
            assert np.array_equal(trace.experts_TLK[rows, layer], np.where(want < 0, trace.empty, want)), case.view[layer].name
        trace.check()


@pytest.mark.parametrize("name", ["qwen3_moe", "deepseek_v3", "gpt_oss", "qwen3_vl_moe"])
def test_architectures(name):
    if name not in {a.name for a in tiny.architectures()}:
        pytest.skip(f"transformers here has no {name} behind the experts decorator")
    check_architecture(name)


@pytest.mark.slow
def test_every_architecture():
    failed = {}
    for architecture in tiny.architectures():
        try:
            check_architecture(architecture.name)
        except Exception as error:
            failed[architecture.name] = f"{type(error).__name__}: {error}"
    assert not failed
