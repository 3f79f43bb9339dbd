"""Layers that join a router, a bank and shared experts."""
