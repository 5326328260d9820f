"""``ivt data fetch`` puts every data set where its reader finds it, and takes nothing large unasked.

Silent when false: a reader that does not find what was fetched serves embedded scenes instead; a
licence nobody saw is broken; 13 GB come over a phone's line.
"""

from __future__ import annotations

import argparse
import dataclasses
import io
import json
import shutil
import tempfile
import urllib.parse
from pathlib import Path, PurePosixPath

import hub_layouts
import pytest
from file_server import Served, jpeg, sha256
from gui_layouts import HEIGHT, WIDTH, write_gui
from refer_layout import write_refer_folder
from test_archives import make_tar, make_zip

from ivt_agents import cli
from ivt_env.commands import fetch as command
from ivt_env.data import GUI, load_dataset, refer
from ivt_env.data.catalogue import CATALOGUE, HubFolder, hub_files
from ivt_env.data.gui import LAYOUTS
from ivt_env.data.sample import DataError

REFCOCOG_ZIP = "/licheng/referit/data/refcocog.zip"
TRAIN_ZIP = "/zips/train2014.zip"
COCO_TRAIN2014 = CATALOGUE["refcocog"].images

pytestmark = pytest.mark.usefixtures("private_machine")


def zip_of(files):
    return packed(make_zip, files)


def tgz_of(files):
    return packed(make_tar, files)


def packed(make, files):
    with tempfile.TemporaryDirectory() as folder:
        return make(Path(folder) / "archive", files).read_bytes()


def known(monkeypatch, name, image_changes=(), **changes):
    """An entry of the catalogue, changed for this test."""
    found = CATALOGUE[name]
    if image_changes:
        changes["images"] = dataclasses.replace(found.images, **dict(image_changes))
    monkeypatch.setitem(CATALOGUE, name, dataclasses.replace(found, **changes))


def of_this_size(file, content):
    return dataclasses.replace(file, bytes=len(content), sha256=sha256(content))


@pytest.fixture
def published(server, monkeypatch, tmp_path):
    """RefCOCOg as a server has it, made of the five photographs; gives the folder it was made of."""
    layout = write_refer_folder(tmp_path / "published")
    files = {f"refcocog/{p.name}": p.read_bytes() for p in (layout.refs_path, layout.instances_path)}
    archive = zip_of(files)
    images = {p.name: p.read_bytes() for p in sorted(layout.images.iterdir())}
    server.files[REFCOCOG_ZIP] = Served(archive)
    server.files[TRAIN_ZIP] = Served(zip_of({f"train2014/{name}": content for name, content in images.items()}))
    for name, content in images.items():
        server.files[f"/train2014/{name}"] = Served(content)
    of_images = dataclasses.replace(COCO_TRAIN2014.archive, must_hold=(COCO_TRAIN2014.folders[0], len(images)))
    files = (of_this_size(CATALOGUE["refcocog"].files[0], archive),)
    known(monkeypatch, "refcocog", {"archive": of_images}, files=files)
    return layout


@pytest.fixture
def fetch(server, tmp_path, capsys):
    """Runs the command; gives (exit status, standard output, standard error)."""

    def run(*words):
        capsys.readouterr()
        status = cli.main(["data", "fetch", *words, "--data-root", str(tmp_path / "root"), "--mirror", server.url])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run


def got(server):
    return [path for method, path, _ in server.log if method == "GET"]


# --- What arrives ---------------------------------------------------------------------------------


def test_a_split_needs_only_its_own_images_and_opens(server, published, fetch, tmp_path):
    status, out, err = fetch("refcocog", "--split", "val")
    assert status == 0, err
    dataset = load_dataset("refcocog", "val", tmp_path / "root", strict=True)
    assert len(dataset) > 0
    for index in range(len(dataset)):
        assert dataset.image(dataset[index]).shape == (*dataset[index].size, 3)
    needed = {published.image_of(ref).name for ref in published.refs_of("val")}
    everything = {path.name for path in published.images.iterdir()}
    assert 0 < len(needed) < len(everything)
    assert {PurePosixPath(path).name for path in got(server) if path.startswith("/train2014/")} == needed
    assert {p.name for p in (tmp_path / "root" / COCO_TRAIN2014.folders[0]).iterdir()} == needed
    requests = len(server.log)
    status, out, err = fetch("refcocog", "--split", "val")
    assert status == 0 and len(server.log) == requests  # a second time costs nothing
    assert "0 images downloaded" in out


def test_the_archive_of_images_is_unpacked_where_the_reader_looks(server, published, fetch, tmp_path):
    status, out, err = fetch("refcocog", "--yes")
    assert status == 0, err
    for split in ("train", "val", "test"):
        dataset = load_dataset("refcocog", split, tmp_path / "root", strict=True)
        assert dataset.image(dataset[0]).shape == (*dataset[0].size, 3)
    downloads = tmp_path / "root" / "downloads"
    assert not list(downloads.glob("*.zip"))  # 13.5 GB need not be kept twice
    assert {p.name for p in downloads.iterdir()} == {
        "refcocog.zip.sha256", "refcocog.zip.unpacked", "train2014.zip.sha256", "train2014.zip.unpacked"
    }  # fmt: skip
    requests = len(server.log)
    assert fetch("refcocog")[0] == 0 and len(server.log) == requests
    some = next((tmp_path / "root" / COCO_TRAIN2014.folders[0]).iterdir())
    some.unlink()
    assert fetch("refcocog", "--yes")[0] == 0
    assert some.is_file()  # what is missing is seen


def test_an_archive_can_be_kept_and_is_then_not_downloaded_again(server, published, fetch, tmp_path):
    assert fetch("refcocog", "--images", "none", "--keep-archives")[0] == 0
    assert (tmp_path / "root" / "downloads" / "refcocog.zip").is_file()
    shutil.rmtree(tmp_path / "root" / "refcocog")
    status, out, _ = fetch("refcocog", "--images", "none")
    assert status == 0 and "without images" in out
    assert (tmp_path / "root" / "refcocog" / "instances.json").is_file()
    assert got(server) == [REFCOCOG_ZIP]


def test_images_that_a_user_keeps_elsewhere_are_used(server, published, fetch, tmp_path):
    elsewhere = tmp_path / "root" / "train2014"
    shutil.copytree(published.images, elsewhere)
    assert fetch("refcocog")[0] == 0
    assert fetch("refcocog", "--split", "val")[0] == 0
    assert got(server) == [REFCOCOG_ZIP]
    assert not (tmp_path / "root" / COCO_TRAIN2014.folders[0]).exists()


def test_an_interrupted_fetch_goes_on(server, published, fetch, monkeypatch, tmp_path):
    server.files[REFCOCOG_ZIP].faults = [("cut", 700)]

    def interrupt(seconds):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("time.sleep", interrupt)
        status, _, err = fetch("refcocog", "--images", "none")
    assert status == 130 and "run the same command again" in err
    assert fetch("refcocog", "--images", "none")[0] == 0
    assert server.sent[REFCOCOG_ZIP] == len(server.files[REFCOCOG_ZIP].content)


# --- Consent --------------------------------------------------------------------------------------


def test_more_than_a_gigabyte_is_not_taken_unasked(server, published, fetch, monkeypatch, tmp_path):
    status, out, err = fetch("refcocog")
    assert status == 2
    assert "13.5 GB" in out and "--yes" in err and CATALOGUE["refcocog"].licence in out
    assert server.log == [] and not (tmp_path / "root").exists()
    for word, expected in (("", 2), ("n", 2), ("what?", 2), (EOFError, 2), ("y", 0), ("Yes", 0)):
        asked = []

        def answer(prompt, word=word, asked=asked):
            asked.append(prompt)
            if word is EOFError:
                raise EOFError
            return word

        monkeypatch.setattr("sys.stdin", argparse.Namespace(isatty=lambda: True))
        monkeypatch.setattr("builtins.input", answer)
        shutil.rmtree(tmp_path / "root", ignore_errors=True)
        status, _, err = fetch("refcocog")
        assert status == expected and (err == "error: nothing was downloaded\n") == (expected == 2)
        assert len(asked) == 1
        assert (tmp_path / "root").exists() == (expected == 0)


def test_many_single_images_are_asked_for_too(published, fetch, monkeypatch):
    known(monkeypatch, "refcocog", {"mean_bytes": 2_000_000_000})
    status, _, err = fetch("refcocog", "--split", "val")
    assert status == 2 and "about 2.0 GB" in err


def test_a_size_that_nobody_knows_is_asked_for(server, fetch, monkeypatch):
    url = "/record/4729015/files/mdetr_annotations.tar.gz"
    server.files[url] = Served(b"x" * 100, length=False)
    status, _, err = fetch("mdetr", "--images", "none")
    assert status == 2 and "size" in err
    server.files[url] = Served(b"x" * 100)  # the server says that it is small
    status, _, err = fetch("mdetr", "--images", "none")
    assert status == 2 and "cannot be unpacked" in err


def test_the_licence_comes_before_the_first_byte(server, fetch):
    for name, found in CATALOGUE.items():
        _, out, _ = fetch(name)  # whose files this server does not have
        assert all(part in out for part in (found.title, found.homepage, found.licence, found.notice))
    assert not any(server.sent.values())


# --- The Hub --------------------------------------------------------------------------------------


def serve_hub(server, dataset, files, folder="", revision="main", page=100, recursive=False):
    """A Hub data set: its listing, ``page`` entries at a time, and its files."""
    base = f"/api/datasets/{dataset}/tree/{revision}" + (f"/{folder}" if folder else "")
    query = "?recursive=true" if recursive else ""
    rows = [{"type": "directory", "oid": "0", "size": 0, "path": "sub"}]
    for path, content in files.items():
        rows.append(
            {"type": "file", "oid": "git", "size": 130, "path": path,
             "lfs": {"oid": sha256(content), "size": len(content), "pointerSize": 130}}
        )  # fmt: skip
        server.files[f"/datasets/{dataset}/resolve/{revision}/{path}"] = Served(content)
    attributes = f"{folder}/.gitattributes".lstrip("/")
    rows.append({"type": "file", "oid": "git", "size": 9, "path": attributes})
    server.files[f"/datasets/{dataset}/resolve/{revision}/{attributes}"] = Served(b"* -text\n\n")
    for start in range(0, len(rows), page):
        address = base + (f"?cursor={start}" if start else query)
        more = {"Link": f'<https://huggingface.co{base}?cursor={start + page}>; rel="next"'}
        server.files[address] = Served(
            json.dumps(rows[start : start + page]).encode(), headers=more if start + page < len(rows) else {}
        )


def test_a_listing_is_read_to_its_last_page(server):
    files = {f"data/val-{number}.parquet": bytes([number]) * 40 for number in range(5)}
    serve_hub(server, "a/b", files, folder="data", page=2)
    listed = hub_files(HubFolder("a/b", "into", "*", "data"), mirror=server.url)
    assert [(f.path, f.bytes, f.sha256) for f in listed] == [
        *((path.replace("data", "into"), 40, sha256(content)) for path, content in files.items()),
        ("into/.gitattributes", 9, None),
    ]


def test_something_else_than_a_listing_is_named(server):
    for body in (b"<html>", b'{"error": "no"}', b'[{"type": "file"}]', b"[1]", b"\xff"):
        server.files["/api/datasets/a/b/tree/main"] = Served(body)
        with pytest.raises(DataError, match=r"the listing of a/b: http.* is not a list of files .*--mirror"):
            hub_files(HubFolder("a/b", "into"), mirror=server.url)
    serve_hub(server, "a/b", {"train.json": b"{}"})
    with pytest.raises(DataError, match=r"a/b: its folder / at revision main holds no \*\.parquet"):
        hub_files(HubFolder("a/b", "into"), mirror=server.url)


def test_a_split_of_a_hub_data_set_can_come_alone(server, fetch, tmp_path):
    for part, names in {"RefCOCO": ("val", "testA"), "RefCOCOplus": ("val", "testA"), "RefCOCOg": ("val",)}.items():
        files = {f"data/{split}-00000-of-00001.parquet": f"{part} {split}".encode() for split in names}
        serve_hub(server, f"lmms-lab-encoder/{part}", files, folder="data")
    assert fetch("lmms", "--split", "testA")[0] == 0
    held = sorted(p.relative_to(tmp_path / "root").as_posix() for p in (tmp_path / "root").rglob("*.parquet"))
    assert held == [f"lmms/{part}/data/testA-00000-of-00001.parquet" for part in ("RefCOCO", "RefCOCOplus")]
    assert fetch("lmms")[0] == 0
    assert len(list((tmp_path / "root").rglob("*.parquet"))) == 5
    status, _, err = fetch("lmms", "--split", "test")
    assert status == 2 and "none holds files of split 'test'" in err
    status, _, err = fetch("lmms", "--split", "train")
    assert status == 2 and "lmms has no split 'train'; it has val, test, testA, testB" in err


@pytest.mark.parametrize("name", GUI)
def test_a_set_of_screens_comes_with_its_images_and_opens(server, fetch, tmp_path, name):
    write_gui(tmp_path / "published")
    layout, found = LAYOUTS[name], CATALOGUE[name]
    source = tmp_path / "published" / (layout.folder or name)
    files = {p.relative_to(source).as_posix(): p.read_bytes() for p in source.rglob("*") if p.is_file()}
    for folder in found.hub:
        inside = {path: content for path, content in files.items() if path.startswith(folder.folder)}
        if name == "screenspotpro" and folder.recursive:  # so many that they are summed up
            inside |= {f"images/more/{n}.png": inside["images/blender/a.png"] for n in range(command._MANY)}
        serve_hub(server, folder.dataset, inside, folder.folder, page=7, recursive=folder.recursive)
    for file in found.files:
        packed = zip_of({f"{file.below}/{path}" if file.below else path: content for path, content in files.items()
                         if file.below or path.startswith(layout.images)} | {"__MACOSX/x": b"x"})  # fmt: skip
        server.files[urllib.parse.urlsplit(file.url).path] = Served(packed)
    status, out, _ = fetch(name, "--yes")
    assert status == 0 and "Licence: " in out and f"{name}: complete" in out
    assert ("files, " in out and "1 without a published checksum" in out) == (name == "screenspotpro")
    data = load_dataset(name, "test", tmp_path / "root", strict=True)
    assert len(data) > 1 and data.skipped == 0 and data.image(data[0]).shape == (HEIGHT, WIDTH, 3)
    server.log.clear()
    assert fetch(name)[0] == 0
    assert all("/api/" in path for _, path, _ in server.log), "what is there is not downloaded again"


def test_ref_l4_gets_its_images_beside_its_annotations(server, fetch, monkeypatch, tmp_path):
    serve_hub(server, "JierunChen/Ref-L4", {"ref-l4-val.parquet": b"v", "ref-l4-test.parquet": b"t"})
    archive = tgz_of({"images/COCO_train2014_000000128974.jpg": jpeg(1), "images/objects365_v2_00922765.jpg": jpeg(2)})
    server.files["/datasets/JierunChen/Ref-L4/resolve/main/images.tar.gz"] = Served(archive)
    known(monkeypatch, "refl4", {"archive": of_this_size(CATALOGUE["refl4"].images.archive, archive)})
    root = tmp_path / "root"
    (root / "refl4" / "images").mkdir(parents=True)
    (root / "refl4" / "images" / "half-unpacked.jpg").write_bytes(jpeg(3))  # proves nothing: how many is not published
    assert fetch("refl4")[0] == 0
    assert (root / "refl4" / "images" / "objects365_v2_00922765.jpg").read_bytes() == jpeg(2)
    assert (root / "refl4" / "ref-l4-val.parquet").is_file() and (root / "refl4" / "ref-l4-test.parquet").is_file()
    requests = got(server)
    assert fetch("refl4")[0] == 0
    assert [path for path in got(server)[len(requests) :] if "/api/" not in path] == []
    status, _, err = fetch("refl4", "--images", "single")
    assert status == 2 and "not served one by one" in err


def test_mdetr_gives_only_the_referring_sets(server, fetch, tmp_path):
    files = {f"OpenSource/{Path(path).name}": b"{}" for path in CATALOGUE["mdetr"].files[0].must_exist}
    archive = tgz_of(files | {"OpenSource/final_mixed_train.json": b"{}" * 100})
    server.files["/record/4729015/files/mdetr_annotations.tar.gz"] = Served(archive)
    status, _, err = fetch("mdetr", "--images", "none")
    assert status == 0, err
    assert {p.name for p in (tmp_path / "root" / "mdetr").iterdir()} == {Path(name).name for name in files}


# --- What goes wrong ------------------------------------------------------------------------------


def test_an_archive_of_another_layout_is_named(published, server, fetch, monkeypatch):
    archive = zip_of({"data/refcocog/instances.json": b"{}"})
    server.files[REFCOCOG_ZIP] = Served(archive)
    known(monkeypatch, "refcocog", files=(of_this_size(CATALOGUE["refcocog"].files[0], archive),))
    status, _, err = fetch("refcocog", "--images", "none")
    assert status == 2 and "refcocog.zip: was unpacked into" in err and "instances.json is not there" in err


def test_a_disk_without_room_for_single_images_is_told_first(server, published, fetch, monkeypatch):
    assert fetch("refcocog", "--images", "none")[0] == 0
    known(monkeypatch, "refcocog", {"mean_bytes": 900_000_000})
    monkeypatch.setattr(shutil, "disk_usage", lambda place: shutil._ntuple_diskusage(1 << 40, 0, 500_000_000))
    status, _, err = fetch("refcocog", "--split", "val")
    assert status == 2 and "only 500.0 MB are free" in err
    assert not any(path.startswith("/train2014/") for path in got(server))


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["refl5"], "did you mean 'refl4'?"),
        (["nothing-like-it"], "there are refcocog, refcoco,"),
        (["scenes"], "nothing to fetch"),
        (["refcocog", "--split", "testA"], "refcocog has no split 'testA'; it has train, val, test"),
        (["refadv", "--images", "single"], "not served one by one"),
        (["refcocog", "--workers", "0"], "1 to 64"),
        (["refcocog", "--workers", "1.5"], "1 to 64"),
        (["refcocog", "--images", "none", "--mirror", "nowhere"], "--mirror 'nowhere' is not an address"),
    ],
)
def test_a_wrong_word_is_an_error_that_helps(tmp_path, capsys, words, expected):
    assert cli.main(["data", "fetch", *words, "--data-root", str(tmp_path)]) == 2
    assert expected in capsys.readouterr().err


def test_images_that_are_not_cocos_are_not_asked_for(tmp_path):
    layout = write_refer_folder(tmp_path)
    assert command.image_names("refcocog", "val", tmp_path) == sorted(
        {layout.image_of(ref).name for ref in layout.refs_of("val")}
    )
    layout.annotated_image(layout.refs_of("val")[0])["file_name"] = "holiday.jpg"
    layout.save()
    with pytest.raises(DataError, match=r"refcocog val names the image 'holiday\.jpg'"):
        command.image_names("refcocog", "val", tmp_path)
    with pytest.raises(DataError, match="holds no annotations of refcoco"):
        command.image_names("refcoco", "val", tmp_path)


@pytest.mark.parametrize("layout", ["jxu124", "mdetr", "vlm_r1"])
def test_other_layouts_name_their_images_too(tmp_path, layout):
    published = write_refer_folder(tmp_path / "published")
    getattr(hub_layouts, f"write_{layout}")(tmp_path / "root", "refcocog", hub_layouts.things_of(published))
    for split in ("train", "val"):
        assert command.image_names(layout, split, tmp_path / "root") == sorted(
            {published.image_of(ref).name for ref in published.refs_of(split)}
        )


# --- The catalogue --------------------------------------------------------------------------------


def test_places_agree_with_the_readers():
    assert set(COCO_TRAIN2014.folders) <= set(refer.IMAGE_FOLDERS)
    for name, folder in refer.FOLDERS.items():
        found = CATALOGUE[name]
        partition, splits = next(iter(refer.PARTITIONS[name].items()))
        assert found.splits == splits
        assert found.files[0].must_exist == (f"{folder}/instances.json", f"{folder}/refs({partition}).p")


def test_entries_hold_together():
    for name, found in CATALOGUE.items():
        assert found.name == name and found.licence and found.homepage.startswith("https://")
        assert found.files or found.hub
        archives = [found.images.archive] if found.images else []
        for file in (*found.files, *archives):
            places = [file.path, *file.must_exist, *([file.must_hold[0]] if file.must_hold else [])]
            assert all(not Path(place).is_absolute() and ".." not in Path(place).parts for place in places)
            assert file.url.startswith(("https://", "http://images.cocodataset.org/"))
            assert file.sha256 is None or len(file.sha256) == 64
            assert (file.unpack_into is None) == (not file.must_exist and file.must_hold is None)
            assert file.path.startswith("downloads/") == (file.unpack_into is not None)
        if found.images:
            assert found.images.archive.must_hold[0] == found.images.folders[0]


# --- Saying how far it is -------------------------------------------------------------------------


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_progress_is_one_line_on_a_terminal_and_few_elsewhere(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: clock[0])
    for stream, lines in ((Terminal(), 1), (io.StringIO(), 4)):
        clock[0] = 0.0
        monkeypatch.setattr("sys.stderr", stream)
        with command._shown("a.zip") as progress:
            for second in range(100):
                clock[0] += 1.0
                progress(1_000_000 * (second + 1), 100_000_000)
        text = stream.getvalue()
        assert text.count("\n") == lines
        assert "a.zip: 100.0 MB of 100.0 MB (100 %)" in text
        assert ("\r" in text) == stream.isatty()
    assert "a.zip: 30.0 MB of 100.0 MB (30 %), 966.7 kB/s, 1 min left" in text


def test_a_folder_that_cannot_be_is_one_line(tmp_path, capsys):
    for root, said in (("x" * 300, "File name too long"), ("~no-such-user/x", "there is no such home folder")):
        assert cli.main(["data", "fetch", "refcocog", "--images", "none", "--data-root", root]) == 2
        err = capsys.readouterr().err
        assert err.startswith("error: ") and said in err and err.count("\n") == 1
