"""C3PO's reference store: prompts that a model answers rightly, with the pathway and the embedding of each.

n references, L MoE blocks, E experts (the most of any block), M width of the embedding. A pathway is the softmax over all
experts, before top-k, of the prompt's last token in every block.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from moesaic.core.errors import BadInput
from moesaic.core.files import replacing
from moesaic.view import View

KEY = "moesaic_references"
VERSION = 1

Embed = Callable[[Sequence[int]], Tensor]
"""Token ids -> a vector [M]; the paper's is a sentence encoder (MiniLM)."""


@dataclass(frozen=True)
class References:
    model: str
    blocks: tuple[str, ...]
    prompts: tuple[tuple[int, ...], ...]
    answers: tuple[tuple[int, ...], ...]
    pathway_nLE: Tensor
    embedding_nM: Tensor
    """Of length 1."""

    def __len__(self) -> int:
        return len(self.prompts)

    def write(self, path: Path) -> Path:
        """One safetensors file, its header JSON."""
        header = {"version": VERSION, "model": self.model, "blocks": list(self.blocks)}
        offsets = {name: [len(ids) for ids in rows] for name, rows in (("prompts", self.prompts), ("answers", self.answers))}
        tensors = {
            "pathways": self.pathway_nLE.contiguous(),
            "embeddings": self.embedding_nM.contiguous(),
            "prompts": torch.tensor([i for ids in self.prompts for i in ids], dtype=torch.int32),
            "answers": torch.tensor([i for ids in self.answers for i in ids], dtype=torch.int32),
        }
        with replacing(path) as scratch:
            save_file(tensors, scratch, {KEY: json.dumps({**header, "lengths": offsets})})
        return Path(path)

    @classmethod
    def read(cls, path: str | Path) -> References:
        """Raises BadInput for a file that is none."""
        if not Path(path).is_file():
            raise BadInput(f"{path}: no such file; `moesaic steer references` writes one")
        try:
            with safe_open(str(path), framework="pt") as file:
                header = json.loads((file.metadata() or {}).get(KEY, "null"))
                if header is None or header["version"] != VERSION:
                    raise BadInput(f"{path} is no reference store: `moesaic steer references` writes one")
                tensors = {name: file.get_tensor(name) for name in ("pathways", "embeddings", "prompts", "answers")}
                rows = {
                    name: tuple(tuple(part.tolist()) for part in tensors[name].split(header["lengths"][name]))
                    for name in ("prompts", "answers")
                }
                made = cls(
                    header["model"], tuple(header["blocks"]), rows["prompts"], rows["answers"], tensors["pathways"],
                    tensors["embeddings"],
                )  # fmt: skip
        except (SafetensorError, KeyError, ValueError, TypeError, RuntimeError) as error:
            raise BadInput(f"{path}: a broken reference store ({error}): build it again") from error
        if not len(made) == len(made.answers) == len(made.pathway_nLE) == len(made.embedding_nM) or not len(made):
            raise BadInput(f"{path}: a reference store whose parts differ in length, or an empty one: build it again")
        return made


@torch.no_grad()
def look(model: Any, blocks: View, ids: Sequence[int], embed: Embed | None = None) -> tuple[Tensor, Tensor]:
    """Pathway [L, E] and embedding [M] of a prompt, in one pass. The embedding is the mean of the last hidden states, scaled
    to length 1, unless `embed` makes one: a stand-in for the paper's sentence encoder that needs no other model."""
    widest = max(block.num_experts for block in blocks)
    pathway_LE = torch.zeros(len(blocks), widest)
    at = {block.name: index for index, block in enumerate(blocks)}

    def keep(routing: Any, block: Any) -> None:
        pathway_LE[at[block.name], : block.num_experts] = routing.logits_TE[-1].detach().float().softmax(-1).cpu()

    given = torch.tensor([list(ids)], device=model.get_input_embeddings().weight.device)
    with blocks.on_route(keep):
        output = model(input_ids=given, use_cache=False, output_hidden_states=embed is None)
    vector_M = output.hidden_states[-1][0].float().mean(0).cpu() if embed is None else embed(ids).float().cpu()
    return pathway_LE, torch.nn.functional.normalize(vector_M, dim=0)


@torch.no_grad()
def answer_loss(model: Any, ids: Sequence[int], answer: Sequence[int]) -> float:
    """Mean cross-entropy of the answer's tokens after the prompt, in nats."""
    return float(-_answer_logprobs(model, ids, answer).mean())


def _answer_logprobs(model: Any, ids: Sequence[int], answer: Sequence[int]) -> Tensor:
    given = torch.tensor([[*ids, *answer[:-1]]], device=model.get_input_embeddings().weight.device)
    logits_AV = model(input_ids=given, use_cache=False).logits[0, len(ids) - 1 :].float()
    wanted_A = torch.tensor(list(answer), device=logits_AV.device)
    return logits_AV.log_softmax(-1).gather(1, wanted_A[:, None])[:, 0]


def right(model: Any, ids: Sequence[int], answer: Sequence[int], choices: Sequence[Sequence[int]] | None) -> bool:
    """Whether the model answers so by itself: no choice has a smaller loss, or greedy decoding writes the answer."""
    if choices:
        best = min(range(len(choices)), key=lambda c: answer_loss(model, ids, choices[c]))
        return list(choices[best]) == list(answer)
    with torch.no_grad():
        given = torch.tensor([[*ids, *answer[:-1]]], device=model.get_input_embeddings().weight.device)
        logits_AV = model(input_ids=given, use_cache=False).logits[0, len(ids) - 1 :]
    return logits_AV.argmax(-1).tolist() == list(answer)


def collect(
    model: Any,
    blocks: View,
    rows: Sequence[tuple[Sequence[int], Sequence[int], Sequence[Sequence[int]] | None]],
    name: str = "",
    embed: Embed | None = None,
) -> References:
    """References of those (prompt, answer, choices) rows that the model answers rightly. Raises BadInput where it is none."""
    kept = [(tuple(ids), tuple(answer)) for ids, answer, choices in rows if right(model, ids, answer, choices)]
    if not kept:
        raise BadInput(f"none of {len(rows)} prompts is answered rightly: there is nothing to refer to")
    seen = [look(model, blocks, ids, embed) for ids, _ in kept]
    return References(
        name, tuple(block.name for block in blocks), tuple(ids for ids, _ in kept), tuple(answer for _, answer in kept),
        torch.stack([pathway for pathway, _ in seen]), torch.stack([vector for _, vector in seen]),
    )  # fmt: skip
