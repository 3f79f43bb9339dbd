"""The reference language model: any registered router, bank and layer inside a transformers model (`model_type: moesaic`)."""
