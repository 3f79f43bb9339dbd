"""The curves picture: valid, self-contained SVG whose points are where the log says."""

from __future__ import annotations

import json
import re
import xml.etree.ElementTree as ET

import pytest

from moesaic.core.errors import BadInput
from moesaic.report.curves import Panel, main, read_run, smooth, svg, ticks


def write(tmp_path, name, steps=40, load=True):
    folder = tmp_path / name
    folder.mkdir()
    rows = []
    for step in range(0, steps, 2):
        row = {"step": step, "loss": 8 - step / 10}
        if load:
            row["max_vio"] = [0.5, 1.5]
        if step % 10 == 8:
            row["valid_loss"] = 8 - step / 10 + 0.1
        rows.append(json.dumps(row))
    (folder / "log.jsonl").write_text("\n".join(rows) + '\n{"step": 99, "lo')
    return folder


def test_reads_a_log_and_skips_its_torn_last_line(tmp_path):
    run = read_run(write(tmp_path, "one"))
    assert (run.name, len(run.loss), run.loss[-1]) == ("one", 20, (39, 8 - 3.8))
    assert run.valid[0] == (9, pytest.approx(7.3))
    assert run.load[0] == (1, 2.0)


def test_the_picture_names_each_run_with_its_last_validation_loss(tmp_path):
    picture = svg([read_run(write(tmp_path, "moe")), read_run(write(tmp_path, "dense & co", 30, load=False))])
    root = ET.fromstring(picture)
    words = ["".join(t.itertext()) for t in root.iter("{http://www.w3.org/2000/svg}text")]
    assert "moe  4.300" in words
    assert "dense & co  5.300" in words
    assert "moe  2.00" in words
    assert not any(word.startswith("dense & co  2") for word in words)
    assert not re.search(r"href|url\(|<script", picture)


def test_a_panel_puts_values_where_they_belong():
    panel = Panel("t", 100, 200, 50, 0, 10)
    assert panel.x(25) == pytest.approx((panel.x(0) + panel.x(50)) / 2)
    assert panel.y(10) < panel.y(5) < panel.y(0)
    assert panel.y(5) == pytest.approx(200)
    assert panel.y(1e9) == panel.top


def test_smoothing_is_a_weighted_mean():
    assert smooth([(1, 4.0), (2, 4.0), (3, 4.0)]) == [(1, 4.0), (2, pytest.approx(4.0)), (3, pytest.approx(4.0))]
    assert smooth([(1, 0.0), (2, 1.0)], 0.5)[1][1] == pytest.approx(1 / 1.5)


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(0, 10, [0, 2, 4, 6, 8, 10]), (4.1, 7.9, [5, 6, 7]), (0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1]), (3, 3, [3])],
)
def test_ticks_are_round(low, high, expected):
    assert ticks(low, high) == pytest.approx(expected)


def test_command(tmp_path, capsys):
    out = tmp_path / "c.svg"
    assert main([str(write(tmp_path, "one")), "--out", str(out)]) == 0
    assert out.read_text().startswith("<svg")
    assert main([str(tmp_path / "gone"), "--out", str(out)]) == 2
    assert "no training log" in capsys.readouterr().err
    (tmp_path / "log.jsonl").write_text("")
    with pytest.raises(BadInput, match="no training records"):
        read_run(tmp_path)
