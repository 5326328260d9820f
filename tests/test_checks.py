"""What ``ivt data check`` says about a damaged data set, and what ``show`` draws.

A check that overlooks a leak or an unreadable image is worse than none: it was asked, and said all was well.
"""

from __future__ import annotations

import json
import shutil

import gymnasium as gym
import numpy as np
import pytest
from eval_layouts import write_ref_l4
from made_up_source import write_made_up
from PIL import Image
from refer_layout import write_refer_folder

from ivt_agents.cli import main
from ivt_env.data import DataError, checks, load_dataset
from ivt_env.data.checks import check_source
from ivt_env.data.sheet import contact_sheet
from ivt_env.rendering import caption_font


@pytest.fixture
def made(tmp_path):
    return write_made_up(tmp_path)


def found(report, level=None):
    return [f.text for f in report.findings if level in (None, f.level)]


def test_whole_set_is_found_whole(made):
    report = check_source(made.source())
    assert report.ok and not report.findings
    assert report.samples == {"train": 9, "val": 3, "test": 3}
    assert report.images == {"train": 3, "val": 1, "test": 1}
    assert report.images_read == 5
    assert "whole and readable" in str(report)
    report = check_source(made.source(published={"train": 10, "val": 3}))
    assert not report.ok and found(report, "error") == ["holds 9 expressions, published are 10"]


def test_every_unreadable_image_is_found_and_named(made):
    (made.images / "p3.png").write_bytes((made.images / "p3.png").read_bytes()[:200])
    (made.images / "p4.png").unlink()
    report = check_source(made.source())
    assert not report.ok and report.images_read == 3
    (finding,) = report.findings
    assert finding.count == 2 and finding.level == "error"
    assert any("p3.png" in example and "cut off" in example for example in finding.examples)
    assert any("p4.png" in example and "missing" in example for example in finding.examples)
    assert "NOT fit for use" in str(report)
    assert check_source(made.source(), read_images=False).ok, "images were not to be looked at"


def test_same_file_under_two_ids_in_train_and_test_is_a_leak_and_in_train_alone_is_noted(made):
    shutil.copyfile(made.images / "p0.png", made.images / "p1.png")
    report = check_source(made.source())
    assert report.ok and [f.level for f in report.findings] == ["note"]
    shutil.copyfile(made.images / "p0.png", made.images / "p4.png")
    report = check_source(made.source())
    assert not report.ok
    (finding,) = report.findings
    assert "same in train and in another split" in finding.text
    assert finding.examples == ("p0.png = p1.png = p4.png",)


def test_shared_images_are_a_warning_where_the_division_is_known_to_share_them(made):
    made.rows[0]["split"] = "val"
    made.save()
    with pytest.raises(DataError, match="train and val share 1 images"):
        check_source(made.source())
    report = check_source(made.source(may_share_images=True))
    assert [f.level for f in report.findings] == ["warning"] and report.findings[0].examples == ("p0.png",)
    assert report.ok and "whole" not in str(report) and "see the warnings above" in str(report)


def test_repeated_and_ambiguous_expressions_are_told_apart(made):
    made.texts["p1-1"] = made.texts["p1-0"].upper()  # another box
    made.rows.append({**made.rows[0], "id": "again"})
    made.texts["again"] = "  " + made.texts[made.rows[0]["id"]]
    made.save()
    report = check_source(made.source())
    assert report.ok
    assert {f.level: f.count for f in report.findings} == {"note": 1, "warning": 1}
    assert "ambiguous" in found(report, "warning")[0] and "stand twice" in found(report, "note")[0]


def test_rows_left_out_are_listed_with_the_readers_reasons(made):
    made.rows[1]["bad"] = "its number is odd"
    made.rows.append({**made.rows[0]})  # an id for the second time
    made.save()
    unknown, of_train = check_source(made.source()).findings
    assert (unknown.level, unknown.split, unknown.count) == ("warning", "all", 1), "1 of 15"
    assert unknown.examples == ("row 1: its number is odd",)
    assert (of_train.level, of_train.split, of_train.count) == ("error", "train", 1), "1 of 9 is more than a tenth"
    assert "occurs twice in train" in of_train.examples[0]


@pytest.mark.parametrize(("bad", "status"), [(0, 0), (1, 0), (2, 1), (4, 1)])
def test_share_of_unusable_rows_above_the_stated_limit_is_unfit_for_use(tmp_path, capsys, bad, status):
    """Of a split: a large sound training split does not hide a ruined validation split."""
    write_custom_set(tmp_path, {"train": 40, "val": 15}, {("val", n): {"bbox": [9, 9, 1, 1]} for n in range(bad)})
    assert main(["data", "check", "custom", "--data-root", str(tmp_path)]) == status
    said = capsys.readouterr().out
    assert (f"val: rows cannot be used and are left out: {bad / 15:.1%}, and more than 10% is unfit" in said) == (
        bad > 0
    )


@pytest.mark.parametrize(
    ("line", "size", "said"),
    [
        ({"expression": "x" * 1344}, (30, 40), "expression of 1344 letters; at most 1024 can be played"),
        ({"expression": "ü" * 10_000}, (30, 40), "expression of 10000 letters; at most 1024"),
        ({}, (8, 3000), "image of 3000 x 8 pixels; one side can be at most 100 times the other"),
        ({}, (606, 6), "image of 6 x 606 pixels"),
    ],
)
def test_what_play_refuses_the_check_names_by_row_and_by_the_same_limit(tmp_path, capsys, line, size, said):
    write_custom_set(tmp_path, {"val": 12}, {("val", 5): {"bbox": [1, 1, 5, 5]} | line}, {("val", 5): size})
    env = gym.make("IVT-Custom-v0", split="val", data_root=str(tmp_path))
    with pytest.raises(DataError, match=said):
        env.reset(options={"index": 5})
    for options in ([], ["--no-images"]):
        assert main(["data", "check", "custom", "--data-root", str(tmp_path), *options]) == 1
        printed = capsys.readouterr().out
        assert "ERROR    val: rows cannot be played (1)" in printed and f"6: {said}" in printed
    for index in (4, 6):
        env.reset(options={"index": index})


def write_custom_set(root, counts, changes, sizes=None):
    """Splits of so many lines, an image each; (split, number) -> what a line says instead, or its image's size."""
    (root / "images").mkdir(parents=True)
    (root / "dataset.json").write_text('{"name": "my-set", "box": "xyxy", "frame": "px"}')
    for split, count in counts.items():
        lines = []
        for n in range(count):
            height, width = (sizes or {}).get((split, n), (30, 40))
            Image.new("RGB", (width, height), (n, len(split), 9)).save(root / "images" / f"{split}{n}.png")
            line = {"image": f"{split}{n}.png", "expression": f"thing {n}", "bbox": [2, 3, 20, 25]}
            lines.append(json.dumps(line | changes.get((split, n), {})))
        (root / f"{split}.jsonl").write_text("\n".join(lines))


def test_leak_across_data_sets_is_found_by_the_image_id(tmp_path):
    write_refer_folder(tmp_path, "refcocog")
    write_refer_folder(tmp_path, "refcoco")
    tables = {(n, s): load_dataset(n, s, tmp_path) for n in ("refcocog", "refcoco") for s in ("train", "val")}
    assert not list(checks.leaks(tables)), "the same photographs are in val of both"
    tables["refcoco", "testB"] = load_dataset("refcoco", "testB", tmp_path)
    (finding,) = checks.leaks(tables)
    assert finding.level == "warning" and "refcocog train shares images with refcoco testB" in finding.text


def test_check_command_prints_json_and_fails_on_wrong_counts(tmp_path, capsys):
    write_refer_folder(tmp_path)
    status = main(["data", "check", "refcocog", "--data-root", str(tmp_path), "--json"])
    printed = json.loads(capsys.readouterr().out)
    assert status == 1, "22 expressions are not the published 95,010"
    (report,) = printed["data_sets"]
    assert report["ok"] is False and report["samples"] == {"train": 15, "val": 3, "test": 4}
    assert report["images_read"] == 5


def test_check_command_says_why_a_set_cannot_be_looked_at(tmp_path, capsys):
    assert main(["data", "check", "refl4", "--data-root", str(tmp_path)]) == 2
    assert "ivt data fetch refl4" in capsys.readouterr().err
    assert main(["data", "check", "scenes"]) == 2
    assert "no data set 'scenes' that lies on a disk" in capsys.readouterr().err


def test_sheet_draws_each_box_where_it_belongs(tmp_path):
    dataset = load_dataset("photos")
    sheet = contact_sheet(dataset, [0, 5], columns=2, side=256)
    sample = dataset[0]
    x1, y1, x2, y2 = (value * 256 for value in sample.box)  # the first photograph is square
    green = np.all(sheet == (0, 220, 90), axis=-1)
    rows, columns = np.nonzero(green[:276, :276])
    assert (columns.min() - 10, rows.min() - 10) == pytest.approx((x1, y1), abs=1.5)
    assert (columns.max() - 9, rows.max() - 9) == pytest.approx((x2, y2), abs=1.5)


def test_sheet_shows_what_it_can_where_a_image_is_broken(made):
    (made.images / "p1.png").write_bytes(b"no image")
    table = checks.open_table(made.source(), "train")
    sheet = contact_sheet(table, range(9), columns=3, side=120)
    assert sheet.shape[1] == 3 * 140
    assert np.any(np.all(sheet == (255, 120, 110), axis=-1)), "the reason stands in the empty place"
    with pytest.raises(ValueError, match="needs samples"):
        contact_sheet(table, [])


def test_accents_are_drawn_and_not_boxes_in_their_place():
    font = caption_font(20)
    missing = bytes(font.getmask("\ue123"))  # of the private area: no font has it
    shown = [bytes(font.getmask(letter)) for letter in "ößéЖλ—→"]
    assert all(mask != missing for mask in shown) and len(set(shown)) == len(shown)


def test_convert_command_takes_a_coco_file(tmp_path):
    layout = write_refer_folder(tmp_path / "data")
    for annotation in layout.instances["annotations"]:
        annotation["caption"] = f"thing {annotation['id']}"
    layout.save()
    words = ["data", "convert", str(layout.instances_path), "--images", str(layout.images), "--from", "coco"]
    assert main([*words, "--out", str(tmp_path / "mine"), "--name", "mine"]) == 0
    own = load_dataset("custom", "train", tmp_path / "mine")
    original = [s for split in ("train", "val", "test") for s in load_dataset("refcocog", split, tmp_path / "data")]
    assert len(own) == len(layout.instances["annotations"]) and {s.box for s in own} == {s.box for s in original}


def test_show_command_writes_a_sheet(tmp_path, capsys):
    out = tmp_path / "sheet.png"
    assert main(["data", "show", "photos", "--number", "5", "--out", str(out)]) == 0
    assert Image.open(out).width == 4 * 320
    assert "5 samples of photos train" in capsys.readouterr().out
    assert main(["data", "show", "photos", "--index", "99", "--out", str(out)]) == 2
    assert "samples 0 to 15" in capsys.readouterr().err
    assert main(["data", "show", "refadv", "--data-root", str(tmp_path)]) == 2
    (tmp_path / "link.png").symlink_to(out)
    for name in ("sheet", "sheet.png/sheet.png", "link.png"):
        assert main(["data", "show", "photos", "--out", str(tmp_path / name)]) == 2


def test_convert_command_reads_once_and_writes_plain_jsonl(tmp_path, capsys):
    write_refer_folder(tmp_path / "data")
    out = tmp_path / "mine"
    words = ["data", "convert", "refcocog", "--data-root", str(tmp_path / "data")]
    assert main([*words, "--out", str(out), "--name", "mine"]) == 0
    assert (tmp_path / "data" / "refcocog" / ".ivt_index").is_dir()
    for split in ("train", "val", "test"):
        own, original = load_dataset("custom", split, out), load_dataset("refcocog", split, tmp_path / "data")
        assert [s.expression for s in own] == [s.expression for s in original]
        assert [s.box for s in own] == [s.box for s in original]
        assert np.array_equal(own.image(own[0]), original.image(original[0]))
    capsys.readouterr()
    assert main([*words, "--out", str(out)]) == 2
    assert "give both --out FOLDER and --name LABEL" in capsys.readouterr().err


def test_check_command_on_two_sets_names_the_leak_and_in_full_as_json(tmp_path, capsys):
    for name in ("refcocog", "refcoco"):
        write_refer_folder(tmp_path, name)
    words = ["data", "check", "refcocog", "refcoco", "--data-root", str(tmp_path), "--no-images"]
    main(words)
    printed = capsys.readouterr().out
    assert "refcocog train shares images with refcoco testB" in printed and "images not read" in printed
    main([*words, "--json"])
    across = json.loads(capsys.readouterr().out)["across"]
    assert across and all(len(finding["examples"]) == finding["count"] for finding in across)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["check", "custom", "--workers", "0"], "--workers 0: give 1 to 256"),
        (["show", "photos", "--out", "sheet.xyz"], "sheet.xyz: is no name of an image"),
        (["show", "photos", "--out", "sheet.mpg"], "sheet.mpg: cannot be written"),
        (["show", "photos", "--side", "100000"], "pixels is too large; give a smaller --side"),
        (["convert", "refcocog", "--shares", "0.8", "0.1", "0.1"], "--shares belongs to --from"),
        (["convert", "a.json", "--images", ".", "--out", "o", "--name", "n"], "say what it is with --from"),
        (
            ["convert", "a.json", "--from", "coco", "--images", ".", "--out", "o", "--name", "n",
             "--shares", "0", "0", "0"],
            "--shares 0 0 0: the three shares add up to 1",
        ),
    ],
)  # fmt: skip
def test_options_that_cannot_be_or_do_nothing_are_one_line(words, said, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["data", *words, "--data-root", str(tmp_path)]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and said in err and err.count("\n") == 1


def test_what_the_sheets_font_cannot_draw_is_printed(tmp_path, capsys):
    write_ref_l4(tmp_path)  # the first expression is "the ‘näive’ café 猫 🐈"
    words = ["data", "show", "refl4", "--data-root", str(tmp_path), "--out", str(tmp_path / "sheet.png")]
    assert main([*words, "--index", "0", "1"]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 2 and "0: the ‘näive’ café 猫 🐈" in printed[1]


def test_two_tests_are_converted_one_at_a_time(tmp_path, capsys):
    write_refer_folder(tmp_path, "refcoco")
    out = tmp_path / "mine"
    words = ["data", "convert", "refcoco", "--data-root", str(tmp_path), "--out", str(out), "--name", "mine"]
    assert main(words) == 2 and not out.exists()
    assert "testA and testB, a data set of your own one test" in capsys.readouterr().err
    assert main([*words, "--split", "testA"]) == 0 and main([*words, "--split", "train"]) == 0
    own, original = load_dataset("custom", "test", out), load_dataset("refcoco", "testA", tmp_path)
    assert [s.expression for s in own] == [s.expression for s in original]
