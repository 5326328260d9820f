"""The printed tables: what a reader takes away.

A table that prints a difference of noise as a number, or an oracle row without its mark, misleads
while every figure in it is right.
"""

from __future__ import annotations

import json
import re
from dataclasses import replace

import numpy as np
import pytest
from test_metrics_records import STOP, episode, random_pair

from ivt_env.metrics.audit import audit
from ivt_env.metrics.columns import Column, columns, outcomes
from ivt_env.metrics.scores import correction_rate, rollout_summary, step_changes
from ivt_env.metrics.table import (
    ORACLE_NOTE,
    as_json,
    compare,
    difference_table,
    headline,
    policy_table,
    render,
    score_rows,
    score_table,
)

FORCED, STOPPING = random_pair(60, 0)
FOUND = columns(episodes_forced=FORCED, episodes_stopping=STOPPING)
IMAGES = outcomes(FORCED).image_ids


def test_a_difference_whose_interval_holds_zero_is_printed_as_not_significant() -> None:
    same = compare("a", FOUND["step_0"], "b", FOUND["step_0"], IMAGES)
    better = compare("oracle", FOUND["oracle_best"], "step 0", FOUND["step_0"], IMAGES, "mIoU")
    assert better.oracle
    lines = difference_table([same, better]).splitlines()
    assert "+0.0 n.s." in lines[2]
    assert "[+0.0, +0.0]" in lines[2]
    assert "n.s." not in lines[3]
    assert f"{better.difference.diff:+.3f}" in lines[3]
    best, first = (replace(c, ious=c.ious[:9], weights=c.weights[:9]) for c in (FOUND["oracle_best"], FOUND["step_0"]))
    few = compare("a", best, "b", first, [str(k) for k in range(9)], "mIoU")
    line = difference_table([few]).splitlines()[2]
    assert f"{few.difference.diff:+.3f} n too small" in line and "n.s." not in line


def test_the_oracle_is_marked_and_explained_wherever_it_is_printed() -> None:
    rows = score_rows("tiny", FOUND, IMAGES, n_boot=100)
    for text in (score_table(rows), policy_table(rows, "Acc@0.5")):
        assert "oracle_best *" in text
        assert text.endswith(ORACLE_NOTE)
    without = [r for r in rows if not r.oracle]
    assert "*" not in score_table(without)
    rows += score_rows("b", columns(episodes_stopping=STOPPING), IMAGES, n_boot=10)
    lines = policy_table(rows, "mIoU").splitlines()
    assert [lines[k].split().count("-") for k in (2, 3)] == [0, 6], "a dash where a rollout is missing"


def test_the_score_table_gives_each_score_in_percent_with_its_interval() -> None:
    rows = score_rows("tiny", FOUND, IMAGES, ["Acc@0.5", "mIoU"], n_boot=100)
    line = score_table(rows).splitlines()[2]
    score = rows[0].scores["Acc@0.5"]
    assert line.split()[:4] == ["tiny", "step_0", "60", "30"]
    cells = [f"{100 * score.value:.1f}", f"[{100 * score.low:.1f},", f"{100 * score.high:.1f}]"]
    assert line.split()[4:7] == cells


def test_text_and_markdown_are_aligned_and_hold_the_same_cells() -> None:
    header, lines = ["name", "x"], [["a|b", "1.0"], ["long name", "10.25"]]
    text, markdown = render(header, lines), render(header, lines, markdown=True)
    assert text == "name           x\n---------  -----\na|b          1.0\nlong name  10.25"
    assert markdown.splitlines()[1:3] == ["| --------- | ----: |", "| a\\|b      |   1.0 |"]
    assert len({len(line) for line in markdown.splitlines()}) == 1
    with pytest.raises(ValueError, match="1 cells under 2 headings"):
        render(header, [["a"]])


def test_the_headline_is_short_and_says_in_words_what_the_difference_says() -> None:
    better, worse, same = (
        [episode([*ious, STOP], f"s{k}") for k in range(40)] for ious in ((0.2, 0.9), (0.9, 0.2), (0.9,))
    )
    audits = {name: audit(stopping=e).as_json() for name, e in {"up": better, "down": worse, "same": same}.items()}
    audits |= {"few": audit(stopping=better[:9]).as_json(), "n" * 50: audits["up"], "b": audits["up"]}
    said = [re.split(" {2,}", line.strip()) for line in headline(audits).splitlines()]
    assert [line[1] for line in said[2:6]] == ["refinement helps", "refinement hurts", "n.s.", "n too small"]
    assert said[2] == ["up", "refinement helps", "0.0", "100.0", "+100.0", "[+100.0, +100.0]"]
    many = headline({str(k): audits["n" * 50] for k in range(99)} | audits).splitlines()
    assert len(many) <= 12 and "and 97 more policies" in many
    assert max(map(len, [*many, *headline(audits).splitlines()])) <= 100


def test_everything_has_a_json_form_without_nan() -> None:
    played = outcomes(FORCED)
    everything = {
        "rows": score_rows("tiny", FOUND, IMAGES, n_boot=10),
        "comparison": compare("a", FOUND["step_0"], "b", FOUND["last_step"], IMAGES),
        "summary": rollout_summary(played),
        "changes": step_changes(outcomes([episode([0.5])])),
        "rate": correction_rate(FOUND["step_0"], FOUND["last_step"]),
        "values": np.array([0.5, np.nan]),
        "column": FOUND["step_0"],
    }
    back = json.loads(json.dumps(as_json(everything), allow_nan=False))
    assert back["values"] == [0.5, None]
    assert back["changes"]["mean_change"] is None
    assert back["rate"]["value"] == pytest.approx(back["rate"]["count"] / back["rate"]["total"])
    assert back["rows"][0]["scores"]["mIoU"]["value"] == pytest.approx(FOUND["step_0"].iou.mean())
    with pytest.raises(TypeError, match="no JSON form for set"):
        as_json({1})


def test_a_random_rule_is_compared_by_its_expectation() -> None:
    ious = np.tile([0.2, 0.8], (40, 1))
    drawn = Column("random_step", ious, np.full_like(ious, 0.5), oracle=False, rollout="forced")
    right = Column("step_0", ious[:, 1:], np.ones((40, 1)), oracle=False, rollout="forced")
    assert compare("a", right, "b", drawn, range(40)).difference.diff == pytest.approx(0.5)
