"""Whole models as contestants: each in a process of its own, which reads commands and answers in JSON, line by line.

Processes, because a peer may need another interpreter, a memory limit must bind one contestant alone, and the memory of
one must not be another's. `loop` is the child's side and imports nothing but the standard library.
"""
