"""Streaming is exact and is what the replay says: logits and tokens bit by bit, hits to the count, memory to the budget."""

from __future__ import annotations

import errno
import os
import threading
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import moesaic
from moesaic.core.errors import BadInput, MissingNeed
from moesaic.serving.streamed import expert_parameters, load_streamed
from moesaic.store import Reader, ReadFailed
from moesaic.trace.replay import replay
from moesaic.trace.sweep import build
from moesaic.view import load, quiet, tiny
from moesaic.view.coverage import first_floats

FAST = ["gpt_oss", "ernie4_5_vl_moe", "inkling2"]
"""Stacked, biased, transposed and interleaved; per expert, two banks in one list; rows permuted."""

SHARES = (0.1, 0.4, 1.0)
POLICIES = ("none", "lru", "lfu", "slru", "static:mask=uniform", "lru:scope=global")
ODD_FLOATS = {"openai_privacy_filter", "qwen3_omni_moe"}
"""Their tiny models do not run in bfloat16, streamed or not."""


@pytest.fixture(autouse=True)
def silent():
    with quiet():
        yield


def run(model, inputs):
    with torch.no_grad():
        return first_floats(model(**inputs))


def check(name, folder, dtypes, policies):
    """Streamed equals resident on every model class of an architecture, in each dtype, share and policy."""
    architecture = next(a for a in tiny.architectures() if a.name == name)
    for model_class in tiny.model_classes(architecture):
        model = tiny.build(model_class)
        model.save_pretrained(folder)
        inputs = tiny.inputs(model)
        for dtype in dtypes:
            expected = run(load(folder, dtype=dtype).model, inputs)
            assert torch.isfinite(expected).all()
            for share in SHARES:
                for policy in policies:
                    try:
                        streamed = load_streamed(folder, resident=share, policy=policy, dtype=dtype, page_cache="keep")
                    except BadInput as error:  # one MoE layer of eight experts: a tenth is less than one
                        if share > 0.1 or "is too small: one expert to stream through takes" not in str(error):
                            raise
                        continue
                    with streamed:
                        routed = expert_parameters(streamed.model)
                        assert all(p.is_meta == (n in routed) for n, p in streamed.model.named_parameters())
                        for _ in range(2):
                            assert torch.equal(run(streamed.model, inputs), expected), (model_class, dtype, share, policy)
                        assert streamed.engine.held_bytes <= streamed.engine.plan.budget_bytes + slack(streamed.engine)


def slack(engine):
    """Room to begin anywhere in a cache line."""
    return sum(slots.count * 2 * 128 for slots in engine._slots.values())


@pytest.mark.parametrize("name", FAST)
def test_logits_are_bitwise_equal(name, tmp_path):
    check(name, tmp_path, ["auto"], ["lru:scope=global", "none"])


def test_as_stored_and_cast_while_reading(tmp_path):
    check("qwen3_moe", tmp_path, ["auto", "bfloat16"], ["lru"])


@pytest.mark.slow
@pytest.mark.parametrize("name", [a.name for a in tiny.architectures()])
def test_every_architecture_is_bitwise_equal(name, tmp_path):
    check(name, tmp_path, ["auto"] if name in ODD_FLOATS else ["auto", "bfloat16"], POLICIES)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Four layers of eight experts large enough for the compiled passes, in bf16, and the resident model's answers."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    folder = tmp_path_factory.mktemp("compiled")
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=300, hidden_size=512, intermediate_size=64, moe_intermediate_size=256, num_hidden_layers=4, num_experts=8,
        num_attention_heads=4, num_key_value_heads=2, head_dim=32, num_experts_per_tok=2, initializer_range=0.1,
    )  # fmt: skip
    Qwen3MoeForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    model = load(folder).model
    ids = torch.randint(0, 300, (1, 33))
    with torch.no_grad():
        return SimpleNamespace(folder=folder, ids=ids, logits=model(ids).logits, tokens=answer(model, ids))


def answer(model, ids, tokens=16):
    return model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False, pad_token_id=0, eos_token_id=None
    )


def cases(policies, shares, every):
    """All pairs, of which one in `every` is fast."""
    pairs = [(policy, share) for policy in policies for share in shares]
    return [pytest.param(*pair, marks=[pytest.mark.slow] if i % every else []) for i, pair in enumerate(pairs)]


@pytest.mark.parametrize(("policy", "share"), cases(POLICIES, SHARES, 7))
def test_the_compiled_passes_are_bitwise_equal(checkpoint, share, policy):
    with load_streamed(checkpoint.folder, resident=share, policy=policy) as streamed:
        with torch.no_grad():
            assert torch.equal(streamed.model(checkpoint.ids).logits, checkpoint.logits)
        assert torch.equal(answer(streamed.model, checkpoint.ids), checkpoint.tokens)
        stats = streamed.stats
        size = streamed.engine.layers[0].bytes_E[0]
        missed = stats.accesses - stats.hits
        assert stats.read_bytes == missed * size
        assert stats.stall_seconds > 0 or not missed
        assert streamed.engine.held_bytes <= streamed.engine.plan.budget_bytes


REPLAYED = [*POLICIES, "lru:bypass_tokens=8", "lfu:half_life=4"]


@pytest.mark.parametrize(("policy", "share"), cases(REPLAYED, (0.1, 0.3, 0.6, 1.0), 9))
def test_hits_are_those_of_the_replay(checkpoint, tmp_path, policy, share):
    """Record what the streamed model does; the simulator, with the same policy and capacity, counts the same."""
    streamed = load_streamed(checkpoint.folder, resident=share, policy=policy)
    with streamed, moesaic.trace(streamed.model, tmp_path / "live.moetrace") as recorder:
        answer(streamed.model, checkpoint.ids, 12)
        answer(streamed.model, checkpoint.ids.flip(1)[:, :5], 4)
    live, simulated = streamed.stats, replay(recorder.result, build(policy), streamed.engine.plan.capacity_bytes)
    from moesaic.serving.streamed import stats as C
    from moesaic.trace import simulate as sim

    assert live.passes == simulated.mark[sim.PASSES] == 16
    for ours, theirs in ((C.ACCESSES, sim.ACCESSES), (C.HITS, sim.HITS), (C.LOADS, sim.LOADS), (C.STREAMS, sim.STREAMS),
                         (C.EVICTIONS, sim.EVICTIONS)):  # fmt: skip
        assert np.array_equal(live.count_CL[ours], simulated.count_CL[theirs]), (ours, theirs)
    assert live.hit_rate == simulated.hit_rate
    assert live.read_bytes == simulated.moved_bytes
    assert live.preloaded_bytes == simulated.preloaded_bytes


def test_a_prompt_reads_each_expert_once_per_layer(checkpoint):
    with load_streamed(checkpoint.folder, resident=0.1, policy="none") as streamed:
        run(streamed.model, {"input_ids": checkpoint.ids})
        asked = streamed.stats.accesses
        assert 24 < asked <= 32  # of 66 choices in each of 4 layers of 8 experts: nearly all of them, each once
        assert streamed.stats.read_bytes == asked * streamed.engine.layers[0].bytes_E[0]


def test_outside_of_the_model_and_under_hooks(checkpoint):
    """A bank that is run by hand, steered routing and a batch go through the same engine."""
    resident = load(checkpoint.folder).model
    ids = checkpoint.ids[:, :32].reshape(4, 8)
    with load_streamed(checkpoint.folder, resident=0.3) as streamed, torch.no_grad():
        ours, theirs = moesaic.view(streamed.model), moesaic.view(resident)
        x, offsets = torch.randn(16, 512).bfloat16(), torch.arange(0, 17, 2)
        assert torch.equal(ours[2].bank(x, offsets), theirs[2].bank(x, offsets))
        with ours.policy(k=1, without=[3]), theirs.policy(k=1, without=[3]):
            assert torch.equal(streamed.model(ids).logits, resident(ids).logits)
        assert torch.equal(streamed.model(ids).logits, resident(ids).logits)
        with pytest.raises(BadInput, match="meta device"):
            _ = ours[0].bank[0]
    with pytest.raises(BadInput, match="no backward"):
        streamed.model(ids)


def test_two_threads_take_turns(checkpoint):
    with load_streamed(checkpoint.folder, resident=0.3) as streamed:
        found = []
        threads = [
            threading.Thread(target=lambda: found.append(run(streamed.model, {"input_ids": checkpoint.ids}))) for _ in range(3)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert all(torch.equal(logits, checkpoint.logits) for logits in found)
        assert len(found) == 3


class Faults:
    """os.preadv with a fault that can be switched on."""

    def __init__(self):
        self.fault = None

    def __call__(self, fd, buffers, offset):
        return os.preadv(fd, buffers, offset) if self.fault is None else self.fault(fd, buffers, offset)


def broken(fd, buffers, offset):
    raise OSError(errno.EIO, os.strerror(errno.EIO))


def short(fd, buffers, offset):
    return 0


@pytest.mark.parametrize(("fault", "words"), [(broken, "Input/output error"), (short, "the file ends")])
@pytest.mark.parametrize("policy", ["lru", "none"])
def test_a_failed_read_names_the_expert_and_leaves_no_wrong_weights(checkpoint, fault, words, policy):
    faults = Faults()
    reader = Reader("keep", read_at=faults)
    with load_streamed(checkpoint.folder, resident=0.4, policy=policy, reader=reader) as streamed:
        run(streamed.model, {"input_ids": checkpoint.ids[:, :2]})
        faults.fault = fault
        with pytest.raises(ReadFailed, match=rf"safetensors at byte \d+ \(tensor .*experts\.\d\..*{words}"):
            run(streamed.model, {"input_ids": checkpoint.ids})
        faults.fault = None
        assert torch.equal(run(streamed.model, {"input_ids": checkpoint.ids}), checkpoint.logits)


def test_a_hanging_read_is_an_error_and_late_bytes_do_no_harm(checkpoint):
    faults, release = Faults(), threading.Event()

    def hang(fd, buffers, offset):
        release.wait(30)
        buffers[0][:] = bytes(len(buffers[0]))
        return len(buffers[0])

    reader = Reader("keep", threads=2, timeout=0.3, read_at=faults)
    with load_streamed(checkpoint.folder, resident=0.4, reader=reader) as streamed:
        faults.fault = hang
        with pytest.raises(ReadFailed, match=r"no answer for 0\.3 s"):
            run(streamed.model, {"input_ids": checkpoint.ids})
        faults.fault = None
        release.set()
        for _ in range(2):
            assert torch.equal(run(streamed.model, {"input_ids": checkpoint.ids}), checkpoint.logits)


@pytest.mark.parametrize("mode", ["direct", "keep", "drop"])
def test_a_shard_cut_short_while_serving(checkpoint, tmp_path, mode):
    import shutil

    folder = tmp_path / "copy"
    shutil.copytree(checkpoint.folder, folder)
    with load_streamed(folder, resident=0.2, page_cache=mode) as streamed:
        assert torch.equal(run(streamed.model, {"input_ids": checkpoint.ids}), checkpoint.logits)
        os.truncate(folder / "model.safetensors", 1 << 20)
        with pytest.raises(ReadFailed, match=r"model\.safetensors at byte .* cut short"):
            run(streamed.model, {"input_ids": checkpoint.ids})


def test_shards_stream(tiny_moe, tmp_path):
    model = load(tiny_moe).model
    model.save_pretrained(tmp_path, max_shard_size="8KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    ids = torch.randint(0, 200, (1, 9))
    with load_streamed(tmp_path, resident=0.5) as streamed:
        assert torch.equal(run(streamed.model, {"input_ids": ids}), run(load(tmp_path).model, {"input_ids": ids}))


def refused(words, folder="bundled", kind=BadInput, **how):
    with pytest.raises(kind, match=words):
        load_streamed(folder, **how)


def test_what_is_refused(tiny_moe, tiny_dense, tmp_path):
    refused("give either a memory budget", memory=5, resident=0.4)
    refused("give either a memory budget")
    refused("a resident share of 1.5", resident=1.5)
    refused("a resident share of 0", resident=0)
    refused("a memory budget of 0", memory=0)
    refused("memory 'much' is no size", memory="much")
    refused(r"1000 B is too small: one expert to stream through takes 144 KiB \(147456 bytes\)", memory=1000)
    refused("page cache 'fast'", memory=10**6, page_cache="fast")
    refused("no policies method 'best'", resident=0.5, policy="best")
    refused("policy belady needs future", kind=MissingNeed, resident=0.5, policy="belady")
    refused("policy expertflow needs tokens", kind=MissingNeed, resident=0.5, policy="expertflow")
    refused("learns from earlier routing|counts earlier routing", kind=MissingNeed, resident=0.5, policy="static")
    refused("runs experts on a host", resident=0.5, policy="static:mask=uniform+host=true")
    refused("only the replay does that", resident=0.5, policy="none:dense=true")
    refused("no Mixture-of-Experts block", folder=tiny_dense, resident=0.5)
    refused("no such model folder", folder=tmp_path / "gone", resident=0.5)


def test_a_quantised_checkpoint_is_refused(tiny_moe, tmp_path):
    import json
    import shutil

    shutil.copytree(tiny_moe, tmp_path / "q")
    config = json.loads((tmp_path / "q" / "config.json").read_text())
    (tmp_path / "q" / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "gptq"}}))
    refused(r"is quantised \(gptq\): experts stream", folder=tmp_path / "q", resident=0.5)


def rewrite(folder, target, change):
    """A copy of a checkpoint whose tensors went through `change(name, tensor)`; None leaves one out."""
    import shutil

    from safetensors.torch import load_file, save_file

    shutil.copytree(folder, target)
    tensors = {name: change(name, tensor) for name, tensor in load_file(target / "model.safetensors").items()}
    save_file({n: t for n, t in tensors.items() if t is not None}, target / "model.safetensors", {"format": "pt"})
    return target


def test_experts_that_do_not_fit_are_named(tiny_moe, tmp_path):
    def fp8(name, tensor):
        return tensor.to(torch.float8_e4m3fn) if "experts.1.up" in name else tensor

    def missing(name, tensor):
        return None if "layers.1.mlp.experts.2.up" in name else tensor

    def wider(name, tensor):
        return torch.cat([tensor, tensor]) if "experts.3.gate" in name else tensor

    refused(r"experts\.1\.up_proj\.weight is float8_e4m3fn", folder=rewrite(tiny_moe, tmp_path / "a", fp8), resident=0.5)
    refused(
        r"3 tensors such as model\.layers\.1\.mlp.* for 4 experts",
        folder=rewrite(tiny_moe, tmp_path / "b", missing),
        resident=0.5,
    )
    refused(
        r"tensor .*experts\.3\.gate_proj\.weight is \[16, 16\]", folder=rewrite(tiny_moe, tmp_path / "c", wider), resident=0.5
    )
