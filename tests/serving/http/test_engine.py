"""A request's text is its own: whatever joins and leaves the batch beside it, greedy text is that of model.generate."""

from __future__ import annotations

import threading

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from moesaic.core.errors import BadInput
from moesaic.serving.http.engine import Engine
from moesaic.serving.http.errors import ApiError
from moesaic.serving.http.jobs import Done, Failed, Job, Piece
from moesaic.serving.http.sampling import Options
from moesaic.serving.http.steering import Steering
from moesaic.view import load, view

PROMPTS = [
    "the router scores",
    "Ein Modell",
    "x",
    "The router scores every expert for every token, keeps the best",
    "def f(x): return",
    "нейронные",
]


def family(kind: str, vocabulary: int):
    """Small models whose caches differ: plain, sliding windows, sliding and full in turn, linear attention."""
    common = {
        "vocab_size": vocabulary, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 128, "initializer_range": 0.3,
        "eos_token_id": None, "bos_token_id": None, "pad_token_id": 0,
    }  # fmt: skip
    own = {
        "qwen3_moe": {"moe_intermediate_size": 16, "num_experts": 8, "num_experts_per_tok": 2, "norm_topk_prob": True},
        "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 6},
        "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 5},
        "deepseek_v3": {
            "moe_intermediate_size": 16, "n_routed_experts": 8, "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1,
            "num_key_value_heads": 4, "kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8,
            "v_head_dim": 8, "first_k_dense_replace": 1,
        },
        "qwen3_next": {
            "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16, "num_experts": 8, "num_experts_per_tok": 2,
            "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
        },
        "qwen3": {},
    }[kind]  # fmt: skip
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **{**common, **own})
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


class Answers:
    """Collects events of jobs; `then` may start further jobs in the middle of a run."""

    def __init__(self, engine):
        self.engine, self.texts, self.ends, self.pieces = engine, {}, {}, {}
        self.then = {}
        self.done = threading.Semaphore(0)

    def job(self, key, ids, options, **more):
        def deliver(event):
            if isinstance(event, Piece):
                at = (key, event.index)
                self.texts[at] = self.texts.get(at, "") + event.text
                self.pieces[at] = [*self.pieces.get(at, []), event]
                for start in self.then.pop((key, len(self.pieces[at])), ()):
                    start()
            else:
                self.ends[key] = event
                self.done.release()

        return Job(ids, options, deliver, **more)

    def wait(self, count):
        for _ in range(count):
            assert self.done.acquire(timeout=30), (self.ends, self.engine.running, self.engine.waiting)


@pytest.fixture
def made():
    """`made(model, tokenizer, ...)`: an engine of the test's own."""
    engines = []

    def make(model, tokenizer, **options):
        engine = Engine(model, tokenizer, threads=1, **options)
        engine.start()
        engines.append(engine)
        return engine

    yield make
    for engine in engines:
        engine.close()
        engine.join(20)
        assert not engine.alive


def alone(model, tokenizer, ids, tokens):
    """The text of model.generate on this request alone."""
    out = model.generate(
        torch.tensor([ids]), attention_mask=torch.ones(1, len(ids), dtype=torch.long), max_new_tokens=tokens,
        do_sample=False, pad_token_id=0,
    )  # fmt: skip
    return tokenizer.decode(out[0, len(ids) :], skip_special_tokens=True, clean_up_tokenization_spaces=False)


def greedy(tokens, **more):
    return Options(tokens, temperature=0.0, **more)


def ragged(engine, prompts, lengths):
    """Run all prompts so that each joins while earlier ones are in the middle, and leaves at its own time."""
    answers = Answers(engine)
    jobs = [answers.job(i, ids, greedy(n)) for i, (ids, n) in enumerate(zip(prompts, lengths, strict=True))]
    for i in range(1, len(jobs)):
        answers.then.setdefault((i - 1, 2), []).append(lambda job=jobs[i]: engine.submit([job]))
    engine.submit([jobs[0]])
    answers.wait(len(jobs))
    assert all(isinstance(end, Done) for end in answers.ends.values()), answers.ends
    assert [answers.ends[i].completion_tokens for i in range(len(jobs))] == lengths
    return [answers.texts[i, 0] for i in range(len(jobs))]


@pytest.mark.parametrize("kind", ["qwen3_moe", "mixtral", "gpt_oss", "deepseek_v3", "qwen3_next", "qwen3"])
def test_ragged_rows_write_what_they_write_alone(kind, tiny, made):
    tokenizer = tiny.tokenizer
    model = family(kind, len(tokenizer))
    prompts = [tokenizer(text)["input_ids"] for text in PROMPTS]
    lengths = [30, 9, 21, 14, 40, 6]
    engine = made(model, tokenizer, max_rows=4)
    assert ragged(engine, prompts, lengths) == [alone(model, tokenizer, p, n) for p, n in zip(prompts, lengths, strict=True)]
    meter = engine.meter
    shared = kind != "qwen3_next"  # linear attention keeps states that padding would enter: its rows run side by side
    assert (meter.stepped_rows > meter.steps) == shared
    assert meter.completion_tokens == sum(lengths)


def test_the_bundled_model_in_its_own_dtype_is_bitwise_alone(made):
    model, tokenizer = load("bundled")
    assert model.dtype is torch.bfloat16
    prompts = [tokenizer(text)["input_ids"] for text in ("Once upon a time", "def main():", "It was", "The sea")]
    lengths = [24, 12, 18, 9]
    texts = ragged(made(model, tokenizer, alone=True), prompts, lengths)
    assert texts == [alone(model, tokenizer, p, n) for p, n in zip(prompts, lengths, strict=True)]


def test_the_order_of_experts_is_per_row(tiny, made):
    """Neighbours with other policies change nothing; each text is that of a run under its policy alone."""
    model, tokenizer = tiny
    blocks = view(model)
    ids = tokenizer("the router")["input_ids"]
    wanted = [{"k": 1}, {"without": [0, 1]}, None, {"bias": [5.0, 0, 0, 0]}, {"k": {"0": 3}}, {"force": [2, 1]}, {"k": 1}]
    engine = made(model, tokenizer)
    answers = Answers(engine)
    engine.submit(
        [answers.job(i, ids, greedy(12), steering=fields and Steering(fields, blocks)) for i, fields in enumerate(wanted)]
    )
    answers.wait(len(wanted))
    assert engine.meter.stepped_rows > engine.meter.steps
    for i, fields in enumerate(wanted):
        if fields and "force" in fields:
            continue  # view's own force takes ids for every token of a call: checked below
        fields = {k: {0: v["0"]} if isinstance(v, dict) else v for k, v in (fields or {}).items()}
        with blocks.policy(**fields):
            assert answers.texts[i, 0] == alone(model, tokenizer, ids, 12), fields
    assert len({answers.texts[i, 0] for i in range(6)}) > 3, "the policies have an effect"
    assert answers.texts[0, 0] == answers.texts[6, 0]


def test_forced_experts_are_the_only_ones(tiny, made):
    model, tokenizer = tiny
    engine = made(model, tokenizer)
    seen = []
    answers = Answers(engine)
    steering = Steering({"force": {"0": [2, 1], "1": [3]}}, engine.blocks)
    with engine.blocks.on_route(lambda routing, block: seen.append((block.layer, routing.experts_TK.clone()))):
        engine.submit([answers.job(0, tokenizer("abc")["input_ids"], greedy(4), steering=steering)])
        answers.wait(1)
    assert isinstance(answers.ends[0], Done)
    assert {tuple(ids.reshape(-1).unique().tolist()) for layer, ids in seen if layer == 0} == {(1, 2)}
    assert {tuple(ids[ids >= 0].unique().tolist()) for layer, ids in seen if layer == 1} == {(3,)}


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        ({"k": 9}, "cannot choose 9"), ({"without": [4]}, "experts 0 to 3"), ({"without": [0, 1, 2]}, "cannot choose 2"),
        ({"k": {"7": 1}}, "no MoE block 7"), ({"bias": [1.0]}, "4 experts"), ({"force": [1, 1]}, "twice"),
        ({"force": [9]}, "0 to 3"), ({"mask": [True]}, "4 experts"),
    ],
)  # fmt: skip
def test_a_routing_that_cannot_be_is_refused(tiny, fields, complaint):
    with pytest.raises(BadInput, match=complaint):
        Steering(fields, view(tiny.model))


def test_a_seed_is_the_same_text_in_any_company(tiny, made):
    model, tokenizer = tiny
    ids = [tokenizer(text)["input_ids"] for text in PROMPTS]
    options = Options(20, temperature=1.0, seed=7, top_p=0.9, top_k=50, frequency_penalty=0.5, presence_penalty=0.3)
    engine = made(model, tokenizer)
    by_itself, crowded = Answers(engine), Answers(engine)
    engine.submit([by_itself.job(0, ids[0], options)])
    by_itself.wait(1)
    others = [crowded.job(i, ids[i], Options(10 + i, temperature=1.3, seed=i)) for i in range(1, 6)]
    engine.submit([*others[:3], crowded.job(0, ids[0], options), *others[3:]])
    crowded.wait(6)
    assert by_itself.texts[0, 0] == crowded.texts[0, 0]
    assert len(set(crowded.texts.values())) == 6


def test_n_answers_draw_with_their_own_seeds(tiny, made):
    model, tokenizer = tiny
    ids = tokenizer("the")["input_ids"]
    engine = made(model, tokenizer)
    answers = Answers(engine)
    engine.submit([answers.job("three", ids, Options(12, seed=40), n=3), answers.job("one", ids, Options(12, seed=42))])
    answers.wait(2)
    assert len({answers.texts["three", i] for i in range(3)}) == 3
    assert answers.texts["three", 2] == answers.texts["one", 0], "answer i draws with seed + i"
    assert answers.ends["three"] == Done(len(ids), 36)


def test_unmergeable_answers_of_one_prompt_have_caches_of_their_own(tiny, made):
    tokenizer = tiny.tokenizer
    model = family("qwen3_next", len(tokenizer))
    ids = tokenizer("the router")["input_ids"]
    engine = made(model, tokenizer)
    answers = Answers(engine)
    engine.submit([answers.job(0, ids, Options(10, seed=1), n=3)])
    engine.submit([answers.job(i, ids, Options(10, seed=i)) for i in (1, 2, 3)])
    answers.wait(4)
    assert [answers.texts[0, i] for i in range(3)] == [answers.texts[i, 0] for i in (1, 2, 3)]


def test_a_cancelled_row_is_free_at_the_next_step(tiny, made):
    model, tokenizer = tiny
    ids = tokenizer("the router")["input_ids"]
    engine = made(model, tokenizer, max_rows=2)
    answers = Answers(engine)
    long = answers.job("long", ids, greedy(50, ignore_eos=True))
    answers.then["long", 3] = [lambda: engine.cancel([long])]
    engine.submit([long, answers.job("b", ids, greedy(20)), answers.job("c", ids, greedy(5))])
    answers.wait(3)
    assert isinstance(answers.ends["long"], Failed)
    assert len(answers.pieces["long", 0]) == 3, "nothing was written after the cancellation"
    assert answers.texts["b", 0] == alone(model, tokenizer, ids, 20)
    assert engine.meter.outcomes == {"cancelled": 1, "done": 2}
    assert not engine.running


def test_a_late_request_fails_alone(tiny, made):
    model, tokenizer = tiny
    ids = tokenizer("the router")["input_ids"]
    engine = made(model, tokenizer, max_rows=1)
    answers = Answers(engine)
    late = answers.job("late", ids, greedy(5), timeout=0.0)
    engine.submit([answers.job("a", ids, greedy(5)), late, answers.job("b", ids, greedy(5))])
    answers.wait(3)
    assert answers.ends["late"].error.status == 408
    assert answers.texts["a", 0] == answers.texts["b", 0]


def test_a_full_queue_says_when_to_come_back(tiny, made):
    model, tokenizer = tiny
    ids = tokenizer("the router")["input_ids"]
    engine = made(model, tokenizer, max_rows=1, max_waiting=2)
    answers = Answers(engine)
    with pytest.raises(ApiError) as refused:
        engine.submit([answers.job(i, ids, greedy(5)) for i in range(4)])
    assert (refused.value.status, refused.value.code) == (429, "queue_full")
    assert 1 <= refused.value.retry_after <= 60
    engine.submit([answers.job(i, ids, greedy(5)) for i in range(3)])
    answers.wait(3)
    assert engine.meter.outcomes == {"refused": 1, "done": 3}


def test_a_model_that_fails_takes_down_no_other_request(tiny, made, monkeypatch):
    model, tokenizer = tiny
    engine = made(model, tokenizer)
    answers = Answers(engine)
    ids = tokenizer("the router")["input_ids"]
    forward = model.forward

    def failing(*arguments, **given):
        if given["input_ids"].shape[1] == len(ids) + 1:
            raise RuntimeError("out of memory, say")
        return forward(*arguments, **given)

    monkeypatch.setattr(model, "forward", failing)
    engine._runner._takes = {"input_ids", "attention_mask", "position_ids", "past_key_values", "use_cache"}
    engine.submit([answers.job("a", ids, greedy(20)), answers.job("bad", [*ids, 1], greedy(5))])
    answers.wait(2)
    monkeypatch.undo()
    assert answers.ends["bad"].error.status == 500
    assert answers.texts["a", 0] == alone(model, tokenizer, ids, 20)


def test_closing_lets_the_running_finish_and_fails_the_rest(tiny):
    model, tokenizer = tiny
    ids = tokenizer("the router")["input_ids"]
    engine = Engine(model, tokenizer, threads=1, max_rows=1)
    engine.start()
    answers = Answers(engine)
    answers.then["a", 2] = [lambda: engine.close(20)]
    engine.submit([answers.job("a", ids, greedy(15)), answers.job("b", ids, greedy(4))])
    answers.wait(2)
    assert all(isinstance(end, Done) for end in answers.ends.values())
    engine.join(10)
    assert not engine.alive
    with pytest.raises(ApiError, match="shutting down"):
        engine.submit([answers.job("c", ids, greedy(4))])


def test_closing_at_once_answers_everyone(tiny):
    model, tokenizer = tiny
    ids = tokenizer("the router")["input_ids"]
    engine = Engine(model, tokenizer, threads=1, max_rows=1)
    engine.start()
    answers = Answers(engine)
    answers.then["a", 2] = [lambda: engine.close(0)]
    engine.submit([answers.job("a", ids, greedy(40, ignore_eos=True)), answers.job("b", ids, greedy(4))])
    future = engine.call(lambda: 1)
    answers.wait(2)
    assert [answers.ends[k].error.status for k in "ab"] == [503, 503]
    assert future.exception(10) is not None or future.result() == 1
    engine.join(10)
    assert not engine.alive


def test_expert_use_counts_every_token_once(tiny, made):
    model, tokenizer = tiny
    engine = made(model, tokenizer)
    answers = Answers(engine)
    prompts = [tokenizer(text)["input_ids"] for text in PROMPTS[:3]]
    engine.submit([answers.job(i, ids, greedy(6, ignore_eos=True)) for i, ids in enumerate(prompts)])
    answers.wait(3)
    fed = sum(map(len, prompts)) + 3 * 5  # the last token of an answer is never read
    for layer in engine.meter.load.read():
        assert sum(layer["total"]) == 2 * fed, "padding is routed nowhere"


def test_rank_threshold_and_logits_are_per_row(tiny, made):
    """Fields that act on what is scored and on what was chosen, among neighbours: each text is that of a run alone."""
    model, tokenizer = tiny
    blocks = view(model)
    ids = tokenizer("the router")["input_ids"]
    wanted = [
        {"rank": 2},
        {"threshold": 0.45},
        None,
        {"logits": {"1": [3.0, 0, 0, -2.0]}},
        {"rank": {"0": 3}, "threshold": 0.1},
    ]
    engine = made(model, tokenizer)
    answers = Answers(engine)
    engine.submit(
        [answers.job(i, ids, greedy(12), steering=fields and Steering(fields, blocks)) for i, fields in enumerate(wanted)]
    )
    answers.wait(len(wanted))
    assert engine.meter.stepped_rows > engine.meter.steps
    for i, fields in enumerate(wanted):
        fields = {k: {int(n): x for n, x in v.items()} if isinstance(v, dict) else v for k, v in (fields or {}).items()}
        with blocks.policy(**fields):
            assert answers.texts[i, 0] == alone(model, tokenizer, ids, 12), fields
