"""Routing traces: record which experts every token chose, once, and let analysis, caching and surgery read the file."""
