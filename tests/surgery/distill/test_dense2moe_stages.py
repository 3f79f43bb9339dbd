"""Dense2MoE's stages: weights of feature losses, what learns when, a student that comes nearer to its teacher."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from moesaic.core.documents import Document
from moesaic.core.errors import BadInput
from moesaic.evaluation.bits_per_byte import report, score_documents
from moesaic.surgery.convert import convert
from moesaic.surgery.distill.dense2moe import Dense2MoEStages, Features, feature_weights
from moesaic.surgery.objective import Given
from moesaic.surgery.recovery import softened_kl
from moesaic.surgery.trained import Training, run_step
from moesaic.training.finetune import finetune
from moesaic.view import resolve_model
from moesaic.view.block import View

SIZES = {"vocab_size": 60, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2}


class Rows:
    def rows(self, first, count):
        return torch.randint(1, 60, (count, 9), generator=torch.Generator().manual_seed(first))


def pair():
    torch.manual_seed(0)
    teacher = AutoModelForCausalLM.from_config(AutoConfig.for_model("qwen2", intermediate_size=48, **SIZES)).eval()
    sizes = {"moe_intermediate_size": 12, "shared_expert_intermediate_size": 12, "num_experts": 3, "num_experts_per_tok": 2}
    student = AutoModelForCausalLM.from_config(AutoConfig.for_model("qwen2_moe", **sizes, **SIZES)).eval()
    return student, teacher.requires_grad_(False)


def test_every_layers_feature_loss_comes_near_the_outputs_in_size():
    """Card (e)."""
    output, features = torch.tensor(2.0), [torch.tensor(x, requires_grad=True) for x in (1e-6, 0.1, 300.0)]
    weights = feature_weights(output, features, [torch.tensor(4.0)] * 3)
    for weight, feature in zip(weights, features, strict=True):
        torch.testing.assert_close(weight * feature.detach(), output)
        assert not weight.requires_grad
    low, high = feature_weights(output, features[:2], [torch.tensor(1.0), torch.tensor(3.0)])
    assert float(low * features[0]) == pytest.approx(4.0) and float(high * features[1]) == pytest.approx(4 / 3)
    assert feature_weights(output, [torch.tensor(0.0)], [torch.tensor(1.0)])[0] == 0


def test_shared_experts_stand_still_while_routed_ones_learn_and_the_other_way_round():
    """Card (f)."""
    student, teacher = pair()
    for part, learns in (("shared", "shared"), ("routed", "experts")):
        objective = Features(part, 1, 0.01)
        learn = objective.prepare(student, Given(None, teacher=teacher))
        before = {name: value.clone() for name, value in student.state_dict().items()}
        finetune(student, None, {"text": Rows()}, learn, objective=objective.loss, steps=3, lr=1e-2, batch_size=2, seq_len=9)
        objective.finish(student)
        moved = {name for name, value in student.state_dict().items() if not torch.equal(value, before[name])}
        wanted = {id(p) for p in learn}
        assert moved and moved <= {name for name, p in student.named_parameters() if id(p) in wanted}
        assert any(learns in name for name in moved) and all(p.grad is None for p in student.parameters())
    assert all("forward" not in block.experts.__dict__ for block in View(student))


def test_four_stages_bring_the_student_nearer():
    student, teacher = pair()
    stages = Dense2MoEStages(group=2).stages()
    assert [stage.objective.group for stage in stages] == [1, 1, 2, 0] and sum(s.share for s in stages) == pytest.approx(1)
    ids = Rows().rows(999, 8)

    def distance():
        with torch.no_grad():
            mine, wanted = (m(ids, output_hidden_states=True).hidden_states[-1] for m in (student, teacher))
        return float((mine - wanted).square().mean())

    student.load_state_dict({**student.state_dict(), **{k: v for k, v in teacher.state_dict().items() if "mlp" not in k}})
    before = distance()
    for stage in stages:
        objective = stage.objective
        learn = objective.prepare(student, Given(None, teacher=teacher))
        assert objective.ends == {1: [0, 1, 2, 3], 2: [1, 3], 0: []}[objective.group]
        finetune(student, None, {"text": Rows()}, learn, objective=objective.loss, steps=12, lr=5e-3, batch_size=4, seq_len=9)
        student = objective.finish(student)
    assert distance() < before


def test_a_student_without_shared_experts_or_of_other_depth_is_refused(make):
    _, teacher = pair()
    with pytest.raises(BadInput, match="no shared expert"):
        Features("shared", 1, 0.0).prepare(make("Mixtral"), Given(None, teacher=teacher))
    student, teacher = pair()
    teacher.model.layers = teacher.model.layers[:3]
    with pytest.raises(BadInput, match="its teacher 3"):
        Features("shared", 1, 0.0).prepare(student, Given(None, teacher=teacher))


@pytest.mark.slow
def test_from_a_cut_checkpoint_to_a_stock_one_stage_by_stage(tmp_path):
    """Upcycled, distilled by the step that the command runs, loaded by transformers: nearer to the teacher after each stage."""
    tokenizer = AutoTokenizer.from_pretrained(resolve_model("bundled"))
    torch.manual_seed(0)
    sizes = {**SIZES, "vocab_size": len(tokenizer), "intermediate_size": 64, "head_dim": 8, "eos_token_id": 0}
    dense = AutoModelForCausalLM.from_config(AutoConfig.for_model("qwen3", **sizes))
    for part in (dense, tokenizer):
        part.save_pretrained(tmp_path / "dense")
    options = {"experts": 3, "k": 2, "shared": 0.25, "score": "magnitude"}
    convert([tmp_path / "dense"], tmp_path / "moe", "dense2moe", options)
    text = [Document("To be, or not to be, that is the question. " * 60, "prose")]

    def score(live, tokenizer, documents):
        return {"bits_per_byte": report("", score_documents(live, tokenizer, documents, context=32))["bits_per_byte"]}

    found = run_step(
        tmp_path / "moe", tmp_path / "out", family="distill", method="dense2moe", train=finetune, texts={"text": text},
        teacher=tmp_path / "dense", held_out={"text": text}, score=score,
        training=Training(steps=20, lr=3e-3, batch_size=4, seq_len=32),
    )  # fmt: skip
    assert [row["steps"] for row in found["steps"]] == [8, 6, 3, 3]
    assert ["after" in row for row in found["steps"]] == [True, True, True, False] and "after" in found
    made = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    teacher, cut = (AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("dense", "moe"))
    ids = torch.tensor([tokenizer(text[0].text)["input_ids"][:64]])
    with torch.no_grad():
        wanted = teacher(ids).logits
        before, after = (softened_kl(m(ids).logits, wanted, 1.0) for m in (cut, made))
    assert after < 0.9 * before
