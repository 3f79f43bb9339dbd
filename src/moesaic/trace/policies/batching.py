"""Read-ME's batcher: of the requests whose expert is known, take from the longest expert queue until the batch is full."""

from __future__ import annotations

from collections.abc import Sequence

from moesaic.core.errors import BadInput


def next_batch(experts_R: Sequence[int], tokens_R: Sequence[int], max_tokens: int) -> list[int]:
    """Which waiting requests run next, by index. The oldest comes first inside a queue, the lower expert among equals.

    The first request of a batch always fits, so that one longer than `max_tokens` does not wait for ever.
    """
    if max_tokens < 1:
        raise BadInput(f"max_tokens {max_tokens}: at least 1")
    queues: dict[int, list[int]] = {}
    for request, expert in enumerate(experts_R):
        queues.setdefault(int(expert), []).append(request)
    batch: list[int] = []
    room = max_tokens
    for expert in sorted(queues, key=lambda e: (-len(queues[e]), e)):
        for request in queues[expert]:
            if batch and tokens_R[request] > room:
                return batch
            batch.append(request)
            room -= tokens_R[request]
            if room <= 0:
                return batch
    return batch
