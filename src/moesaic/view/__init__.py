"""The live view of any transformers MoE."""
