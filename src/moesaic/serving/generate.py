"""Generate text with any causal language model of transformers: stream it, time it, and stop at the context's end."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch

from moesaic.core.errors import BadInput
from moesaic.serving.stream import Streamer

Stop = Literal["end of text", "max new tokens", "context full", "interrupted", "abstained"]


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn. Temperature 0 takes the most likely one; None leaves a choice to the model's own file."""

    max_new_tokens: int = 160
    temperature: float = 0.8
    top_k: int | None = None
    top_p: float | None = 0.95
    repetition_penalty: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        """Raises BadInput naming the option, its value and its range."""
        checks = [
            ("--max-new-tokens", self.max_new_tokens, lambda v: v >= 1, "at least 1"),
            ("--temperature", self.temperature, lambda v: 0 <= v < float("inf"), "0 (greedy) or more"),
            ("--top-k", self.top_k, lambda v: v >= 1, "at least 1"),
            ("--top-p", self.top_p, lambda v: 0 < v <= 1, "above 0, at most 1"),
            ("--repetition-penalty", self.repetition_penalty, lambda v: 0 < v < float("inf"), "above 0 (1 is none)"),
            ("--seed", self.seed, lambda v: 0 <= v < 1 << 63, "0 or a positive 63-bit number"),
        ]
        for option, value, fits, expected in checks:
            if value is not None and not fits(value):
                raise BadInput(f"{option} {value}: must be {expected}")

    def arguments(self) -> dict[str, Any]:
        """As `model.generate` takes them."""
        if self.temperature == 0:
            given: dict[str, Any] = {"do_sample": False, "temperature": None, "top_k": None, "top_p": None}
        else:
            given = {"do_sample": True, "temperature": self.temperature}
            given.update({k: v for k, v in (("top_k", self.top_k), ("top_p", self.top_p)) if v is not None})
        if self.repetition_penalty is not None:
            given["repetition_penalty"] = self.repetition_penalty
        return given


@dataclass(frozen=True)
class Generation:
    """Ids in and out, the text, and when each token came (seconds from the start)."""

    prompt_ids: list[int]
    new_ids: list[int]
    text: str
    times: list[float]
    seconds: float
    stopped: Stop

    @property
    def time_to_first_token(self) -> float | None:
        return self.times[0] if self.times else None

    @property
    def tokens_per_second(self) -> float | None:
        """Rate after the first token, whose time is the prompt's; over everything where there is no second token."""
        if len(self.times) > 1 and self.times[-1] > self.times[0]:
            return (len(self.times) - 1) / (self.times[-1] - self.times[0])
        return len(self.times) / self.seconds if self.times and self.seconds else None


def context_length(config: Any) -> int | None:
    """The longest sequence the model takes; None when its configuration does not say."""
    return getattr(config.get_text_config(), "max_position_embeddings", None)


def check_fits(config: Any, tokens: int) -> int | None:
    """The context length. Raises BadInput for a prompt that leaves no room for one new token."""
    longest = context_length(config)
    if longest is not None and tokens >= longest:
        raise BadInput(
            f"the prompt is {tokens:,} tokens, the context of this model {longest:,} (one is needed for the answer): shorten it"
        )
    return longest


def encode(tokenizer: Any, text: str) -> list[int]:
    """Ids of a prompt, with the special tokens that the tokenizer itself puts there. Raises BadInput when empty."""
    if not text.strip():
        raise BadInput("the prompt is empty: give some text for the model to continue")
    try:
        return list(tokenizer(text, verbose=False)["input_ids"])
    except (TypeError, UnicodeEncodeError) as error:
        raise BadInput("the prompt is not valid Unicode text (a lone surrogate)") from error


def generate(
    model: Any,
    tokenizer: Any,
    prompt_ids: list[int],
    sampling: Sampling,
    on_text: Callable[[str], None] = lambda text: None,
    call: Callable[..., Any] | None = None,
) -> Generation:
    """Continue `prompt_ids`, calling `on_text` with each finished piece of text. Ctrl-C ends it with what there is.

    `call` takes what `model.generate` takes, and stands in for it. Raises BadInput when the prompt leaves no room in the
    context.
    """
    longest = check_fits(model.config, len(prompt_ids))
    room = sampling.max_new_tokens if longest is None else min(sampling.max_new_tokens, longest - len(prompt_ids))
    ids = torch.tensor([prompt_ids], device=next(model.parameters()).device)
    ends = end_tokens(model, tokenizer)
    streamer = Streamer(tokenizer, on_text)
    torch.manual_seed(sampling.seed)
    began = time.perf_counter()
    interrupted = False
    try:
        with torch.inference_mode():
            (model.generate if call is None else call)(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=room,
                streamer=streamer,
                eos_token_id=ends or None,
                pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else (ends[0] if ends else 0),
                **sampling.arguments(),
            )
    except KeyboardInterrupt:
        interrupted = True
        streamer.end()
    new_ids = list(streamer.ids)
    stopped: Stop = "interrupted" if interrupted else _why(new_ids, ends, room, sampling.max_new_tokens)
    text = tokenizer.decode(new_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return Generation(list(prompt_ids), new_ids, text, streamer.times, time.perf_counter() - began, stopped)


def end_tokens(model: Any, tokenizer: Any) -> list[int]:
    """The ids that end a text: the generation settings' where they name any, else the tokenizer's."""
    given = getattr(model.generation_config, "eos_token_id", None)
    given = tokenizer.eos_token_id if given is None else given
    return [] if given is None else list(given) if isinstance(given, list | tuple) else [given]


def _why(new_ids: list[int], ends: list[int], room: int, asked: int) -> Stop:
    if new_ids and new_ids[-1] in ends:
        return "end of text"
    return "context full" if len(new_ids) >= room and room < asked else "max new tokens"
