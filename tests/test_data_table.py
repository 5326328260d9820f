"""The converted form serves what the files hold now, from one index that every process shares.

Silent when false: yesterday's annotations are trained on after today's download, one data set is
served from another's index, a broken file loses half its rows and the rest looks like a small data
set, or train and test share images.
"""

from __future__ import annotations

import json
import logging
import os
import pickle
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from made_up_source import REMEDY, MadeUp, refuse_writing, write_made_up

from ivt_env.data import DataError, Dataset, cache_folder
from ivt_env.data import table as module
from ivt_env.data.table import Source, open_table

pytestmark = pytest.mark.usefixtures("private_machine")


@pytest.fixture
def made(tmp_path) -> MadeUp:
    return write_made_up(tmp_path / "root")


def set_times(made: MadeUp, nanoseconds: int = 10**18) -> None:
    for path in (made.rows_path, made.texts_path):
        os.utime(path, ns=(0, nanoseconds))


# --- Samples --------------------------------------------------------------------------------------


def test_every_row_is_served_as_the_reader_gave_it(made):
    for split, count in (("train", 9), ("val", 3), ("test", 3)):
        table = open_table(made.source(), split)
        assert isinstance(table, Dataset)
        assert (table.name, table.split, table.layout, table.skipped) == ("made-up", split, "layout", 0)
        assert len(table) == count
        rows = [row for row in made.rows if row["split"] == split]
        for sample, row in zip(list(table), rows, strict=True):
            scale = np.array([30, 20, 30, 20])
            assert (sample.sample_id, sample.image_id) == (row["id"], row["image"])
            assert (sample.dataset, sample.split, sample.size) == ("made-up", split, (20, 30))
            assert sample.expression == made.texts[row["id"]]
            assert sample.box == tuple(row["box"] / scale)
            assert sample.siblings == tuple(tuple(box / scale) for box in row["siblings"])
            assert sample.meta == {"number": made.rows.index(row), "ä": [None, 0.5]}
            assert all(type(value) is float for value in sample.box)
        for outside in (-1, 10**6):
            with pytest.raises(IndexError, match=f"made-up {split} has {count} samples, there is no sample {outside}"):
                table[outside]
        assert table[np.int64(2)] == table[2] and list(table) == list(table)
        assert table.sample_ids() == [row["id"] for row in rows]
        assert table.image_ids() == [row["image"] for row in rows]
        assert table.file_names() == sorted({row["image"] for row in rows})


def test_image_shared_by_train_and_another_split_is_refused_unless_the_set_is_known_for_it(made):
    made.rows[0]["split"] = "test"
    made.save()
    message = rf"rows\.json.*: train and test share 1 images \(p0\.png is one\), so scores on test .*: {REMEDY}$"
    with pytest.raises(DataError, match=message):
        open_table(made.source(), "val")
    allowed = made.source(may_share_images=True)
    assert set(open_table(allowed, "train").image_ids()) & set(open_table(allowed, "test").image_ids())


def test_empty_split_is_refused_with_the_counts_of_the_others(made):
    made.rows = [row for row in made.rows if row["split"] == "train"]
    made.save()
    for _ in range(2):  # without an index, and with one
        with pytest.raises(DataError, match=rf"no expression of split 'val' \(train: 9, val: 0, test: 0\); {REMEDY}$"):
            open_table(made.source(), "val")
        assert len(open_table(made.source(), "train")) == 9


def test_counts_other_than_the_published_ones_are_logged_and_only_published_ones_called_so(made, caplog):
    with caplog.at_level(logging.WARNING):
        open_table(made.source(published={"train": 9, "val": 3, "test": 3}), "train")
        made.index.unlink()
        # A part of a set: a split that is not here is not missed, one that nobody published is not made up.
        open_table(made.source(published={"train": 9, "testA": 7}), "train")
    assert caplog.text == ""
    made.index.unlink()
    with caplog.at_level(logging.WARNING):
        open_table(made.source(published={"train": 8, "testA": 7}), "train")
    assert "expressions per split: found {'train': 9, 'val': 3, 'test': 3}, published {'train': 8}" in caplog.text


# --- Bad rows -------------------------------------------------------------------------------------


def break_rows(made, count):
    for row in made.rows[-count:]:
        row["bad"] = "is broken"
    made.save()


@pytest.mark.parametrize(("bad", "served"), [(20, True), (21, False)])
def test_one_percent_of_many_rows_is_let_pass_and_more_is_not(made, bad, served):
    made.many(1985)
    break_rows(made, bad)
    if served:
        assert open_table(made.source(), "train").skipped == 20
    else:
        with pytest.raises(DataError, match=r"21 of 2000 rows are unusable \(the limit is 20\)"):
            open_table(made.source(), "train")


def test_file_without_one_good_row_is_refused_however_small(made):
    made.rows = made.rows[:2]
    break_rows(made, 2)
    with pytest.raises(DataError, match="2 of 2 rows are unusable"):
        open_table(made.source(), "train")
    made.rows = []
    made.save()
    with pytest.raises(DataError, match=f"holds no rows; {REMEDY}"):
        open_table(made.source(), "train")


def test_id_that_occurs_twice_in_a_split_is_left_out_and_named_and_counts_against_the_limit(made, caplog):
    made.rows.append(made.rows[4] | {"image": "p0.png"})
    made.rows.append({"split": "val", "id": "p0-0", "image": "p3.png", "box": [0, 0, 5, 5]})  # also an id of train
    made.save()
    with caplog.at_level(logging.WARNING):
        table = open_table(made.source(), "train")
    assert (table.skipped, len(table), len(set(table.sample_ids()))) == (1, 9, 9)
    assert "left out row p1-1: the id p1-1 occurs twice in train" in caplog.text
    assert table[4].image_id == "p1.png", "the first one is kept"
    assert "p0-0" in open_table(made.source(), "val").sample_ids()
    made.rows += made.rows[:3] * 4
    made.save()
    with pytest.raises(DataError, match="13 of 29 rows are unusable"):
        open_table(made.source(), "train")


def test_bad_rows_are_reported_again_when_the_index_is_reused(made, caplog):
    break_rows(made, 2)
    open_table(made.source(), "train")
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        assert open_table(made.source(), "val").skipped == 2
    assert "made-up: 2 unusable rows of the layout files were left out" in caplog.text
    assert made.reads == 1


# --- The index: when it is built ------------------------------------------------------------------


def everything(source: Source) -> list:
    return [list(open_table(source, split)) for split in source.splits]


def test_later_openings_read_the_index_alone_and_give_the_same_samples(made):
    first = everything(made.source())
    assert everything(made.source()) == first
    assert made.reads == 1
    assert list(made.index.parent.iterdir()) == [made.index]
    assert not cache_folder().exists()


@pytest.mark.parametrize("which", ["rows_path", "texts_path"])
@pytest.mark.parametrize("how", ["neither", "size", "time"])
def test_index_is_rebuilt_when_the_size_or_the_time_of_a_source_changes(made, which, how):
    set_times(made)
    old = open_table(made.source(), "train")[0]
    size = getattr(made, which).stat().st_size
    if which == "texts_path":
        made.texts["p0-0"] = "short" if how == "size" else made.texts["p0-0"].replace("thing", "THING")
    else:
        made.rows[0]["box"][2] = 7.5 if how == "size" else 11
    made.save()
    set_times(made)
    assert (getattr(made, which).stat().st_size != size) == (how == "size")
    if how == "time":
        os.utime(getattr(made, which), ns=(0, 10**18 + 1_000_000))
    # "neither" is the stated limit of the check, and shows that nothing else made it rebuild.
    assert (open_table(made.source(), "train")[0] == old) == (how == "neither")


def test_missing_or_unreadable_source_is_named_with_the_remedy(made, monkeypatch):
    open_table(made.source(), "train")
    made.texts_path.unlink()
    with pytest.raises(DataError) as caught:
        open_table(made.source(), "train")
    assert str(caught.value) == f"{made.texts_path}: missing; {REMEDY}"

    def refused(self, **_):
        raise PermissionError(13, "Permission denied")

    with monkeypatch.context() as patched, pytest.raises(DataError) as caught:
        patched.setattr(Path, "stat", refused)
        open_table(made.source(), "train", need_images=False)
    assert str(caught.value) == f"{made.rows_path}: cannot be read (Permission denied); {REMEDY}"


@pytest.mark.parametrize("damage", ["no arrow", "other columns", "other version", "folder"])
def test_damaged_index_is_built_again(made, damage, monkeypatch):
    expected = list(open_table(made.source(), "train"))
    path = made.index
    if damage == "no arrow":
        path.write_bytes(bytes(5000))
    elif damage == "other columns":
        with pa.ipc.open_file(path.read_bytes()[:-32]) as reader:
            batches = [reader.get_batch(n).select(["sample_id", "expression"]) for n in range(3)]
        with pa.ipc.new_file(str(path), batches[0].schema) as writer:
            for batch in batches:
                writer.write_batch(batch)
    elif damage == "other version":
        monkeypatch.setattr(module, "_INDEX_VERSION", module._INDEX_VERSION + 1)
    else:
        path.unlink()
        path.mkdir()
    assert list(open_table(made.source(), "train")) == expected
    assert made.reads == 2
    assert list(open_table(made.source(), "train")) == expected
    assert made.reads == 2


def test_index_cut_off_or_with_flipped_bits_gives_the_same_samples_and_is_refused_by_a_worker(made):
    """Arrow trusts a mapped file: such a one ended the process with SIGBUS or an abort."""
    table = open_table(made.source(), "train")
    expected, sent, whole = list(table), pickle.dumps(table), made.index.read_bytes()
    rng = np.random.default_rng(0)
    broken = [whole[:cut] for cut in range(0, len(whole), max(1, len(whole) // 20))]
    for place in rng.choice(len(whole), 20, replace=False):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << int(rng.integers(8))
        broken.append(bytes(damaged))
    for number, content in enumerate(broken):
        made.index.write_bytes(content)
        with pytest.raises(DataError, match="cannot be read any more .*; open the data set again"):
            pickle.loads(sent)
        assert list(open_table(made.source(), "train")) == expected, number
    assert made.reads == 1 + len(broken) > 40


def test_interrupted_writing_leaves_no_index_behind(made, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(module.os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        open_table(made.source(), "train")
    assert list(made.index.parent.iterdir()) == []


# --- The index: where it lies ---------------------------------------------------------------------


def test_moved_folder_keeps_its_index(made, tmp_path):
    expected = list(open_table(made.source(), "train"))
    there = MadeUp(tmp_path / "elsewhere" / "deeper")
    there.root.parent.mkdir()
    made.root.rename(there.root)
    assert list(open_table(there.source(), "train")) == expected
    assert there.reads == 0
    facts = json.loads(pa.ipc.open_file(there.index.read_bytes()[:-32]).schema.metadata[b"ivt_env"])
    assert set(facts["sources"]) == {"rows.json", "texts.json"}


def test_data_sets_that_share_folder_and_layout_keep_an_index_each_under_a_name_that_windows_allows(made):
    names = ("made-up", "made-up-google", "refcoco+", "of:mine?")
    for _ in range(2):
        for name in names:
            table = open_table(made.source(name=name), "train")
            assert table.name == table[0].dataset == name
    assert made.reads == len(names)
    assert "of_mine_-layout.arrow" in {path.name for path in made.index.parent.iterdir()}
    assert open_table(made.source(name="of*mine|"), "train")[0].dataset == "of*mine|"  # the same name, not its index


def test_read_only_data_folders_put_their_indices_into_the_user_cache_and_share_none(tmp_path, monkeypatch):
    sets = [write_made_up(tmp_path / name) for name in "ab"]
    sets[1].texts["p0-0"] = sets[1].texts["p0-0"].replace("thing", "THING")
    sets[1].save()
    for made in sets:  # so that only the folder tells them apart
        set_times(made)
    refuse_writing(monkeypatch, *(made.root for made in sets))
    for _ in range(2):
        found = [open_table(made.source(), "train")[0].expression for made in sets]
        assert found == [made.texts["p0-0"] for made in sets] and found[0] != found[1]
    assert [made.reads for made in sets] == [1, 1] and not sets[0].index.exists()
    assert [path.name for path in cache_folder().rglob("*") if path.is_file()] == [sets[0].index.name] * 2


def test_nowhere_to_write_still_serves_and_says_so(made, monkeypatch, caplog, tmp_path):
    refuse_writing(monkeypatch, tmp_path)
    with caplog.at_level(logging.WARNING):
        assert len(open_table(made.source(), "train")) == len(open_table(made.source(), "train")) == 9
    assert made.reads == 2
    assert "cannot write an index of made-up" in caplog.text
