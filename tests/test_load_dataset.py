"""``load_dataset`` serves the data set that was asked for, or says loudly what it serves instead.

Silent when false: numbers measured on drawn shapes are reported as numbers on RefCOCOg, broken data
are replaced by something that works, or ``import ivt_env`` takes seconds.
"""

from __future__ import annotations

import importlib
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import hub_layouts
import pytest
from eval_layouts import PHOTOS, photo_rows, write_custom
from refer_layout import write_refer_folder

import ivt_env.data as data
from ivt_env.data import DataError, DataMissingError, DatasetFallbackWarning, load_dataset

REFER = ("refcocog", "refcoco", "refcocoplus")


pytestmark = pytest.mark.usefixtures("private_machine")


@pytest.fixture
def layout(tmp_path):
    return write_refer_folder(tmp_path / "root")


def write_own(root: Path, splits: tuple[str, ...]) -> None:
    """A data set of one's own, with one photograph in each split."""
    row = photo_rows()[0]
    for number, split in enumerate(splits):
        line = {"image": f"{number}.jpg", "expression": f"{row['expression']} {split}", "bbox": row["bbox"]}
        write_custom(root, [line], split)
        shutil.copyfile(PHOTOS / row["image"], root / line["image"])


# --- Where it looks -------------------------------------------------------------------------------


def test_data_root_goes_before_the_variable_and_the_variable_before_the_cache(tmp_path, monkeypatch):
    roots = {"argument": tmp_path / "a", "variable": tmp_path / "v", "cache": data.cache_folder() / "data"}
    for place, root in roots.items():
        layout = write_refer_folder(root)
        layout.refs[0]["sentences"][0]["sent"] = place
        layout.save()
    assert load_dataset("refcocog")[0].expression == "cache"
    monkeypatch.setenv("IVT_DATA", str(roots["variable"]))
    assert load_dataset("refcocog")[0].expression == "variable"
    assert load_dataset("refcocog", data_root=roots["argument"])[0].expression == "argument"
    assert load_dataset("refcocog", data_root=str(roots["argument"]))[0].expression == "argument"


def test_cache_folder_honours_xdg_and_ignores_a_relative_one(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert data.cache_folder() == tmp_path / "ivt_env"
    assert data.data_folder() == tmp_path / "ivt_env" / "data"
    for value in ("", "relative/folder"):
        monkeypatch.setenv("XDG_CACHE_HOME", value)
        assert data.cache_folder() == Path.home() / ".cache" / "ivt_env"


def test_a_home_folder_that_is_not_there_is_named_with_the_remedy_where_it_is_needed(monkeypatch, tmp_path):
    def homeless(*_):
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setenv("HOME", str(tmp_path))
    assert data.data_folder("~/sets") == tmp_path / "sets"
    layout = write_refer_folder(tmp_path)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", homeless)
    for root, remedy in ((None, "set the variable IVT_DATA"), ("~no-such-user/data", "write the whole path")):
        with pytest.raises(DataError, match=remedy):
            load_dataset("refcocog", "train", root, strict=True)
    assert len(load_dataset("refcocog", "val", tmp_path, strict=True)) == 3
    assert (layout.folder / ".ivt_index").is_dir()


# --- What it finds --------------------------------------------------------------------------------


def test_data_that_are_there_are_served_without_a_warning_under_their_own_name(tmp_path):
    own = ("train", "val", "test")
    write_own(tmp_path / "mine", own)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for name in REFER:
            write_refer_folder(tmp_path, name)
            dataset = load_dataset(name, "val", data_root=tmp_path, strict=True)
            assert dataset.name == dataset[0].dataset == name
        for split in own:
            dataset = load_dataset("custom", split, data_root=tmp_path / "mine", strict=True)
            assert dataset.name == dataset[0].dataset == "my-set"
            assert dataset[0].expression.endswith(split)
            assert dataset.image(dataset[0]).shape == (*dataset[0].size, 3)


def test_first_layout_that_is_there_and_has_the_split_is_served(tmp_path):
    def layouts():
        found = [data.find_source("refcocog", split, tmp_path) for split in ("train", "val", "test")]
        return [source and source.layout for source in found]

    things = hub_layouts.things_of(write_refer_folder(tmp_path / "source"))
    hub_layouts.write_vlm_r1(tmp_path, "refcocog", [t for t in things if t.split != "test"])
    assert layouts() == ["vlm_r1", "vlm_r1", None]
    hub_layouts.write_jxu124(tmp_path, "refcocog", [t for t in things if t.split != "train"])
    assert layouts() == ["vlm_r1", "jxu124", "jxu124"]
    assert load_dataset("refcocog", "val", write_refer_folder(tmp_path).root, strict=True).layout == "refs-umd"
    assert layouts() == ["refs-umd"] * 3


def test_every_layout_says_where_it_looks_and_finds_nothing_in_an_empty_folder(tmp_path):
    for name in data._LAYOUTS.keys() - {"screens"}:
        assert [*data._found(name, tmp_path), *data._found(name, tmp_path / "absent")] == []
        assert all(not Path(place).is_absolute() for place in places_of(name, Path()))


# --- What it serves instead -----------------------------------------------------------------------


def places_of(name: str, root: Path) -> list[str]:
    modules = {layout.partition(".")[0]: None for layout in data._LAYOUTS[name]}
    modules = [importlib.import_module(f"ivt_env.data.{module}") for module in modules]
    return [str(root / place) for module in modules for place in module.PLACES[name]]


def test_fallback_warns_once_with_all_the_facts(tmp_path):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        first = load_dataset("refcocog", "val", data_root=tmp_path)
        load_dataset("refcocog", "val", data_root=tmp_path)
        load_dataset("refcocog", "train")
        load_dataset("refcoco", "train")
    assert [w.category for w in caught] == [DatasetFallbackWarning] * 2, "one for each data set"
    text = str(caught[0].message)
    for fact in (
        "'refcocog' is not being used",
        "EMBEDDED SCENES ARE SERVED INSTEAD (refcocog val -> scenes val)",
        "says nothing about refcocog",
        str(tmp_path / "refcocog" / "instances.json"),
        *places_of("refcocog", tmp_path),
        "`ivt data fetch refcocog`",
        "data_root=",
        "IVT_DATA",
        "strict=True",
    ):
        assert fact in text
    assert caught[0].filename == __file__
    assert (first.name, first.split, first[0].dataset) == ("scenes", "val", "scenes")


@pytest.mark.parametrize(
    ("name", "split", "served"),
    [
        ("refcoco", "testA", "test"),
        ("refl4", "val", "val"),
        ("refadv", "test", "test"),
        ("mixed", "test", "test"),
    ],
)
def test_fallback_serves_the_corresponding_split_under_its_own_name(name, split, served):
    with pytest.warns(DatasetFallbackWarning, match=f"{name} {split} -> scenes {served}"):
        dataset = load_dataset(name, split)
    assert (dataset.name, dataset.split) == ("scenes", served)
    assert dataset[0].dataset == "scenes"


@pytest.mark.parametrize("name", ["refcoco", "refadv"])
def test_strict_makes_absence_an_error_with_the_same_facts(tmp_path, name):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(DataMissingError, match=f"^{name}: not on this machine; looked for ") as caught:
            load_dataset(name, "test" if name == "refadv" else "val", data_root=tmp_path, strict=True)
    for fact in (*places_of(name, tmp_path), f"`ivt data fetch {name}`", "IVT_DATA"):
        assert fact in str(caught.value)


def test_absent_mixture_names_the_parts_that_are_missing_and_how_to_get_them(tmp_path):
    with pytest.raises(DataMissingError, match="^mixed: ") as caught:
        load_dataset("mixed", "test", data_root=tmp_path, strict=True)
    for fact in (str(tmp_path), *(f"`ivt data fetch {name}`" for name in ("refcocog", "refadv", "refl4"))):
        assert fact in str(caught.value)
    write_refer_folder(tmp_path)
    with pytest.raises(DataMissingError) as caught:
        load_dataset("mixed", "test", data_root=tmp_path, strict=True)
    assert "fetch refcocog" not in str(caught.value) and "fetch refadv" in str(caught.value)


@pytest.mark.parametrize("strict", [True, False])
def test_nothing_takes_the_place_of_a_data_set_of_ones_own(tmp_path, strict):
    with pytest.raises(DataMissingError, match=r"dataset\.json and SPLIT\.jsonl") as caught:
        load_dataset("custom", "val", data_root=tmp_path / "mine", strict=strict)
    assert str(tmp_path / "mine") in str(caught.value)
    write_own(tmp_path / "mine", ("train",))
    with pytest.raises(DataMissingError, match="with this split"):
        load_dataset("custom", "val", data_root=tmp_path / "mine", strict=strict)


def test_absence_says_which_splits_are_there(tmp_path):
    layout = write_refer_folder(tmp_path / "source")
    hub = hub_layouts.write_lmms(tmp_path, "refcocog", hub_layouts.things_of(layout))
    assert hub
    with pytest.raises(DataMissingError, match=r"lmms.* serves only test\."):
        load_dataset("refcocog", "train", data_root=tmp_path, strict=True)


# --- Data that are there and broken ---------------------------------------------------------------


def test_broken_data_never_fall_back(layout):
    layout.refs_path.write_bytes(b"broken")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(DataError, match="not a whole pickle"):
            load_dataset("refcocog", data_root=layout.root)


@pytest.mark.parametrize("missing", ["refs_path", "instances_path"])
def test_missing_annotation_file_is_named_and_never_replaced_by_scenes(layout, missing):
    path = getattr(layout, missing)
    path.unlink()
    with pytest.raises(DataError, match="unpack the data set again") as caught:
        load_dataset("refcocog", data_root=layout.root)
    assert str(path) in str(caught.value) and not isinstance(caught.value, DataMissingError)


# --- Names ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "split", "message"),
    [
        ("refcocg", "train", r"no data set 'refcocg' \(did you mean 'refcoco.?'\?\); there are scenes, photos, "),
        ("RefCOCOg", "train", "did you mean 'refcocog'"),
        ("imagenet", "train", "no data set 'imagenet'; there are"),
        ("refcocog", "tets", r"no split 'tets' \(did you mean 'test'\?\); it has train, val, test"),
        ("refcoco", "test", "it has train, val, testA, testB"),
        ("refadv", "train", "refadv has no split 'train'; it has test"),
        ("custom", "all", "custom has no split 'all'.*; it has train, val, test"),
        ("scenes", "valid", "did you mean 'val'"),
        ("photos", "testA", "it has train, val, test, all"),
    ],
)
def test_unknown_name_or_split_lists_the_valid_ones(name, split, message):
    with pytest.raises(DataError, match=message):
        load_dataset(name, split)


def test_every_name_opens_on_a_fresh_machine_with_each_of_its_splits():
    opened = 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DatasetFallbackWarning)
        for name in set(data.NAMES) - {"custom"}:
            for split in data.splits(name):
                dataset = load_dataset(name, split)
                sample = dataset[0]
                assert sample.dataset == dataset.name == (name if name in ("scenes", "photos", "screens") else "scenes")
                assert dataset.image(sample).shape == (*sample.size, 3)
                opened += 1
    assert opened >= 22
    assert {"train", "test"} <= set(data.splits("mixed"))


def test_importing_the_data_package_imports_no_reader_and_no_pyarrow():
    readers = {layout.partition(".")[0] for layouts in data._LAYOUTS.values() for layout in layouts} | {
        "mixture",
        "table",
    }
    unwanted = ["pyarrow", "torch", *(f"ivt_env.data.{reader}" for reader in sorted(readers))]
    code = f"import sys, ivt_env.data; print([m for m in {unwanted} if m in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
