"""The house rules: imports point down only, and nothing heavy loads before it is asked for."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import moesaic

ROOT = Path(moesaic.__file__).parent
FLOORS = {
    "core": 0, "kernels": 1, "store": 1, "schedules": 1, "routing": 2, "experts": 2, "balancing": 2, "layers": 3,
    "view": 3, "models": 4, "trace": 4, "training": 5, "surgery": 5, "steering": 5, "adapters": 5, "serving": 5, "placement": 5,
    "distributed": 5, "evaluation": 5, "orchestration": 6, "report": 6, "bench": 6, "laboratory": 6, "fitting": 6, "cli": 7,
}  # fmt: skip
MAY_USE = {  # floors 1 and 2 of design.md's table, whose neighbours are named one by one
    "core": set(), "kernels": {"core"}, "store": {"core"}, "schedules": {"core"},
    "routing": {"core", "kernels", "schedules"},
    "experts": {"core", "kernels", "store"}, "balancing": {"core"},
}  # fmt: skip


def imported(file: Path) -> set[str]:
    """Second name part of every `moesaic.X` import of a file, wherever it stands in it."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module] if node.module != "moesaic" else [f"moesaic.{alias.name}" for alias in node.names]
        found |= {name.split(".")[1] for name in names if name.startswith("moesaic.")}
    return found & FLOORS.keys()


def allowed(folder: str, target: str) -> bool:
    if folder == target:
        return True
    if folder in MAY_USE:
        return target in MAY_USE[folder]
    return FLOORS[target] < FLOORS[folder]


@pytest.mark.parametrize("file", sorted(ROOT.glob("*/**/*.py")), ids=lambda f: str(f.relative_to(ROOT)))
def test_imports_point_down(file):
    folder = file.relative_to(ROOT).parts[0]
    assert folder in FLOORS, f"{folder}/ has no floor: place it in design and in this test"
    wrong = {target for target in imported(file) if not allowed(folder, target)}
    assert not wrong, f"{file.relative_to(ROOT)} (floor {FLOORS[folder]}) imports {sorted(wrong)}"


def test_the_import_test_can_fail():
    assert not allowed("core", "kernels")
    assert not allowed("training", "evaluation")
    assert not allowed("balancing", "routing")
    assert allowed("cli", "training")


@pytest.mark.parametrize("code", ["import moesaic", "from moesaic.cli.main import main; main(['--help'])"])
def test_nothing_heavy_is_imported(code):
    probe = f"import sys\ntry:\n    {code.replace('; ', chr(10) + '    ')}\nexcept SystemExit:\n    pass\n"
    probe += "heavy = {'torch', 'transformers', 'numpy', 'typer', 'rich'} & set(sys.modules)\nassert not heavy, heavy"
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_lazy_names_resolve():
    for name in moesaic.__all__:
        assert getattr(moesaic, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = moesaic.nothing
