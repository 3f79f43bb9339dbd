"""Tables and the picture of compression, from rows."""

from moesaic.report.compression import front, label, picture, table


def row(method, share, bits, size, family="prune", **options):
    return {"family": family, "method": method, "options": {"keep": share, **options}, "share": share, "bits_per_byte": bits,
            "expert_bytes": size, "seconds": 1.0, "tokens_per_second": 50.0, "stock": family == "prune"}  # fmt: skip


RESULT = {
    "domain": None,
    "rows": [
        row("untouched", 1.0, 1.2, 100, family=""),
        row("random", 0.5, 2.0, 50),
        row("reap", 0.5, 1.4, 50),
        row("reap", 0.25, 1.9, 25),
        row("m_smoe", 0.5, 1.6, 40, family="merge", router="collapse"),
        row("m_smoe", 0.5, 1.7, 60, family="merge"),
    ],
}


def test_the_best_comes_first_and_variants_are_told_apart():
    lines = table(RESULT).splitlines()
    assert [line.split("|")[1].strip() for line in lines[2:]] == [
        "untouched", "prune reap", "merge m_smoe (collapse)", "merge m_smoe", "prune random",
    ]  # fmt: skip
    assert "| 1.4000 | 1.9000 |" in lines[3] and lines[3].endswith("| yes |")


def test_what_another_row_beats_in_both_is_not_on_the_front():
    assert [label(each) for each in front(RESULT)] == [" untouched", "prune reap", "merge m_smoe (collapse)", "prune reap"]


def test_the_picture_names_methods_and_escapes_nothing_away():
    drawn = picture([RESULT, {**RESULT, "domain": "python"}])
    assert drawn.count("<polyline") == 8 and "of python" in drawn and "prune random" in drawn
