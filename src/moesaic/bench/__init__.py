"""Benchmarks that a command runs: ours, every peer that can run, and the floor the machine sets."""

BENCHMARKS = {
    "layer": "one MoE layer, forward or training step, against transformers and the floor",
    "machine": "memory, matmul and disk speeds, kept as this machine's profile",
}
"""Name -> one line of help. A benchmark is a module of this package with `run(options, progress) -> dict`."""
