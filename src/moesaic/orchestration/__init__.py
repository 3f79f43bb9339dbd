"""Routing between whole models: score, select and weigh, one floor up."""
