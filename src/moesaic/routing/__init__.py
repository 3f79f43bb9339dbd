"""Routers: score, select, weigh parts, and one file per published router."""
