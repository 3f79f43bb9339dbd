"""Text under steering: `generate` for a prompt, `write` in place of `model.generate`.

B rows, C rows beside each, V vocabulary. Rows follow each its own course. Rows beside an answer (a weak pass) run in the same
calls: the model reads B (1 + C) rows where `model.generate` knows of B. Where a course changes after some tokens, the text so
far is read again: keys and values of the old routing would not be those of the new one.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers.generation.streamers import BaseStreamer

from moesaic.core.errors import BadInput, NotMoE
from moesaic.steering.spec import Spec, steering
from moesaic.steering.steer import Steering
from moesaic.view import View, view
from moesaic.view.course import Course, finish


def generate(model: Any, tokenizer: Any, prompt: str | Sequence[int], steer: Spec = None, **how: Any) -> str:
    """The text that continues a prompt. `steer`: see `spec.steering`; `how`: as `model.generate` takes it.

    Greedy, 64 new tokens, unless `how` says otherwise. Raises BadInput for a spec that the model cannot follow.
    """
    ids = list(tokenizer(prompt)["input_ids"]) if isinstance(prompt, str) else list(prompt)
    if not ids:
        raise BadInput("the prompt is empty: give some text for the model to continue")
    how = {"max_new_tokens": 64, "do_sample": False, **how}
    given = torch.tensor([ids], device=model.get_input_embeddings().weight.device)
    made = write(model, given, bound(model, steer, tokenizer), **how)
    return tokenizer.decode(made[0, len(ids) :], skip_special_tokens=True, clean_up_tokenization_spaces=False)


def bound(model: Any, spec: Spec, tokenizer: Any = None) -> Steering:
    """A Steering bound to a model."""
    try:
        blocks: View | None = view(model)
    except NotMoE:
        blocks = None
    return steering(spec).bind(model, blocks, tokenizer)


@contextmanager
def steered(model: Any, spec: Spec, rows: int = 1) -> Iterator[None]:
    """Every call of the model inside the `with` block follows the policies of a spec: for methods that are policies only.

    `rows`: of the batch, where a method steers the last token of each.
    """
    made = bound(model, spec)
    course = made.start([])
    if course.beside or not course.shares or course.refused:
        raise BadInput("steered: this method is more than a policy: use moesaic.steering.generate or write")
    if course.policy is None or made.blocks is None:
        yield
        return
    with made.blocks.policy(rows=[course.policy] * rows):
        yield


def write(
    model: Any,
    input_ids: Tensor,
    steer: Steering | Sequence[Steering],
    *,
    attention_mask: Tensor | None = None,
    max_new_tokens: int = 20,
    streamer: Any = None,
    on_course: Callable[[list[Course]], None] | None = None,
    **how: Any,
) -> Tensor:
    """`model.generate` under steering: ids [B, N] in, ids [B, N + new] out; a Steering for all rows, or one per row.

    `on_course` is called with the courses of the rows, each time they are set, with 0 tokens where a check ended the answer. A
    refused answer has no new tokens, or none after the last that was verified; a streamer gets tokens that may be taken back
    only once they stay. Raises BadInput for a batch whose rows must be written one at a time, and for what `model.generate`
    would give in another form.
    """
    count, start = input_ids.shape
    if how.get("return_dict_in_generate"):
        raise BadInput("steer: return_dict_in_generate: ids are all that is given back; leave it out")
    each = [steer] * count if isinstance(steer, Steering) else list(steer)
    if len(each) != count:
        raise BadInput(f"steer: {len(each)} given for a batch of {count} rows")
    mask_BN = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    courses = [one.start(row[mask.bool()].tolist()) for one, row, mask in zip(each, input_ids, mask_BN, strict=True)]
    through = None if streamer is None else _Through(streamer)
    ids_BN, left = input_ids, max_new_tokens
    try:
        while True:
            if on_course is not None:
                on_course(courses)
            if any(course.refused for course in courses):
                break
            if count > 1 and not all(course.shares for course in courses):
                raise BadInput(f"steer: {next((s.alone for s in each if s.alone), 'this method')}: one row at a time")
            changes = courses[0].tokens if courses[0].then is not None else None
            room = left if changes is None else min(left, changes)
            if through is not None:
                through.holds = courses[0].checks
            with _calls(model, each[0].blocks, courses, how):
                made = model.generate(ids_BN, attention_mask=mask_BN, max_new_tokens=room, streamer=through, **how)
            new = made.shape[1] - ids_BN.shape[1]
            left -= new
            ids_BN, then = made, courses[0].then
            mask_BN = torch.cat([mask_BN, mask_BN.new_ones(count, new)], 1)
            over = left <= 0 or new < room or _ended(model, made, how.get("eos_token_id"))
            if then is None or (over and not courses[0].checks):
                break
            courses = [finish(then(ids_BN[0][mask_BN[0].bool()].tolist()))]
            if back := courses[0].back:
                ids_BN, mask_BN, left = ids_BN[:, :-back], mask_BN[:, :-back], left + back
            if through is not None:
                through.release(back)
            if courses[0].refused or (over and not back):
                if on_course is not None:
                    on_course([replace(courses[0], tokens=0)])
                break
    finally:
        if through is not None:
            through.close()
    return ids_BN if ids_BN.shape[1] > start else input_ids


@contextmanager
def _calls(model: Any, blocks: View | None, courses: list[Course], how: dict[str, Any]) -> Iterator[None]:
    """What holds during the model's calls."""
    around, width = courses[0].around, len(courses[0].beside)
    if any(len(course.beside) != width for course in courses):
        raise BadInput("steer: rows of one batch need the same number of passes beside them")
    beams = how.get("num_beams", model.generation_config.num_beams)
    if width and ((beams or 1) > 1 or how.get("past_key_values") is not None):
        raise BadInput("steer: a method with passes beside the answer takes no beams and no cache that is filled already")
    rows = [course.rows() for course in courses]
    policies = [row[c] for c in range(1 + width) for row in rows]
    with (
        nullcontext() if around is None else around(),
        nullcontext() if blocks is None or not any(policies) else blocks.policy(rows=policies),
        beside(model, courses) if width else nullcontext(),
    ):
        yield


def _ended(model: Any, ids_BN: Tensor, given: Any) -> bool:
    ends = model.generation_config.eos_token_id if given is None else given
    return ends is not None and int(ids_BN[0, -1]) in ([ends] if isinstance(ends, int) else list(ends))


ROWS = ("input_ids", "inputs_embeds", "attention_mask", "position_ids", "token_type_ids")
"""Inputs of a model's call that have a part for each row."""


@contextmanager
def beside(model: Any, courses: Sequence[Course]) -> Iterator[None]:
    """Inside the block the model's calls in this thread read every row 1 + C times, in one batch and one cache: all answers,
    then for each pass beside them all answers again. The caller gets the answers' last logits, [B, 1, V] in float32, mixed with
    those beside them: `model.generate` draws from these as from any others. The policies of B (1 + C) rows are the caller's."""
    width, thread = len(courses[0].beside), threading.get_ident()

    def more(module: Any, args: tuple, kwargs: dict) -> Any:
        if threading.get_ident() != thread:
            return None
        return args, {name: _repeated(name, value, 1 + width) for name, value in kwargs.items()}

    def mixed(module: Any, args: tuple, kwargs: dict, output: Any) -> Any:
        if threading.get_ident() != thread:
            return None
        logits_RV = output.logits[:, -1].float()
        own_BV, *beside_CBV = logits_RV.chunk(1 + width)
        copies = len(own_BV) // len(courses)  # of several answers to each row, next to one another
        found = []
        for row, own_V in enumerate(own_BV):
            mix = courses[row // copies].mix
            found.append(own_V if mix is None else mix(own_V, torch.stack([part_BV[row] for part_BV in beside_CBV])))
        output.logits = torch.stack(found).unsqueeze(1)
        return output

    handles = [
        model.register_forward_pre_hook(more, with_kwargs=True),
        model.register_forward_hook(mixed, with_kwargs=True),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _repeated(name: str, value: Any, times: int) -> Any:
    """The rows of an input, all of them `times` times; positions of several kinds have their rows in the second place."""
    if name not in ROWS or not isinstance(value, Tensor):
        return value
    at = 1 if name == "position_ids" and value.dim() == 3 else 0
    return torch.cat([value] * times, at)


class _Through(BaseStreamer):
    """One stream out of several calls of `generate`: each puts its prompt first, and ends what is not ended yet."""

    def __init__(self, streamer: Any) -> None:
        self.streamer, self.prompts, self.fresh = streamer, 0, True
        self.holds, self.held = False, list[Any]()
        """Whether tokens wait until they are known to stay, and those that do."""

    def put(self, value: Tensor) -> None:
        if self.fresh:
            self.fresh, self.prompts = False, self.prompts + 1
            if self.prompts > 1:
                return
            self.streamer.put(value)
        elif self.holds:
            self.held.append(value)
        else:
            self.streamer.put(value)

    def release(self, back: int) -> None:
        """Hand on what waited, but the last `back` tokens."""
        for value in self.held[: len(self.held) - back]:
            self.streamer.put(value)
        self.held.clear()

    def end(self) -> None:
        self.fresh = True

    def close(self) -> None:
        self.streamer.end()
