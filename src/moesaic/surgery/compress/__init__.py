"""Compress: the same experts in fewer numbers: factors, shared bases, fewer neurons."""
