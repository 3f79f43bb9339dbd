"""Run a command as the shell would: arguments in; exit code, standard output and standard error out."""

from __future__ import annotations

from typing import NamedTuple

import pytest


class Result(NamedTuple):
    code: int
    out: str
    err: str

    @property
    def complaint(self) -> str:
        """The one line of a bad-input exit; fails when it is anything else."""
        assert self.code == 2, self
        assert "Traceback" not in self.err
        lines = [line for line in self.err.splitlines() if line.startswith("moesaic ")]
        assert len(lines) == 1, self.err
        return lines[0]


@pytest.fixture
def moesaic(capsys, monkeypatch, tmp_path):
    """`moesaic("run", folder, ...)` in a folder of its own."""
    from moesaic.cli.main import main

    monkeypatch.chdir(tmp_path)

    def call(*arguments) -> Result:
        capsys.readouterr()
        try:
            main([str(a) for a in arguments])
            code = 0
        except SystemExit as stop:
            code = stop.code or 0
        out, err = capsys.readouterr()
        return Result(code, out, err)

    return call
