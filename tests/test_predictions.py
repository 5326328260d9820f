"""Files of predictions: the declared convention is the one that is used, and every miss is counted.

If one of these is false, a score is wrong by points without any error: a box read in another
convention still is a box, and an answer that is dropped instead of counted makes a model better.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ivt_env.data.sample import Sample
from ivt_env.metrics.benchmarks import common, targets_px
from ivt_env.metrics.predictions import (
    FORMATS,
    FRAMES,
    LAYOUTS,
    Matched,
    PredictionError,
    match,
    read_predictions,
)

SIZE = (427, 640)
INPUT = (416, 640)


def sample(number: int, box_px: tuple[float, ...] = (100, 100, 200, 200), size: tuple[int, int] = SIZE) -> Sample:
    height, width = size
    box = (box_px[0] / width, box_px[1] / height, box_px[2] / width, box_px[3] / height)
    return Sample(f"ref-{number}", f"picture-{number}", "it", box, size, "made", "test")


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
    expected = common(predicted[:n], samples)
    folder = tmp_path_factory.mktemp("conventions")
    for box_format in FORMATS:
        for frame in FRAMES:
            boxes = [written(box, box_format, frame) for box in predicted[:n]]
            rows = answers(boxes, input_size=list(INPUT))
            random.shuffle(rows)
            found = matched(save(folder, *rows), samples, box_format, frame)
            np.testing.assert_allclose(found.boxes_px, predicted[:n], atol=1e-9)
            assert (found.missing, found.parse_failures, found.without_area, found.ignored) == (0, 0, 0, 0)
            assert common(found.boxes_px, samples).rows == expected.rows


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


def test_a_row_may_not_contradict_the_declaration(tmp_path: Path) -> None:
    path = save(tmp_path, *answers([[1, 2, 3, 4]]), {"sample_id": "ref-1", "box": [1, 2, 3, 4], "format": "xywh"})
    assert "row 2 says format xywh, but xyxy is declared" in refused(path, box_format="xyxy", frame="px")
    path = save(tmp_path, {"sample_id": "ref-1", "box": [1, 2, 3, 4], "frame": "relative"})
    assert "row 1 says frame relative, but px" in refused(path, box_format="xyxy", frame="px")


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
    rows_of = {row.metric: row for row in common(found.boxes_px, SAMPLES).rows}
    assert rows_of["Acc@0.5"].n == 40 and rows_of["Acc@0.5"].value == pytest.approx(len(good) / 40)


def test_a_missing_prediction_is_an_error_unless_it_shall_be_a_miss(tmp_path: Path) -> None:
    path = save(tmp_path, *answers([[100, 100, 200, 200]] * 3))
    with pytest.raises(PredictionError, match=r"made.jsonl: 2 of 5 samples have no prediction, the first 'ref-3'"):
        matched(path, SAMPLES[:5])
    found = matched(path, SAMPLES[:5], missing="miss")
    assert found.missing == 2 and np.isnan(found.boxes_px[3:]).all()
    assert common(found.boxes_px, SAMPLES[:5]).rows[0].value == pytest.approx(3 / 5)


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
    assert common(matched(path, samples, *true).boxes_px, samples).rows[0].value == 1


def test_few_misfits_are_the_models_fault_and_counted(tmp_path: Path) -> None:
    boxes = [[100.0, 100.0, 200.0, 200.0] for _ in range(40)]
    boxes[3], boxes[7] = [200, 100, 100, 200], [100, 100, 100, 200]
    assert matched(save(tmp_path, *answers(boxes)), SAMPLES).without_area == 2  # exactly 5 %
    boxes[9] = [5, 5, 5, 5]
    with pytest.raises(PredictionError, match="3 of 40 boxes"):
        matched(save(tmp_path, *answers(boxes)), SAMPLES)
    one_of_two = save(tmp_path, *answers([[200, 100, 100, 200], [100, 100, 200, 200]]))
    assert matched(one_of_two, SAMPLES[:2]).without_area == 1


def test_a_broken_file_names_row_and_remedy(tmp_path: Path) -> None:
    declared = {"box_format": "xyxy", "frame": "px"}
    good = answers([[1, 2, 3, 4]])[0]
    for rows, word in (
        ([], "holds no predictions"),
        ([{"format": "xyxy", "frame": "px"}], "holds no predictions"),
        ([good, '{"sample_id": "ref-1", "bo'], "row 2 is no JSON"),
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


def test_all_null_boxes_score_zero_without_an_error(tmp_path: Path) -> None:
    found = matched(save(tmp_path, *answers([None, None])), SAMPLES[:2])
    assert found.parse_failures == 2 and common(found.boxes_px, SAMPLES[:2]).rows[0].value == 0


def test_blank_lines_byte_order_marks_and_odd_separators_do_no_harm(tmp_path: Path) -> None:
    path = tmp_path / "odd.jsonl"
    text = '{"sample_id": "ref-0", "box": [100, 100, 200, 200], "text": "a\u2028b"}\r\n\r\n'
    path.write_bytes(b"\xef\xbb\xbf" + text.encode())
    found = matched(path, SAMPLES[:1])
    np.testing.assert_allclose(found.boxes_px, targets_px(SAMPLES[:1]))


def test_samples_that_share_an_id_cannot_be_scored(tmp_path: Path) -> None:
    with pytest.raises(PredictionError, match="2 samples have 1 ids"):
        matched(save(tmp_path, *answers([None])), [SAMPLES[0], SAMPLES[0]])
    with pytest.raises(ValueError, match="missing is error or miss"):
        matched(save(tmp_path, *answers([None])), SAMPLES[:1], missing="ignore")
