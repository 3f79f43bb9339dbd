"""Lets the GPU tests import the kernel tests' cases (`../kernels/kernel_cases.py`)."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "kernels"))
