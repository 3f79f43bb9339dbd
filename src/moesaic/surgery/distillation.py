"""What a student learns from a teacher: its distribution where a response is predicted, and preferences between responses.

Shape legend: B batch, N tokens of a row, V vocabulary.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, pad
from torch.nn.utils.rnn import pad_sequence

from moesaic.core.errors import BadInput

IGNORED = -100


def predicting(labels_BN: Tensor) -> Tensor:
    """True where a position predicts a token that counts, [B, N - 1]: labels shifted by one, which released code forgot."""
    return labels_BN[:, 1:] != IGNORED


def mimic_loss(student_BNV: Tensor, teacher_BNV: Tensor, labels_BN: Tensor) -> Tensor:
    """Mean over predicting positions of -sum_v p_T log p_S, nats; forward KL up to the teacher's entropy.

    Logits of all N positions; vocabularies of different widths are cut to the common one.
    """
    width = min(student_BNV.shape[-1], teacher_BNV.shape[-1])
    keep_BN = predicting(labels_BN)
    student_TV = student_BNV[:, :-1, :width][keep_BN].float()
    teacher_TV = teacher_BNV[:, :-1, :width][keep_BN].float()
    return -(teacher_TV.softmax(-1) * student_TV.log_softmax(-1)).sum(-1).mean()


def response_log_probs(model: Any, ids_BN: Tensor, labels_BN: Tensor) -> Tensor:
    """log p of each row's response, [B]."""
    logits_BNV = model(input_ids=ids_BN, use_cache=False).logits[:, :-1].float()
    log_p_BN = logits_BNV.log_softmax(-1).gather(-1, ids_BN[:, 1:, None]).squeeze(-1)
    return (log_p_BN * predicting(labels_BN)).sum(-1)


def kto_pair(chosen_B: Tensor, rejected_B: Tensor, beta: float) -> Tensor:
    """Mean of 1 - sigma(beta (r_c - KL_r)) and 1 - sigma(beta (KL_c - r_r)); KL are the batch means of r, at least 0."""
    kl_chosen, kl_rejected = chosen_B.mean().clamp(min=0), rejected_B.mean().clamp(min=0)
    good = 1 - torch.sigmoid(beta * (chosen_B - kl_rejected))
    bad = 1 - torch.sigmoid(beta * (kl_chosen - rejected_B))
    return torch.cat([good, bad]).mean()


def dpo(chosen_B: Tensor, rejected_B: Tensor, beta: float) -> Tensor:
    """Mean of -log sigma(beta (r_c - r_r)): log 2 where the ratios are equal."""
    return -logsigmoid(beta * (chosen_B - rejected_B)).mean()


PREFERENCES = {"kto_pair": kto_pair, "dpo": dpo}


class Answers:
    """Rows of {prompt, <field>, ...} JSON lines: ids and labels of prompt + response, the prompt's labels IGNORED."""

    def __init__(self, rows: list[dict[str, Any]], tokenizer: Any, seq_len: int, fields: tuple[str, ...]) -> None:
        self.fields, self.examples = fields, []
        for row in rows:
            prompt = tokenizer(row["prompt"], add_special_tokens=False)["input_ids"]
            example = {}
            for field in fields:
                answer = [*tokenizer(row[field], add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
                ids = [tokenizer.eos_token_id, *prompt, *answer][:seq_len]
                labels = [IGNORED] * (1 + len(prompt)) + answer
                example[field] = (torch.tensor(ids), torch.tensor(labels[:seq_len]))
            if all((labels != IGNORED).any() for _, labels in example.values()):
                self.examples.append(example)
        if not self.examples:
            raise BadInput(f"no row has a response within {seq_len} tokens: raise seq_len")

    def rows(self, first: int, count: int) -> dict[str, Tensor]:
        """`ids` and `labels` [B, N] (of each field by name, where there are several), padded at the end."""
        some = [self.examples[(first + i) % len(self.examples)] for i in range(count)]
        found = {}
        for field in self.fields:
            name = "" if len(self.fields) == 1 else f"{field}_"
            found[f"{name}ids"] = pad_sequence([e[field][0] for e in some], batch_first=True)
            found[f"{name}labels"] = pad_sequence([e[field][1] for e in some], batch_first=True, padding_value=IGNORED)
        longest = max(2, *(tensor.shape[1] for tensor in found.values()))
        return {
            name: pad(tensor, (0, longest - tensor.shape[1]), value=IGNORED if name.endswith("labels") else 0)
            for name, tensor in found.items()
        }


def _lines(path: str | Path, fields: tuple[str, ...]) -> list[dict[str, Any]]:
    """Raises BadInput naming file and line for a row without these fields as text."""
    rows = []
    for number, line in enumerate(Path(path).read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise BadInput(f"{path}:{number}: not a JSON line ({error.msg})") from error
        missing = [name for name in fields if not isinstance(row, dict) or not isinstance(row.get(name), str)]
        if missing:
            raise BadInput(f'{path}:{number}: a row must be an object with a string "{missing[0]}"')
        rows.append(row)
    if not rows:
        raise BadInput(f"{path} holds no rows of {', '.join(fields)}")
    return rows


def read_preferences(path: str | Path, tokenizer: Any, seq_len: int) -> Answers:
    """JSON lines of {prompt, chosen, rejected}."""
    return Answers(_lines(path, ("prompt", "chosen", "rejected")), tokenizer, seq_len, ("chosen", "rejected"))


def read_answers(path: str | Path, tokenizer: Any, seq_len: int) -> Answers:
    """JSON lines of {prompt, response}."""
    return Answers(_lines(path, ("prompt", "response")), tokenizer, seq_len, ("response",))
