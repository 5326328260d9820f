"""``ivt score`` on the embedded data sets, where the right answer is known by hand.

If one of these is false, someone publishes a number that their predictions do not have.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import ivt_env
from ivt_agents import cli
from ivt_env.data import load_dataset
from ivt_env.metrics.benchmarks import targets_px

ROOT = Path(ivt_env.__path__[0]).parent
PHOTOS = [load_dataset("photos", "test")[i] for i in range(16)]


def main(words: list[str]) -> int:
    return cli.main(["score", *words])


PX = ("--format", "xyxy", "--frame", "px")


def save(path: Path, samples: list[Any], boxes_px: list[Any]) -> Path:
    rows = [{"sample_id": s.sample_id, "box": b} for s, b in zip(samples, boxes_px, strict=True)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def perfect(tmp_path: Path) -> Path:
    return save(tmp_path / "perfect.jsonl", PHOTOS, targets_px(PHOTOS).tolist())


def record(capsys: pytest.CaptureFixture[str], *arguments: object, status: int = 0) -> dict[str, Any]:
    assert main([*map(str, arguments), "--json"]) == status
    output, errors = capsys.readouterr()
    assert errors == ""
    found: dict[str, Any] = json.loads(output)
    return found


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The one line about wrong input."""
    assert main([*map(str, arguments)]) == 2
    output, errors = capsys.readouterr()
    assert output == "" and errors.startswith("error: ") and errors.count("\n") == 1
    return errors


def values(found: dict[str, Any], rule: str = "common") -> dict[str, float]:
    return {row["metric"]: row["value"] for row in found["rules"][rule]["rows"]}


def test_perfect_predictions_score_100(capsys: pytest.CaptureFixture[str], perfect: Path) -> None:
    found = record(capsys, perfect, "--dataset", "photos", "--split", "test", *PX)
    assert values(found) == {"Acc@0.5": 1, "Acc@0.75": 1, "Acc@0.9": 1, "mAcc": 1, "mIoU": 1}
    assert {row["n"] for row in found["rules"]["common"]["rows"]} == {16} and found["images"] == 5
    assert (found["missing"], found["parse_failures"], found["without_area"], found["ignored"]) == (0, 0, 0, 0)
    assert found["rules"]["common"]["rows"][0]["low"] == found["rules"]["common"]["rows"][0]["high"] == 1
    assert found["dataset"] == "photos" and found["declared"] == "xyxy px"


def test_shifted_boxes_score_what_hand_arithmetic_says(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    targets = targets_px(PHOTOS)
    shifted = (targets + (targets[:, 2:3] - targets[:, :1]) / 2 * [1, 0, 1, 0]).tolist()
    path = save(tmp_path / "shifted.jsonl", PHOTOS, shifted)
    on_photos = ("--dataset", "photos", "--split", "test", *PX)
    assert "reach far outside their image" in refused(capsys, path, *on_photos)
    rows = [{"id": s.sample_id, "bbox": box, "texts": ["x"]} for s, box in zip(PHOTOS, shifted, strict=True)]
    for header in ({}, {"format": "xyxy", "frame": "px"}):  # the other spelling of the fields
        path.write_text("".join(json.dumps(row) + "\n" for row in [header, *rows] if row))
        assert "reach far outside their image" in refused(capsys, path, *on_photos)
    found = values(record(capsys, path, *on_photos, "--trust-declaration"))
    assert found == {"Acc@0.5": 0, "Acc@0.75": 0, "Acc@0.9": 0, "mAcc": 0, "mIoU": pytest.approx(1 / 3)}


def test_the_own_rule_stands_beside_the_common_one(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    halves = [[b[0], b[1], b[2], (b[1] + b[3]) / 2] for b in targets_px(PHOTOS).tolist()]  # IoU 0.5 exactly
    path = save(tmp_path / "halves.jsonl", PHOTOS, halves)
    on_photos = ("--dataset", "photos", "--split", "all", *PX, "--rule", "vlmr1")
    found = record(capsys, path, *on_photos)
    assert values(found)["Acc@0.5"] == 1 and values(found)["mAcc"] == pytest.approx(0.1)
    assert values(found, "vlmr1") == {"Acc@0.5": 0}
    assert main([str(path), *on_photos]) == 0
    printed = capsys.readouterr().out
    line = next(line for line in printed.splitlines() if line.startswith("Acc@0.5 (%)"))
    assert line.split()[2:4] == ["16", "100.00"] and line.split()[6] == "0.00"
    assert printed.splitlines()[-7].startswith("metric"), "the numbers come last"
    assert "common: IoU >= 0.5" in printed and "vlmr1: IoU > 0.5" in printed
    assert "category None" in refused(capsys, path, *on_photos[:-1], "refl4")


def test_scenes_are_scored_in_thousandths_over_the_first_samples(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ivt_env.commands.score._MOST_SAMPLES", 5)  # a number that is given may be larger
    dataset = load_dataset("scenes", "val")
    samples = [dataset[i] for i in range(6)]
    thousandths = [[1000 * v for v in (*s.box[:2], s.box[2] - s.box[0], s.box[3] - s.box[1])] for s in samples]
    path = save(tmp_path / "scenes.jsonl", samples, [*thousandths[:4], None, None])
    words = f"{path} --dataset scenes --split val --format xywh --frame thousandths --samples".split()
    found = record(capsys, *words, 6)
    assert values(found)["mIoU"] == pytest.approx(4 / 6) and values(found)["mAcc"] == pytest.approx(4 / 6)
    assert found["parse_failures"] == 2 and (found["samples"], found["samples_of_split"]) == (6, 10_000)
    assert found["rules"]["common"]["rows"][0]["low"] < 4 / 6 < found["rules"]["common"]["rows"][0]["high"]
    assert "1 of 7 samples have no prediction" in refused(capsys, *words, 7)
    missed = record(capsys, *words, 8, "--missing", "miss")
    assert missed["missing"] == 2 and values(missed)["Acc@0.5"] == pytest.approx(4 / 8)
    assert record(capsys, *words, 4, "--extra", "ignore")["ignored"] == 2
    assert main([*words, "6", "--resamples", "0"]) == 0
    printed = capsys.readouterr().out
    assert "6 samples (the first of 10000)" in printed and "0 missing, 2 parse failures" in printed
    assert "interval" not in printed and "[" not in printed


def test_wrong_input_is_one_line_and_status_2(
    capsys: pytest.CaptureFixture[str], perfect: Path, tmp_path: Path
) -> None:
    photos, declared = "--dataset photos --split test", " ".join(PX)
    for words, said in (
        (photos, "declared nowhere"),
        (f"--dataset photos --split tset {declared}", "no split 'tset'"),
        (f"--dataset refcocog --split test --data-root {tmp_path}/nothing {declared}", "refcocog"),
        (f"--dataset refl4 --split test --data-root ~no-such-user/x {declared}", "no such home folder"),
        (f"--dataset scenes --split train {declared}", "say how many with --samples"),
        (f"{photos} {declared} --samples 0", "--samples 0"),
        (f"{photos} {declared} --samples 17", "--samples 17: photos test has 16"),
        (f"{photos} {declared} --resamples -1", "--resamples -1"),
        (f"{photos} {declared} --resamples 100001", "--resamples 100001: give 100000"),
        (f"{photos} {declared} --seed -1", "--seed -1: give 0 or more"),
    ):
        assert said in refused(capsys, perfect, *words.split())
    assert "cannot be read" in refused(capsys, tmp_path / "absent.jsonl", *photos.split(), *PX)
    for content, word in (("[", "cannot be read"), ("[]", "holds a list"), ('{"refcoco_1": 1}', "'refcoco_1': 1")):
        mapping = tmp_path / "map.json"
        mapping.write_text(content)
        assert word in refused(capsys, perfect, *photos.split(), *PX, "--category-map", mapping)
    for usage in ([], [str(perfect), *photos.split(), "--format", "ltrb"], [str(perfect), "--dataset", "photo"]):
        assert main(usage) == 2
        output, errors = capsys.readouterr()
        assert output == "" and "error: " in errors.splitlines()[-1]


def test_the_command_runs_without_torch_and_prints_json_only(perfect: Path) -> None:
    code = (
        "import sys; from ivt_agents.cli import main; status = main(['score', *sys.argv[1:]]);"
        "assert 'torch' not in sys.modules; sys.exit(status)"
    )
    words = [sys.executable, "-c", code, str(perfect), "--dataset", "photos", "--split", "test", *PX, "--json"]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(words, cwd=perfect.parent, env=env, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    assert json.loads(done.stdout)["rules"]["common"]["rows"][0]["value"] == 1


def test_the_projects_own_data_are_read_as_predictions_with_the_ids_of_their_lines(capsys, tmp_path: Path) -> None:
    rows = [
        {"image": "chelsea.jpg", "expression": "the eye on the left", "bbox": [133, 87, 207, 148]},
        {"id": "cup", "image": "coffee.jpg", "expression": "the cup", "bbox": [174, 16, 412, 302]},
    ]
    photos = ROOT / "ivt_env" / "assets" / "photos"
    for name in ("chelsea.jpg", "coffee.jpg"):
        (tmp_path / name).write_bytes((photos / name).read_bytes())
    (tmp_path / "dataset.json").write_text('{"name": "mine", "box": "xyxy", "frame": "px"}')
    (tmp_path / "val.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    where = ("--dataset", "custom", "--split", "val", "--data-root", tmp_path)
    found = record(capsys, tmp_path / "val.jsonl", *where)
    assert set(values(found).values()) == {1}
    assert "dataset.json says xyxy" in refused(capsys, tmp_path / "val.jsonl", *where, "--format", "xywh")
