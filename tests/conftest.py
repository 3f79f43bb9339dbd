"""Shared fixtures: the data folder beside the project (tests that need it skip with a reason), seeds, threads."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

SHARED = Path(__file__).resolve().parents[2] / "shared"


def pytest_collection_modifyitems(items):
    no_data = pytest.mark.skip(reason=f"the data folder {SHARED} is not on this machine")
    no_gpu = pytest.mark.skip(reason="no CUDA device on this machine")
    for item in items:
        if "shared" in item.keywords and not SHARED.is_dir():
            item.add_marker(no_data)
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(no_gpu)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The data folder; a test that takes it must be marked `shared`."""
    return SHARED


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)
