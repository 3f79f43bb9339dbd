"""Registered routers inside other architectures: a transformers MoE whose router, or cheap experts, are ours."""
