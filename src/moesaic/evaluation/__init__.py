"""Evaluation: how good a model is, in units that compare across tokenizers."""
