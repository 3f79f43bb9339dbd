"""Models after surgery that no class of transformers holds: blocks of unequal size, and rows that share experts."""
