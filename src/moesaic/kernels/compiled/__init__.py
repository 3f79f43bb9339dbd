"""Passes compiled by Numba, an extra: imported only where they run."""
