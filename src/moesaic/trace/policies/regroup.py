"""ExpertFlow's token scheduler: split the sequences of two batches anew, so that each batch needs fewer experts.

In decoding, what moves between batches is a whole sequence with its KV cache, so rows are sequences.
"""

from __future__ import annotations

import numpy as np

STARTS = 16


def objective(active_RX: np.ndarray, first_R: np.ndarray) -> int:
    """Distinct experts of both groups, added up. Rows are sequences, columns (layer, expert) pairs."""
    return int(active_RX[first_R].any(0).sum() + active_RX[~first_R].any(0).sum())


def regroup(active_RX: np.ndarray, iterations: int = 10) -> np.ndarray:
    """Which rows [R] go to the first group of half the rows: two-means by Hamming similarity with equal sizes.

    A centre is the row most similar to the others of its group. Of several starts the best is taken, and the given split
    (first half, second half) where none is better.
    """
    active_RX = np.asarray(active_RX, bool)
    rows = len(active_RX)
    best_R = np.arange(rows) < (rows + 1) // 2
    if rows < 3:
        return best_R
    x_RX = active_RX.astype(np.float32)
    size_R = x_RX.sum(1)
    alike_RR = 1 - (size_R[:, None] + size_R[None] - 2 * x_RX @ x_RX.T) / max(1, active_RX.shape[1])
    far = np.unravel_index(int(np.argmin(alike_RR)), alike_RR.shape)
    starts = [(int(far[0]), int(far[1]))]
    starts += [(i, int(np.argmin(alike_RR[i]))) for i in np.linspace(0, rows - 1, min(rows, STARTS)).astype(int)]
    best = objective(active_RX, best_R)
    for start in starts:
        group_R = _two_means(alike_RR, start, iterations)
        value = objective(active_RX, group_R)
        if value < best:
            best, best_R = value, group_R
    return best_R


def _two_means(alike_RR: np.ndarray, centres: tuple[int, int], iterations: int) -> np.ndarray:
    rows = len(alike_RR)
    group_R = np.zeros(rows, bool)
    for _ in range(iterations):
        lean_R = alike_RR[:, centres[0]] - alike_RR[:, centres[1]]
        group_R = np.zeros(rows, bool)
        group_R[np.argsort(-lean_R, kind="stable")[: (rows + 1) // 2]] = True
        middle = [int(np.flatnonzero(g)[np.argmax(alike_RR[np.ix_(g, g)].mean(1))]) for g in (group_R, ~group_R)]
        if (middle[0], middle[1]) == centres:
            break
        centres = (middle[0], middle[1])
    return group_R


def regrouped(active_SX: np.ndarray, batch: int) -> np.ndarray:
    """An order of all sequences in which every two adjacent batches were regrouped; inside a group the order stays."""
    order = np.arange(len(active_SX))
    for start in range(0, len(order) - batch, 2 * batch):
        part = order[start : start + 2 * batch]
        if len(part) < 2 * batch:
            break  # a short last batch has no partner of its size
        first_R = regroup(active_SX[part])
        order[start : start + 2 * batch] = np.concatenate([part[first_R], part[~first_R]])
    return order
