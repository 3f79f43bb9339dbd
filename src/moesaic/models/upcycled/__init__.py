"""Dense architectures with parts that no stock class has: attention experts, request-level experts, merged deltas."""
