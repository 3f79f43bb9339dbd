"""Calibration: one pass over a text that collects, per layer and expert, every statistic that surgery asks for."""

from __future__ import annotations

from moesaic.trace.calibration.run import calibrate
from moesaic.trace.calibration.store import Calibration, merge, open_calibration

__all__ = ["Calibration", "calibrate", "merge", "open_calibration"]
