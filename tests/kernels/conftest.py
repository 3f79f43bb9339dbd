"""Lets the kernel tests import the cases they share (`kernel_cases.py`), wherever pytest is started from."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
