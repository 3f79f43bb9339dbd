"""Steering: the same weights, other behaviour; an option of a request, never of a checkpoint."""

from __future__ import annotations

from moesaic.steering.generate import bound, generate, steered, write
from moesaic.steering.spec import steering
from moesaic.steering.steer import Steer, Steering
from moesaic.view.course import Course

__all__ = ["Course", "Steer", "Steering", "bound", "generate", "steered", "steering", "write"]
