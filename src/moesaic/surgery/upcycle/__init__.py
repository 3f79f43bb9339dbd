"""Upcycle: dense models into a Mixture-of-Experts, and back."""
