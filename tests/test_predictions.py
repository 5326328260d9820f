"""Files of predictions: the declared convention is the one that is used, and every miss is counted.

If one of these is false, a score is wrong by points without any error: a box read in another
convention still is a box, and an answer that is dropped instead of counted makes a model better.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ivt_env.data.sample import Sample
from ivt_env.metrics.benchmarks import score, targets_px
from ivt_env.metrics.predictions import FORMATS, FRAMES, LAYOUTS, Matched, PredictionError, match, read_predictions

SIZE = (427, 640)
INPUT = (416, 640)


def sample(number: int, box_px: tuple[float, ...] = (100, 100, 200, 200), size: tuple[int, int] = SIZE) -> Sample:
    height, width = size
    box = (box_px[0] / width, box_px[1] / height, box_px[2] / width, box_px[3] / height)
    return Sample(f"ref-{number}", f"image-{number}", "it", box, size, "made", "test")


SAMPLES = [sample(i) for i in range(40)]


def written(box_px: tuple[float, ...], box_format: str, frame: str, size: tuple[int, int] = SIZE) -> list[float]:
    """xyxy pixels in another convention, one formula at a time."""
    height, width = size
    unit = {
        "px": (1, 1),
        "relative": (1 / width, 1 / height),
        "thousandths": (1000 / width, 1000 / height),
        "resized": (INPUT[1] / width, INPUT[0] / height),
    }[frame]
    x1, y1, x2, y2 = box_px[0] * unit[0], box_px[1] * unit[1], box_px[2] * unit[0], box_px[3] * unit[1]
    if box_format == "xyxy":
        return [x1, y1, x2, y2]
    if box_format == "xywh":
        return [x1, y1, x2 - x1, y2 - y1]
    return [(x1 + x2) / 2, (y1 + y2) / 2, x2 - x1, y2 - y1]


def save(folder: Path, *rows: Any, name: str = "made.jsonl") -> Path:
    path = folder / name
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def answers(boxes: list[Any], **more: Any) -> list[dict[str, Any]]:
    return [{"sample_id": f"ref-{i}", "box": box, **more} for i, box in enumerate(boxes)]


def matched(path: Path, samples: list[Sample], box_format: str = "xyxy", frame: str = "px", **more: Any) -> Matched:
    return match(read_predictions(path, box_format=box_format, frame=frame), samples, **more)


def refused(path: Path, *, layout: str = "ivt", **options: Any) -> str:
    with pytest.raises(PredictionError) as caught:
        read_predictions(path, layout, **options)
    message = str(caught.value)
    assert str(path) in message
    return message


@st.composite
def boxes_px(draw: st.DrawFn) -> list[tuple[float, ...]]:
    found = []
    for _ in range(draw(st.integers(1, 8))):
        x1, y1 = draw(st.integers(0, 500)), draw(st.integers(0, 300))
        found.append((x1, y1, x1 + draw(st.integers(40, 140)), y1 + draw(st.integers(40, 127))))
    return found


@settings(max_examples=25, deadline=None)
@given(boxes_px(), boxes_px(), st.randoms(use_true_random=False))
def test_every_convention_and_any_order_give_the_same_score(tmp_path_factory, predicted, targets, random) -> None:
    n = min(len(predicted), len(targets))
    samples = [sample(i, box) for i, box in enumerate(targets[:n])]
    expected = score("common", predicted[:n], samples)
    folder = tmp_path_factory.mktemp("conventions")
    for box_format in sorted(FORMATS.keys() - {"xy"}):
        for frame in FRAMES:
            boxes = [written(box, box_format, frame) for box in predicted[:n]]
            rows = answers(boxes, input_size=list(INPUT))
            random.shuffle(rows)
            found = matched(save(folder, *rows), samples, box_format, frame)
            np.testing.assert_allclose(found.boxes_px, predicted[:n], atol=1e-9)
            assert (found.missing, found.parse_failures, found.without_area, found.ignored) == (0, 0, 0, 0)
            assert score("common", found.boxes_px, samples).rows == expected.rows


def test_header_and_options_declare_and_must_agree(tmp_path: Path) -> None:
    rows = answers([[1, 2, 30, 40]])
    headed = save(tmp_path, {"format": "xywh", "frame": "px"}, *rows, name="headed.jsonl")
    plain = save(tmp_path, *rows, name="plain.jsonl")
    half = save(tmp_path, {"frame": "px"}, *rows, name="half.jsonl")
    assert match(read_predictions(headed), SAMPLES[:1]).boxes_px.tolist() == [[1, 2, 31, 42]]
    assert read_predictions(headed, box_format="xywh", frame="px").declared == "xywh px"
    assert read_predictions(half, box_format="xyxy").declared == "xyxy px"
    assert match(read_predictions(plain, box_format="xyxy", frame="px"), SAMPLES[:1]).boxes_px.tolist() == [
        [1, 2, 30, 40]
    ]
    message = refused(headed, box_format="xyxy")
    assert "--format says format xyxy" in message and "the header line says xywh" in message
    assert "--frame says frame relative" in refused(headed, frame="relative")
    for missing in (refused(plain), refused(half), refused(plain, frame="px")):
        assert "format" in missing and "not guessed" in missing and "--format" in missing and "xywh" in missing
    assert "the frame of the boxes is declared nowhere" in refused(plain, box_format="xyxy")
    typo = save(tmp_path, {"format": "yxyx", "frame": "px"}, *rows, name="typo.jsonl")
    assert "'yxyx'; choose one of xyxy, xywh, cxcywh" in refused(typo)
    extra = save(tmp_path, {"format": "xyxy", "frame": "px", "model": "m"}, *rows, name="extra.jsonl")
    assert "unknown key 'model'" in refused(extra)
    for odd, said in (({"format": "xywh"}, "format xywh, but xyxy"), ({"frame": "relative"}, "frame relative, but px")):
        path = save(tmp_path, *rows, {"sample_id": "ref-1", "box": [1, 2, 3, 4], **odd})
        assert f"row 2 says {said} is declared" in refused(path, box_format="xyxy", frame="px")


def test_resized_boxes_need_the_input_size_of_their_row(tmp_path: Path) -> None:
    good = {"sample_id": "ref-0", "box": [64, 208, 128, 416], "input_size": [416, 640]}
    found = matched(save(tmp_path, good), SAMPLES[:1], frame="resized")
    np.testing.assert_allclose(found.boxes_px, [[64, 213.5, 128, 427]])
    for bad in (None, [416], [0, 640], "416x640", [True, 640]):
        path = save(tmp_path, {**good, "input_size": bad})
        message = refused(path, box_format="xyxy", frame="resized")
        assert "row 1: input_size" in message and "[height, width]" in message
    unanswered = save(tmp_path, good, {"sample_id": "ref-1", "box": None})
    assert matched(unanswered, SAMPLES[:2], frame="resized").parse_failures == 1


def test_published_layouts_are_read_as_they_are(tmp_path: Path) -> None:
    samples = [Sample(str(i), "p", "it", (0.1, 0.1, 0.5, 0.5), SIZE, "refl4", "test") for i in range(2)]
    ref_l4 = tmp_path / "pred.json"
    ref_l4.write_text(
        json.dumps(
            [
                {"id": 1, "pred_bbox": [10, 20, 30, 40], "format": "xyxy"},
                {"id": 0, "pred_bbox": [10, 20, 30, 40], "format": "xywh"},
            ],
            indent=1,
        )
    )
    file = read_predictions(ref_l4, "refl4")
    assert match(file, samples).boxes_px.tolist() == [[10, 20, 40, 60], [10, 20, 30, 40]]
    assert file.declared == "xywh px, xyxy px"
    assert "row 2 says format xywh, but xyxy is declared" in refused(ref_l4, layout="refl4", box_format="xyxy")
    assert "layout refl4 says px" in refused(ref_l4, layout="refl4", frame="thousandths")
    bad = save(tmp_path, {"id": 0, "pred_bbox": [1, 2, 3, 4], "format": "ltrb"})
    assert "row 1: format is 'ltrb'" in refused(bad, layout="refl4")
    ref_adv = save(
        tmp_path,
        {"row_idx": 0, "file_name": "a.jpg", "pred_box_xyxy_first": [1.5, 2, 30, 40], "parse_error": ""},
        {"row_idx": 1, "file_name": "a.jpg", "pred_box_xyxy_first": [], "parse_error": "no_bbox_found"},
    )
    found = match(read_predictions(ref_adv, "refadv"), samples)
    assert found.boxes_px[0].tolist() == [1.5, 2, 30, 40] and found.parse_failures == 1
    own = save(tmp_path, {"name": "0", "answer": [1, 2, 3, 4]}, {"name": "1", "answer": [1, 2, 3, 4]})
    file = read_predictions(own, id_field="name", box_field="answer", box_format="xyxy", frame="px")
    assert match(file, samples).boxes_px.shape == (2, 4)
    assert set(LAYOUTS) == {"ivt", "refl4", "refadv"}


def test_unusable_boxes_are_counted_misses(tmp_path: Path) -> None:
    bad = [None, [], [1, 2, 3], [1, 2, 3, "4"], [1, 2, 3, True], "[1, 2, 3, 4]", [1, 2, 3, 1e12], {"x": 1}]
    good = [[100, 100, 200, 200]] * (38 - len(bad))
    rows = answers([*bad, *good])
    rows += [{"sample_id": "ref-39", "box": [200, 100, 100, 200]}]
    path = save(tmp_path, *rows, '{"sample_id": "ref-38", "box": [NaN, 1, Infinity, 3]}')
    found = matched(path, SAMPLES)
    assert (found.missing, found.parse_failures, found.without_area) == (0, len(bad) + 1, 1)
    assert np.isnan(found.boxes_px[: len(bad)]).all() and np.isfinite(found.boxes_px[len(bad) : 38]).all()
    rows_of = {row.metric: row for row in score("common", found.boxes_px, SAMPLES).rows}
    assert rows_of["Acc@0.5"].n == 40 and rows_of["Acc@0.5"].value == pytest.approx(len(good) / 40)


def test_a_missing_prediction_is_an_error_unless_it_shall_be_a_miss(tmp_path: Path) -> None:
    path = save(tmp_path, *answers([[100, 100, 200, 200]] * 3))
    with pytest.raises(PredictionError, match=r"made.jsonl: 2 of 5 samples have no prediction, the first 'ref-3'"):
        matched(path, SAMPLES[:5])
    found = matched(path, SAMPLES[:5], missing="miss")
    assert found.missing == 2 and np.isnan(found.boxes_px[3:]).all()
    assert score("common", found.boxes_px, SAMPLES[:5]).rows[0].value == pytest.approx(3 / 5)


def test_an_id_twice_or_of_no_sample_is_an_error(tmp_path: Path) -> None:
    rows = answers([[100, 100, 200, 200]] * 2)
    message = refused(save(tmp_path, *rows, rows[0]), box_format="xyxy", frame="px")
    assert "rows 1 and 3 both answer 'ref-0'" in message
    stranger = save(tmp_path, *rows, {"sample_id": "reff-1", "box": None})
    with pytest.raises(PredictionError, match=r"1 of 3 rows .* made test has not.* row 3: 'reff-1'.*'ref-1'"):
        matched(stranger, SAMPLES[:2])
    assert matched(stranger, SAMPLES[:2], extra="ignore").ignored == 1
    foreign = save(tmp_path, {"sample_id": "zzz", "box": [1, 2, 3, 4]})
    with pytest.raises(PredictionError, match="'zzz'; ids there are like 'ref-0'"):
        matched(foreign, SAMPLES[:2], missing="miss", extra="ignore")  # nothing would be left to score
    for bad in (True, 1.5, None, ["ref-0"]):
        assert "neither a text nor a whole number" in refused(
            save(tmp_path, {"sample_id": bad, "box": None}), box_format="xyxy", frame="px"
        )


@pytest.mark.parametrize(
    ("true", "declared", "word"),
    [
        (("xywh", "px"), ("xyxy", "px"), "probably xywh"),
        (("cxcywh", "px"), ("xyxy", "px"), "have no area"),
        (("xyxy", "px"), ("xywh", "px"), "probably xyxy"),
        (("xyxy", "px"), ("cxcywh", "px"), "probably xyxy"),
        (("xyxy", "relative"), ("xyxy", "px"), "probably another frame"),
        (("xyxy", "relative"), ("xyxy", "thousandths"), "probably another frame"),
        (("xyxy", "px"), ("xyxy", "relative"), "probably another frame"),
        (("xyxy", "thousandths"), ("xyxy", "px"), "probably another frame"),
    ],
)
def test_a_declaration_that_does_not_fit_is_refused(tmp_path: Path, true, declared, word: str) -> None:
    boxes = [(300 + 3 * i, 200 + 2 * i, 460 + 4 * i, 300 + 3 * i) for i in range(40)]
    samples = [sample(i, box) for i, box in enumerate(boxes)]
    path = save(tmp_path, *answers([written(box, *true) for box in boxes]))
    with pytest.raises(PredictionError) as caught:
        matched(path, samples, *declared)
    message = str(caught.value)
    assert (
        word in message
        and "made.jsonl" in message
        and "the first is row " in message
        and "--trust-declaration" in message
    )
    assert f"read as {declared[0]} {declared[1]}" in message
    matched(path, samples, *declared, trust=True)
    assert score("common", matched(path, samples, *true).boxes_px, samples).rows[0].value == 1


def test_few_misfits_are_the_models_fault_and_counted(tmp_path: Path) -> None:
    boxes = [[100.0, 100.0, 200.0, 200.0] for _ in range(40)]
    boxes[3], boxes[7] = [200, 100, 100, 200], [100, 100, 100, 200]
    assert matched(save(tmp_path, *answers(boxes)), SAMPLES).without_area == 2  # exactly 5 %
    boxes[9] = [5, 5, 5, 5]
    with pytest.raises(PredictionError, match="3 of 40 boxes"):
        matched(save(tmp_path, *answers(boxes)), SAMPLES)
    one_of_two = save(tmp_path, *answers([[200, 100, 100, 200], [100, 100, 200, 200]]))
    assert matched(one_of_two, SAMPLES[:2]).without_area == 1
    # Boxes without area in any format say nothing against the declaration.
    file = save(tmp_path, *answers([[30, 40, 0, 0]] * 8 + [[100, 100, 200, 200]] * 12))
    assert matched(file, SAMPLES[:20]).without_area == 8


@pytest.mark.parametrize("mark", [[0, 0, 0, 0], [0.0, 0, 0, 0.0], [-1, -1, -1, -1]])
@pytest.mark.parametrize("box_format", ["xyxy", "xywh", "cxcywh"])
@pytest.mark.parametrize("frame", ["px", "thousandths", "relative"])
@pytest.mark.parametrize("share", [0.06, 0.4, 1.0])
def test_failed_predictions_are_counted_whatever_their_share(tmp_path: Path, mark, box_format, frame, share) -> None:
    samples = [sample(n) for n in range(50)]
    right = written((100, 100, 200, 200), box_format, frame)
    failed = round(50 * share)
    file = save(tmp_path, *answers([mark] * failed + [right] * (50 - failed)))
    found = matched(file, samples, box_format, frame)
    assert (found.parse_failures, found.without_area, found.missing) == (failed, 0, 0)
    assert score("common", found.boxes_px, samples).rows[0].value == pytest.approx(1 - failed / 50)


@pytest.mark.parametrize(("frame", "unit"), [("999", 999), (999, 999), ("999ths", 999), ("1024", 1024), ("1000", 1000)])
def test_any_whole_number_is_a_frame(tmp_path: Path, frame, unit) -> None:
    height, width = SIZE
    box = [100 / width * unit, 100 / height * unit, 200 / width * unit, 200 / height * unit]
    file = save(tmp_path, {"format": "xyxy", "frame": frame}, *answers([box]))
    found = match(read_predictions(file), [sample(0)])
    assert np.allclose(found.boxes_px, [[100, 100, 200, 200]], rtol=0, atol=1e-9)


@pytest.mark.parametrize("frame", ["1", "0", "-5", "9.5", "percent", "1e3", True, [999], None, "99999999999"])
def test_other_frames_are_refused_with_the_choices(tmp_path: Path, frame) -> None:
    file = save(tmp_path, *answers([[1, 2, 3, 4]]))
    said = refused(file, box_format="xyxy", frame=frame)
    assert "whole number N for 0 to N (999, 1024, ...)" in said or "declared nowhere" in said


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            '{\n "accuracy": 1,\n "results": [\n {"sample_id": 1}]\n}',
            "'results' is a list of 1 objects; write that list to a",
        ),
        ('{\n "accuracy": 1\n}', "one JSON object over several lines, and what is scored is JSON lines"),
        ('{\n "sample_id": 1\n}\n{\n "sample_id": 2\n}', "JSON objects that go over several lines.*jq -c"),
        (
            '{"accuracy": 1, "predictions": [{"sample_id": 1}, {}]}',
            "'predictions' is a list of 2 objects; write that list",
        ),
    ],
)
def test_other_shapes_of_json_are_named_with_what_is_wanted(tmp_path: Path, text, said) -> None:

    assert re.search(said, refused(save(tmp_path, text), box_format="xyxy", frame="px"))


def test_one_huge_value_takes_no_memory_to_speak_of(tmp_path: Path) -> None:
    """One id of 200 MB took 7.9 GB: it was compared with every id letter by letter."""
    rows = ('{"sample_id": "HUGE", "box": [1, 2, 3, 4]}', '{"HUGE": 1}', '{"sample_id": 1, "box": "HUGE"}')
    files = [tmp_path / f"made{k}.jsonl" for k in range(4)]
    for file, row in zip(files, (*rows, '[{"sample_id": "HUGE", "box": null}]'), strict=True):
        file.write_text(row.replace("HUGE", "ab" * (60 << 20)))
    code = (
        "import sys; from ivt_env.metrics.predictions import PredictionError, read_predictions\n"
        "for path in sys.argv[1:]:\n"
        "    try: read_predictions(path, box_format='xyxy', frame='px')\n"
        "    except PredictionError as error: print(len(str(error)))\n"
        "print(next(line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM')))"
    )
    out = subprocess.run([sys.executable, "-c", code, *files], capture_output=True, text=True, check=True, timeout=120)
    *letters, kilobytes = map(int, out.stdout.split())
    assert len(letters) == 4 and max(letters) < 1000 and kilobytes < 500_000


def test_a_broken_file_names_row_and_remedy(tmp_path: Path) -> None:
    declared = {"box_format": "xyxy", "frame": "px"}
    good = answers([[1, 2, 3, 4]])[0]
    for rows, word in (
        ([], "holds no predictions"),
        ([{"format": "xyxy", "frame": "px"}], "holds no predictions"),
        ([good, '{"sample_id": "ref-1", "bo'], "row 2 is no JSON"),
        (
            [{**good, "sample_id": "x" * 1001}],
            "row 1: sample_id has 1001 characters, too many for an id (at most 1000)",
        ),
        ([good, "[1, 2]"], "row 2 is [1, 2], not a JSON object"),
        (["[1, 2"], "not a whole JSON array"),
        ([good, {"id": "ref-1", "box": None}], "row 2 has no field 'sample_id'"),
        ([good, {"sample_id": "ref-1", "bbox": None}], "--box-field"),
        ([{**good, "box": "[1, 2, 3, 4]"}, {"sample_id": "ref-1", "box": None}], "no row has four numbers in 'box'"),
    ):
        assert word in refused(save(tmp_path, *rows), **declared)
    assert "cannot be read" in refused(tmp_path / "absent.jsonl", **declared)
    binary = tmp_path / "binary.jsonl"
    binary.write_bytes(b"\xff\xfe\x00")
    assert "not UTF-8" in refused(binary, **declared)
    deep = save(tmp_path, "[" * 100_000)
    assert "not a whole JSON array" in refused(deep, **declared)
    with pytest.raises(PredictionError, match="no layout 'coco'"):
        read_predictions(deep, "coco")
    with pytest.raises(PredictionError, match="2 samples have 1 ids"):
        matched(save(tmp_path, *answers([None])), [SAMPLES[0], SAMPLES[0]])
    # Blank lines, a byte order mark and odd separators do no harm.
    text = '{"sample_id": "ref-0", "box": [100, 100, 200, 200], "text": "a\u2028b"}\r\n\r\n'
    binary.write_bytes(b"\xef\xbb\xbf" + text.encode())
    np.testing.assert_allclose(matched(binary, SAMPLES[:1]).boxes_px, targets_px(SAMPLES[:1]))
