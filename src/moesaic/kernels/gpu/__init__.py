"""The Triton programs behind `kernels/triton.py`. Nothing here is imported where Triton is missing."""
