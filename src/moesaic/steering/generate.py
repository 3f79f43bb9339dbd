"""Text under steering: `generate` for a prompt, `write` in place of `model.generate`.

B rows, V vocabulary. Rows follow each its own course. Rows beside an answer (a weak pass) have a cache of their own, also for
the prompt. Where a course changes after some tokens, the text so far is read again: keys and values of the old routing would
not be those of the new one.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, LogitsProcessor, LogitsProcessorList
from transformers.generation.streamers import BaseStreamer

from moesaic.core.errors import BadInput, NotMoE
from moesaic.steering.spec import Spec, steering
from moesaic.steering.steer import Steering
from moesaic.view import View, view
from moesaic.view.course import Course


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
    logits_processor: Any = None,
    on_course: Callable[[list[Course]], None] | None = None,
    within: Callable[[], AbstractContextManager[Any]] | None = None,
    **how: Any,
) -> Tensor:
    """`model.generate` under steering: ids [B, N] in, ids [B, N + new] out; a Steering for all rows, or one per row.

    `on_course` is called with the courses of the rows, each time they are set; passes beside the answers run inside
    `within()`. Raises BadInput for a batch whose rows must be
    written one at a time, and for one that a course refuses.
    """
    count, start = input_ids.shape
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
            with _calls(model, each[0].blocks, courses, mask_BN, within) as beside:
                made = model.generate(
                    ids_BN, attention_mask=mask_BN, max_new_tokens=room, streamer=through,
                    logits_processor=LogitsProcessorList([*(logits_processor or ()), *beside]), **how,
                )  # fmt: skip
            new = made.shape[1] - ids_BN.shape[1]
            left -= new
            ids_BN, then = made, courses[0].then
            mask_BN = torch.cat([mask_BN, mask_BN.new_ones(count, new)], 1)
            if then is None or left <= 0 or new < room or _ended(model, made, how.get("eos_token_id")):
                break
            courses = [then(ids_BN[0].tolist())]
    finally:
        if through is not None:
            through.close()
    return ids_BN if ids_BN.shape[1] > start else input_ids


@contextmanager
def _calls(model: Any, blocks: View | None, courses: list[Course], mask_BN: Tensor, within: Any) -> Iterator[list[Any]]:
    """What holds during the model's calls; yields the processors that bring in the rows beside."""
    around = courses[0].around
    with around() if around is not None else nullcontext():
        policies = [course.policy for course in courses]
        with nullcontext() if blocks is None or not any(policies) else blocks.policy(rows=policies):
            beside = any(course.beside for course in courses)
            yield [Beside(model, blocks, courses, mask_BN, within)] if beside and blocks is not None else []


def _ended(model: Any, ids_BN: Tensor, given: Any) -> bool:
    ends = model.generation_config.eos_token_id if given is None else given
    return ends is not None and int(ids_BN[0, -1]) in ([ends] if isinstance(ends, int) else list(ends))


class Beside(LogitsProcessor):
    """Runs the rows beside the answers, with their own cache, and mixes their logits in: for `model.generate`'s
    `logits_processor`, so for greedy decoding and sampling alike."""

    def __init__(
        self, model: Any, blocks: View, courses: Sequence[Course], attention_mask: Tensor | None = None, within: Any = None
    ) -> None:
        self.model, self.blocks, self.courses, self.mask_BN = model, blocks, list(courses), attention_mask
        self.within = nullcontext if within is None else within
        widths = {len(course.beside) for course in courses}
        if len(widths) > 1:
            raise BadInput("steer: rows of one batch need the same number of passes beside them")
        self.width = widths.pop()
        self.caches: list[Any] = [None] * self.width
        self.seen = 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        beside_CBV = torch.stack([self._pass(c, input_ids) for c in range(self.width)])
        self.seen = input_ids.shape[1]
        mixed = []
        for row, course in enumerate(self.courses):
            own_V = scores[row]
            mixed.append(own_V if course.mix is None else course.mix(own_V, beside_CBV[:, row].to(own_V)))
        return torch.stack(mixed)

    def _pass(self, index: int, input_ids: Tensor) -> Tensor:
        if self.caches[index] is None:
            self.caches[index] = DynamicCache(config=self.model.config.get_text_config(decoder=True))
        given: dict[str, Any] = {"past_key_values": self.caches[index], "use_cache": True, "logits_to_keep": 1}
        if self.mask_BN is not None:
            grown = input_ids.shape[1] - self.mask_BN.shape[1]
            mask_BL = torch.nn.functional.pad(self.mask_BN, (0, grown), value=1)
            given |= {"attention_mask": mask_BL, "position_ids": (mask_BL.cumsum(1) - 1).clamp(min=0)[:, self.seen :]}
        given = {name: value for name, value in given.items() if name in _takes(self.model)}
        policies = [course.rows()[1 + index] for course in self.courses]
        with self.within(), self.blocks.policy(rows=policies):
            return self.model(input_ids=input_ids[:, self.seen :], **given).logits[:, -1]


def _takes(model: Any) -> set[str]:
    return set(inspect.signature(model.forward).parameters)


class _Through(BaseStreamer):
    """One stream out of several calls of `generate`: each puts its prompt first, and ends what is not ended yet."""

    def __init__(self, streamer: Any) -> None:
        self.streamer, self.prompts, self.fresh = streamer, 0, True

    def put(self, value: Tensor) -> None:
        if self.fresh:
            self.fresh, self.prompts = False, self.prompts + 1
            if self.prompts > 1:
                return
        self.streamer.put(value)

    def end(self) -> None:
        self.fresh = True

    def close(self) -> None:
        self.streamer.end()
