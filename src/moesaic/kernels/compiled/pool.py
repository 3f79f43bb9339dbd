"""One pool of threads for Numba and PyTorch: two would spin against each other."""

from __future__ import annotations

from importlib.util import find_spec

import numba
import torch

if numba.config.THREADING_LAYER == "default" and find_spec("numba.np.ufunc.omppool"):
    numba.config.THREADING_LAYER = "omp"  # PyTorch's own


def join() -> int:
    """Let compiled passes use as many threads as PyTorch does; returns that number."""
    threads = max(1, min(torch.get_num_threads(), numba.config.NUMBA_NUM_THREADS))
    numba.set_num_threads(threads)
    return threads
