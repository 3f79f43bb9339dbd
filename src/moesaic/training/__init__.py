"""Training: a config file, a folder of documents, a checkpoint that stock transformers loads."""
