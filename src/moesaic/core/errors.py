"""Errors that a person can act on: what was wrong, where, and what to do."""

from __future__ import annotations


class MoesaicError(Exception):
    """Base of every error raised for bad input. The CLI prints its message on one line and exits with 2."""


class BadInput(MoesaicError):
    """A file, tensor, option or value that cannot be used; the message names it and says what to do."""


class NotMoE(BadInput):
    """The model has no Mixture-of-Experts block that the view can find."""


class MissingNeed(BadInput):
    """A router asked its RoutingContext for something that the host does not give."""


class UnknownMethod(BadInput):
    """No method of that name is registered in that family."""
