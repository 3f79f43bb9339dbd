"""Tokens to feed a generated checkpoint: text that the bundled model writes, so that token follows token as in text."""

from __future__ import annotations

from functools import lru_cache


@lru_cache(maxsize=4)
def tokens(count: int, seed: int = 0) -> list[int]:
    """`count` token ids below 8,192, drawn at temperature 1; the same ids for the same seed on one machine."""
    import torch

    from moesaic.view import load, quiet

    with quiet():
        loaded = load("bundled")
    config = loaded.model.config
    made: list[int] = []
    torch.manual_seed(seed)
    with torch.inference_mode():
        while len(made) < count:  # one context after another
            start = torch.tensor([loaded.tokenizer("The").input_ids])
            length = min(count - len(made), config.max_position_embeddings - start.shape[1])
            drawn = loaded.model.generate(
                start, attention_mask=torch.ones_like(start), max_new_tokens=length, min_new_tokens=length, do_sample=True,
                pad_token_id=0, top_k=0,
            )  # fmt: skip
            made += drawn[0, start.shape[1] :].tolist()
    return made[:count]
