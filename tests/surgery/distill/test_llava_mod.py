"""LLaVA-MoD on text: what its card says must hold, its stages, and the command."""

from __future__ import annotations

import json
import math

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import moesaic
from moesaic.cli.main import main
from moesaic.core.errors import BadInput
from moesaic.surgery.distill.llava_mod import LLaVAMoD, Mimic
from moesaic.surgery.distillation import (
    IGNORED,
    Answers,
    dpo,
    kto_pair,
    mimic_loss,
    predicting,
    read_answers,
    read_preferences,
    response_log_probs,
)
from moesaic.surgery.objective import Given
from moesaic.surgery.upcycle.sparse import sparse
from moesaic.view import view

IDS = torch.tensor([[3, 1, 4, 1, 5, 9, 2], [6, 5, 3, 5, 8, 9, 7]])


def dense(kind="qwen3", **fields):
    torch.manual_seed(0)
    given = {"vocab_size": 100, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4}
    given |= {"num_key_value_heads": 2, "max_position_embeddings": 64, "initializer_range": 0.3, "head_dim": 8, **fields}
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **given)).eval()


@pytest.mark.parametrize(("kind", "every"), [("qwen3", 2), ("qwen3", 1), ("qwen2", 2), ("llama", 1), ("mistral", 1)])
def test_right_after_upcycling_the_student_answers_as_before(kind, every):
    model = dense(kind)
    made = sparse(model, experts=4, k=2, every=every)
    torch.testing.assert_close(made(IDS).logits, model(IDS).logits, rtol=1e-4, atol=1e-4)
    blocks = view(made)
    assert [block.layer for block in blocks] == [i for i in range(4) if (i + 1) % every == 0]
    assert all(block.num_experts == 4 and block.top_k == 2 for block in blocks)
    weight = blocks[0].router.weight
    assert 0.005 < weight.std() < 0.05 and not torch.equal(weight[0], weight[1])


def test_upcycling_keeps_dtype_and_the_seed_draws_the_routers():
    model = dense().to(torch.bfloat16)
    one, same, other = (sparse(model, 4, 2, 2, seed=seed) for seed in (1, 1, 2))
    assert {p.dtype for p in one.parameters()} == {torch.bfloat16}
    rows = [view(made)[0].router.weight for made in (one, same, other)]
    assert torch.equal(rows[0], rows[1]) and not torch.equal(rows[0], rows[2])


@pytest.mark.parametrize(
    ("kind", "how", "says"),
    [
        ("gpt2", {}, "no stock MoE"),
        ("mistral", {"every": 2, "sliding_window": 8}, "becomes mixtral only"),
        ("llama", {"every": 1, "attention_bias": True}, "no place|bias"),
        ("qwen3", {"k": 9}, "k=9"),
        ("qwen3", {"every": 9}, "has 4 layers"),
    ],
)
def test_what_cannot_be_upcycled_is_refused(kind, how, says):
    fields = {name: how.pop(name) for name in list(how) if name in ("attention_bias", "sliding_window")}
    model = dense(kind, **fields) if kind != "gpt2" else AutoModelForCausalLM.from_config(
        AutoConfig.for_model("gpt2", vocab_size=50, n_embd=16, n_layer=1, n_head=2)
    )  # fmt: skip
    with pytest.raises(BadInput, match=says):
        sparse(model, **{"experts": 4, "k": 2, **how})


def test_the_gradient_of_the_mimic_is_0_where_student_and_teacher_agree():
    teacher_BNV = torch.randn(2, 5, 11)
    student_BNV = (teacher_BNV + torch.randn(2, 5, 1)).requires_grad_()  # the same distribution
    mimic_loss(student_BNV, teacher_BNV, IDS[:, :5]).backward()
    assert student_BNV.grad.abs().max() < 1e-6
    other_BNV = torch.randn(2, 5, 11, requires_grad=True)
    mimic_loss(other_BNV, teacher_BNV, IDS[:, :5]).backward()
    assert other_BNV.grad[:, :-1].abs().max() > 1e-3


def test_positions_count_that_predict_response_tokens_and_vocabularies_are_cut_to_the_common():
    labels_BN = torch.tensor([[IGNORED, IGNORED, 5, 6, IGNORED]])
    assert predicting(labels_BN).tolist() == [[False, True, True, False]]
    student_BNV, teacher_BNV = torch.randn(1, 5, 13, requires_grad=True), torch.randn(1, 5, 11)
    loss = mimic_loss(student_BNV, teacher_BNV, labels_BN)
    want = 0.0
    for n in (1, 2):
        want = want - (teacher_BNV[0, n].softmax(-1) * student_BNV[0, n, :11].log_softmax(-1)).sum() / 2
    torch.testing.assert_close(loss, want)
    loss.backward()
    assert student_BNV.grad.abs().sum((0, 2)).ne(0).tolist() == [False, True, True, False, False]
    assert not student_BNV.grad[..., 11:].any()


def test_preferences_at_no_change():
    zeros = torch.zeros(5)
    assert kto_pair(zeros, zeros, 0.1).item() == 0.5
    assert dpo(zeros + 3, zeros + 3, 0.1).item() == pytest.approx(math.log(2))
    chosen, rejected = torch.tensor([2.0, -1.0]), torch.tensor([-3.0, 1.0])
    kl_c, kl_r, s = 0.5, 0.0, torch.sigmoid
    want = torch.cat([1 - s(0.3 * (chosen - kl_r)), 1 - s(0.3 * (kl_c - rejected))]).mean()
    torch.testing.assert_close(kto_pair(chosen, rejected, 0.3), want)


def test_response_log_probs_see_the_response_alone():
    model = dense()
    labels_BN = IDS.clone()
    labels_BN[:, :3] = IGNORED
    log_p = model(IDS).logits[:, :-1].log_softmax(-1)
    want = torch.stack([sum(log_p[b, n, IDS[b, n + 1]] for n in range(2, 6)) for b in range(2)])
    torch.testing.assert_close(response_log_probs(model, IDS, labels_BN), want)


def test_the_load_loss_and_the_language_loss_join_the_mimic():
    teacher, student = dense(), sparse(dense(), 4, 2, 2)
    given = Given(None, teacher=teacher)
    values = {}
    for lm, aux in ((0, 0), (1, 0), (0, 0.5)):
        stage = Mimic(lm, aux, "moe")
        learn = stage.prepare(student, given)
        values[lm, aux] = stage.loss(student, {"text": IDS})
    names = {id(p): name for name, p in student.named_parameters()}
    assert {names[id(p)].split(".")[2] for p in learn} == {"1", "3"} and all(".mlp." in names[id(p)] for p in learn)
    plain = torch.nn.functional.cross_entropy(student(IDS).logits[:, :-1].flatten(0, 1), IDS[:, 1:].flatten())
    torch.testing.assert_close(values[1, 0] - values[0, 0], plain)
    aux = student(IDS, output_router_logits=True).aux_loss
    torch.testing.assert_close(values[0, 0.5] - values[0, 0], 0.5 * aux)


@pytest.fixture
def pairs_file(tmp_path):
    file = tmp_path / "pairs.jsonl"
    rows = [{"prompt": f"Say {i}:", "chosen": f" it is {i}.", "rejected": " no!", "response": f" {i}"} for i in range(5)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def test_answers_mask_their_prompts(tiny_tokenizer, pairs_file):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(tiny_tokenizer))
    rows = read_preferences(pairs_file, tokenizer, 40).rows(3, 4)
    assert rows.keys() == {"chosen_ids", "chosen_labels", "rejected_ids", "rejected_labels"}
    for ids, labels in zip(rows["chosen_ids"], rows["chosen_labels"], strict=True):
        kept = labels != IGNORED
        assert torch.equal(ids[kept], labels[kept]) and "it is" in tokenizer.decode(ids[kept])
        assert "Say" not in tokenizer.decode(ids[kept]) and labels[kept][-1] == tokenizer.eos_token_id
    one = read_answers(pairs_file, tokenizer, 40).rows(0, 2)
    assert one.keys() == {"ids", "labels"}
    with pytest.raises(BadInput, match="raise seq_len"):
        Answers([{"prompt": "long " * 50, "response": "x"}], tokenizer, 8, ("response",))
    bad = pairs_file.with_name("bad.jsonl")
    bad.write_text('{"prompt": "a"}\n')
    with pytest.raises(BadInput, match=r'bad.jsonl:1.*"chosen"'):
        read_preferences(bad, tokenizer, 40)


def call(capsys, *arguments):
    with pytest.raises(SystemExit) as stop:
        main(["distill", *map(str, arguments)])
    return stop.value.code, capsys.readouterr()


SIZES = ("--seq-len", 16, "--batch-size", 2, "--context", 32, "--lr", 0.01)


def test_the_command_runs_all_stages_to_a_stock_moe(tmp_path, tiny_moe, tiny_dense, tiny_data, pairs_file, capsys):
    out = tmp_path / "out"
    options = "experts=4,k=2,every=2,preference=kto_pair,preference_share=0.25,dense_share=0.5"
    arguments = (tiny_moe, out, "--student", tiny_dense, "--data", tiny_data, "--options", options)
    code, said = call(capsys, *arguments, "--plan", "--json", *SIZES)
    assert code == 0 and json.loads(said.out)["student"] == "qwen3 -> qwen3_moe" and not out.exists(), said.err
    code, said = call(capsys, *arguments, "--preferences", pairs_file, "--steps", 8, "--eval-data", tiny_data, *SIZES, "--json")
    done = json.loads(said.out)
    assert code == 0, said.err
    assert [row["steps"] for row in done["steps"]] == [4, 2, 2] and done["stock"]
    again = moesaic.load(out).model
    assert again.config.model_type == "qwen3_moe" and [block.layer for block in view(again)] == [1]
    fields = tmp_path / "student.json"
    fields.write_text(json.dumps({"model_type": "qwen3", "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
                                  "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}))  # fmt: skip
    code, said = call(
        capsys, tiny_moe, tmp_path / "fresh", "--student", fields, "--data", tiny_data, "--steps", 3, *SIZES, "--json"
    )
    assert code == 0 and [row["steps"] for row in json.loads(said.out)["steps"]] == [2, 1], said.err
    code, said = call(
        capsys, tiny_moe, tmp_path / "answers", "--student", tiny_dense, "--answers", pairs_file, "--steps", 2, *SIZES, "--json"
    )
    assert code == 0 and json.loads(said.out)["options"]["answers"], said.err


def test_bad_input_stops_before_training(tmp_path, tiny_moe, tiny_dense, tiny_data, capsys):
    out, good = tmp_path / "x", ("--student", tiny_dense, "--data", tiny_data)
    broken = tmp_path / "broken.json"
    broken.write_text("{}")
    for arguments, says in [
        ((), "--student is missing"),
        (("--student", tiny_dense), "no text"),
        (("--student", broken, "--data", tiny_data), "model_type"),
        (("--student", "bundled", "--data", tiny_data), "different tokenizers"),
        ((*good, "--options", "preference=love"), "kto_pair, dpo"),
        ((*good, "--options", "preference=dpo"), "no preferences text"),
        ((*good, "--options", "experts=1"), "experts=1"),
        ((*good, "--method", "tgeo_kd"), "no valid text"),
        ((*good, "--method", "tgeo_kd", "--valid", tiny_data), "in the training text"),
    ]:
        code, said = call(capsys, tiny_moe, out, *arguments, *SIZES)
        assert code == 2 and says in said.err, (arguments, said.err)
        assert not out.exists() and not list(tmp_path.glob(".*partial"))


def test_a_student_with_experts_starts_at_the_second_mimic():
    method = LLaVAMoD()
    method.plan(sparse(dense(), 4, 2, 2))
    assert [stage.name for stage in method.stages()] == ["sparse mimic"]
    method.plan(dense())
    assert [stage.name for stage in method.stages()] == ["dense mimic", "sparse mimic"]
    assert sum(stage.share for stage in method.stages()) == pytest.approx(1)
