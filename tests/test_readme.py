"""The README's Python runs as printed, and its commands exist."""

from __future__ import annotations

import re
from pathlib import Path

from moesaic.cli.main import COMMANDS

README = (Path(__file__).parents[1] / "README.md").read_text()


def test_the_python_example_runs(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    scope: dict = {}
    exec(compile(code, "README.md", "exec"), scope)
    assert scope["y"].shape == (2, 10, 64)
    assert len(capsys.readouterr().out.splitlines()) >= 7


def test_the_commands_exist():
    named = set(re.findall(r"`moesaic ([\w-]+)", README))
    assert named <= COMMANDS.keys()
    makefile = (Path(__file__).parents[1] / "Makefile").read_text()
    for target in re.findall(r"^make (\w+)", README, re.MULTILINE):
        assert f"\n{target}:" in makefile


def test_links_lead_somewhere():
    for page in [Path("README.md"), *Path("docs").glob("*.md")]:
        text = (Path(__file__).parents[1] / page).read_text()
        for link in re.findall(r"\]\((?!https?:|#)([^)#]+)", text):
            assert (Path(__file__).parents[1] / page.parent / link).exists(), f"{page}: {link}"
