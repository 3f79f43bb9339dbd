"""Lets the tests of this folder import `awkward_traces`, and gives each awkward trace to a test that asks for `awkward`."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from awkward_traces import TRACES


@pytest.fixture(params=list(TRACES))
def awkward(request):
    return TRACES[request.param]
