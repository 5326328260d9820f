"""The benchmark of growth runs whole commands; its unit costs are differences between two sizes."""

from __future__ import annotations

import json
import re

import pytest

from benchmarks.growth import Args, main


def test_it_measures_commands_and_divides_what_they_cost_more_by_what_they_did_more(tmp_path, capfd):
    main(Args(only=("score", "check"), score=(200, 2000), check=(40, 400), json=tmp_path / "rows.json"))
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert [(row["part"], row["size"]) for row in rows] == [
        ("score", 200),
        ("score", 2000),
        ("check", 40),
        ("check", 400),
    ]
    assert all(row["seconds"] > 0 and row["processor"] > 0 and row["peak_mb"] > 20 for row in rows)
    said = re.findall(r"^ +([\d,]+) .*  (-?[\d.]+), -?[\d.]+ kB", capfd.readouterr().out, re.M)
    assert [size for size, _ in said] == ["2,000", "400"]
    for (_, shown), (small, large) in zip(said, (rows[:2], rows[2:]), strict=True):
        each = 1000 * (large["seconds"] - small["seconds"]) / (large["size"] - small["size"])
        assert float(shown) == pytest.approx(each, abs=1e-3)
