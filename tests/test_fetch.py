"""A file under its own name is whole and the published one, however often the connection broke.

Silent when false: half an image folder or a parquet file mixed from two versions trains and scores
like a data set, only worse; a checksum that is not compared lets a mirror put anything in its place.
"""

from __future__ import annotations

import shutil
import time

import pytest
from file_server import CONTENT, Served, jpeg, leftovers, sha256

from ivt_env.data import fetch
from ivt_env.data.catalogue import mirrored
from ivt_env.data.fetch import download, fetch_images, note_path, partial_path, remote_size
from ivt_env.data.sample import DataError


def broken_off(server, target, **served):
    """A download that has got 300,000 bytes when the server is given up."""
    server.files["/a"] = Served(CONTENT, faults=[("cut", 300_000), 500, 500], **served)
    with pytest.raises(DataError, match=r"a: could not be downloaded from http.* kept; run the same command"):
        download(f"{server.url}/a", target)
    assert not target.exists() and partial_path(target).stat().st_size == 300_000
    return server.files["/a"]


def test_a_download_is_whole_and_noted_and_not_repeated(server, tmp_path):
    server.files["/a.zip"] = Served(CONTENT)
    target = tmp_path / "deep" / "a.zip"
    seen = []
    known = {"size": len(CONTENT), "sha256": sha256(CONTENT)}
    first = download(f"{server.url}/a.zip", target, **known, progress=lambda *state: seen.append(state))
    assert first == sha256(CONTENT)
    assert target.read_bytes() == CONTENT
    assert note_path(target).read_text() == f"{sha256(CONTENT)}  a.zip\n"
    assert leftovers(target.parent) == ["a.zip", "a.zip.sha256"]
    assert seen[-1] == (len(CONTENT), len(CONTENT)) and seen == sorted(seen)
    for options in (known, {"size": len(CONTENT)}, {}):
        assert download(f"{server.url}/a.zip", target, **options) == first
    assert len(server.log) == 1


@pytest.mark.parametrize(
    "validators",
    [{}, {"etag": None, "last_modified": "Wed, 01 Jan 2020 00:00:00 GMT"}, {"etag": None}],
    ids=["etag", "time", "none"],
)
def test_a_cut_connection_goes_on_where_it_stopped(server, tmp_path, validators):
    served = broken_off(server, tmp_path / "a", **validators)
    # A checksum alone lets a server without validators go on.
    download(f"{server.url}/a", tmp_path / "a", sha256=sha256(CONTENT) if validators == {"etag": None} else None)
    assert (tmp_path / "a").read_bytes() == CONTENT
    first, *_, last = server.requests("/a")
    assert "Range" not in first
    assert (last["Range"], last.get("If-Range")) == ("bytes=300000-", served.etag or served.last_modified)
    assert server.sent["/a"] == len(CONTENT)  # not a byte twice
    assert leftovers(tmp_path) == ["a", "a.sha256"]


def test_a_stalled_connection_times_out_and_goes_on(server, tmp_path, monkeypatch):
    monkeypatch.setattr(fetch, "TIMEOUT_S", 0.3)
    server.files["/a"] = Served(CONTENT, faults=[("stall", 300_000)])
    start = time.monotonic()
    download(f"{server.url}/a", tmp_path / "a")
    assert (tmp_path / "a").read_bytes() == CONTENT
    assert time.monotonic() - start < 10  # 0.3 s, and what a busy machine adds; the stall lasts 20
    assert server.requests("/a")[1]["Range"] == "bytes=300000-"


def test_a_server_that_ignores_range_starts_from_zero_and_progress_counts_as_patience(server, tmp_path):
    server.files["/a"] = Served(CONTENT, ranges=False, faults=[("cut", 300_000), ("cut", 500_000)])
    download(f"{server.url}/a", tmp_path / "a")
    assert (tmp_path / "a").read_bytes() == CONTENT
    assert server.sent["/a"] == 300_000 + 500_000 + len(CONTENT)
    server.files["/b"] = Served(CONTENT, faults=[("cut", 100_000)] * 9)
    assert download(f"{server.url}/b", tmp_path / "b") == sha256(CONTENT)
    assert len(server.requests("/b")) == 10, "more breaks than attempts, each with something new"


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({}, {"etag": '"two"'}),
        ({"etag": None, "last_modified": "Wed, 01 Jan 2020"}, {"etag": None, "last_modified": "Thu, 02 Jan 2020"}),
        ({"etag": None}, {"etag": None}),
        ({"etag": 'W/"weak"'}, {"etag": 'W/"weak"'}),
        ({}, {"etag": '"two"', "if_range": False}),
        ({}, {"etag": None, "if_range": False}),
    ],
    ids=["etag", "time", "no validator", "weak etag", "If-Range ignored", "If-Range ignored, another size"],
)
def test_a_file_that_changed_meanwhile_is_never_mixed(server, tmp_path, before, after):
    new = CONTENT[::-1] + (b"more" if after.get("etag") is None else b"")
    broken_off(server, tmp_path / "a", **before)
    server.files["/a"] = Served(new, **after)
    download(f"{server.url}/a", tmp_path / "a")
    assert (tmp_path / "a").read_bytes() == new


def test_a_whole_partial_file_only_gets_its_name_and_one_too_long_is_started_again(server, tmp_path):
    (tmp_path / "a.partial").write_bytes(CONTENT)
    download(f"{server.url}/a", tmp_path / "a", size=len(CONTENT), sha256=sha256(CONTENT))
    assert not server.log and leftovers(tmp_path) == ["a", "a.sha256"]
    (tmp_path / "a").unlink()
    server.files["/a"] = Served(CONTENT)
    (tmp_path / "a.partial").write_bytes(CONTENT + b"x")
    (tmp_path / "a.partial.tag").write_text('"one"')
    download(f"{server.url}/a", tmp_path / "a")  # answered with 416
    assert (tmp_path / "a").read_bytes() == CONTENT
    (tmp_path / "b.partial").write_bytes(CONTENT + b"x")
    server.files["/b"] = Served(CONTENT)
    download(f"{server.url}/b", tmp_path / "b", size=len(CONTENT))
    assert "Range" not in server.requests("/b")[0]


def test_a_server_without_content_length_is_believed_only_with_the_known_size(server, tmp_path):
    server.files["/a"] = Served(CONTENT, length=False)
    assert download(f"{server.url}/a", tmp_path / "a") == sha256(CONTENT)
    server.files["/b"] = Served(CONTENT, length=False, faults=[("cut", 1000)])
    download(f"{server.url}/b", tmp_path / "b", size=len(CONTENT))
    assert (tmp_path / "b").read_bytes() == CONTENT
    with pytest.raises(DataError, match="is not the published file"):
        download(f"{server.url}/a", tmp_path / "c", size=1000)
    assert leftovers(tmp_path) == ["a", "a.sha256", "b", "b.sha256"]


def test_a_redirect_keeps_the_range_and_leads_nowhere_else(server, tmp_path):
    server.files["/a"] = Served(faults=[302] * 9, headers={"Location": "/real"}, etag=None)
    server.files["/real"] = Served(CONTENT, faults=[("cut", 300_000)])
    download(f"{server.url}/a", tmp_path / "a")
    assert server.requests("/real")[1]["Range"] == "bytes=300000-"
    assert server.sent["/real"] == len(CONTENT)
    server.files["/b"] = Served(faults=[302] * 9, headers={"Location": "file:///etc/hostname"}, etag=None)
    with pytest.raises(DataError, match="/b"):
        download(f"{server.url}/b", tmp_path / "b")
    assert not (tmp_path / "b").exists()


# --- What cannot be had ---------------------------------------------------------------------------


def test_waits_double_and_heed_the_server(server, tmp_path, monkeypatch):
    waits = []
    monkeypatch.setattr(time, "sleep", waits.append)
    for name, value in {"ATTEMPTS": 4, "FIRST_WAIT_S": 2.0, "LONGEST_WAIT_S": 5.0}.items():
        monkeypatch.setattr(fetch, name, value)
    server.files["/a"] = Served(CONTENT, faults=[500, 503, 429, 500], headers={"Retry-After": "3"})
    with pytest.raises(DataError):
        download(f"{server.url}/a", tmp_path / "a")
    assert waits == [3.0, 4.0, 5.0]
    server.files["/a"] = Served(CONTENT, faults=[500, 500, 500], headers={"Retry-After": "86400"})
    download(f"{server.url}/a", tmp_path / "a")
    assert waits[3:] == [5.0, 5.0, 5.0]


@pytest.mark.parametrize(("status", "attempts"), [(500, 3), (404, 1), (403, 1)])
def test_an_error_of_the_server_names_file_address_and_remedy(server, tmp_path, status, attempts):
    server.files["/a"] = Served(CONTENT, faults=[status] * 9)
    with pytest.raises(DataError) as caught:
        download(f"{server.url}/a", tmp_path / "a")
    for part in (str(tmp_path / "a"), f"{server.url}/a", str(status), "--mirror"):
        assert part in str(caught.value)
    assert len(server.log) == attempts
    assert leftovers(tmp_path) == []


def test_no_connection_names_file_address_and_remedy(server, tmp_path):
    with pytest.raises(
        DataError, match=r"a: could not be downloaded from http://127.0.0.1:1/a: no connection .*mirror"
    ):
        download("http://127.0.0.1:1/a", tmp_path / "a")
    for address in ("file:///etc/hostname", "ftp://example.org/a", "a", "http://x:port/"):
        with pytest.raises(DataError, match="address"):
            download(address, tmp_path / "a")


def test_a_wrong_checksum_leaves_nothing_and_another_size_is_refused_before_a_byte_is_taken(server, tmp_path):
    server.files["/a"] = Served(CONTENT)
    with pytest.raises(DataError, match=f"offers {len(CONTENT)} bytes, the published file has 7"):
        download(f"{server.url}/a", tmp_path / "a", size=7)
    with pytest.raises(DataError, match=rf"a: what {server.url}/a gave is not the published .*--mirror"):
        download(f"{server.url}/a", tmp_path / "a", sha256=sha256(b"other"))
    assert leftovers(tmp_path) == []


def test_a_web_page_in_place_of_a_file_costs_nothing_that_was_received(server, tmp_path):
    served = broken_off(server, tmp_path / "a")
    server.files["/a"] = Served(b"<html>log in first</html>", etag=None, headers={"Content-Type": "text/html"})
    with pytest.raises(DataError, match=rf"a: {server.url}/a sends a web page .*open it in a browser"):
        download(f"{server.url}/a", tmp_path / "a")
    server.files["/a"] = served
    download(f"{server.url}/a", tmp_path / "a")
    assert (tmp_path / "a").read_bytes() == CONTENT
    assert server.requests("/a")[-1]["Range"] == "bytes=300000-"


def test_a_file_that_is_there_is_compared_with_what_is_published_else_with_what_was_fetched_first(server, tmp_path):
    target = tmp_path / "a"
    server.files["/a"] = Served(CONTENT)
    for known in ({"size": len(CONTENT)}, {"sha256": sha256(CONTENT)}):
        target.write_bytes(CONTENT[:1000])
        download(f"{server.url}/a", target, **known)
        assert target.read_bytes() == CONTENT
    download(f"{server.url}/a", target)
    target.write_bytes(b"edited")
    with pytest.raises(DataError, match=r"a: has changed since it was downloaded .*Delete the file"):
        download(f"{server.url}/a", target)
    target.unlink()
    server.files["/a"] = Served(CONTENT[::-1], etag='"two"')
    with pytest.raises(DataError, match=r"now gives another file .*delete the note"):
        download(f"{server.url}/a", target)
    assert not target.exists()
    sent = server.sent["/a"]
    note_path(target).unlink()
    download(f"{server.url}/a", target)
    assert target.read_bytes() == CONTENT[::-1] and server.sent["/a"] == sent  # the download was kept


def test_two_processes_do_not_write_one_file(server, tmp_path):
    fcntl = pytest.importorskip("fcntl")
    server.files["/a"] = Served(CONTENT)
    with open(tmp_path / "a.partial", "wb") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(DataError, match=r"a\.partial: another process"):
            download(f"{server.url}/a", tmp_path / "a")
    download(f"{server.url}/a", tmp_path / "a")


# --- The disk -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("factor", "free_mib"), [(0.0, 64), (8.0, 70)])
def test_a_disk_without_room_is_told_before_a_byte_is_written(server, tmp_path, monkeypatch, factor, free_mib):
    server.files["/a"] = Served(CONTENT)
    monkeypatch.setattr(shutil, "disk_usage", lambda place: shutil._ntuple_diskusage(1 << 40, 0, free_mib << 20))
    with pytest.raises(DataError, match=r"a needs (1.0|9.4) MB .* but only .* MB are free .*make room"):
        download(f"{server.url}/a", tmp_path / "a", space_factor=factor)
    assert leftovers(tmp_path) == []


def test_a_download_stopped_by_the_disk_goes_on_when_there_is_room(server, tmp_path):
    resource = pytest.importorskip("resource")
    server.files["/a"] = Served(CONTENT)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300_001, limits[1]))
    try:
        with pytest.raises(OSError, match=r"File too large: .*/a'"):
            download(f"{server.url}/a", tmp_path / "a")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (tmp_path / "a.partial").read_bytes() == CONTENT[:300_001]  # the odd end: a write that took a part
    download(f"{server.url}/a", tmp_path / "a")
    assert (tmp_path / "a").read_bytes() == CONTENT
    assert server.requests("/a")[1]["Range"] == "bytes=300001-"


def test_a_file_in_the_way_of_a_folder_is_named(server, tmp_path):
    (tmp_path / "sub").write_text("a file")
    with pytest.raises(FileExistsError, match="sub"):
        download(f"{server.url}/a", tmp_path / "sub" / "a")
    (tmp_path / "folder").mkdir()
    with pytest.raises(IsADirectoryError, match="folder"):
        download(f"{server.url}/a", tmp_path / "folder")


# --- Addresses ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "mirror", "expected"),
    [
        ("http://a.org/x/y.zip", None, "http://a.org/x/y.zip"),
        ("http://a.org/x/y.zip", "https://m.org", "https://m.org/x/y.zip"),
        ("http://a.org/x/y.zip?q=1", "https://m.org:8080/coco/", "https://m.org:8080/coco/x/y.zip?q=1"),
        ("https://web.archive.org/web/2022/https://b.edu/d/refcoco+.zip", "http://m.org/z", "http://m.org/z/d/refcoco+.zip"),
    ],
)  # fmt: skip
def test_a_mirror_replaces_scheme_and_host(url, mirror, expected):
    assert mirrored(url, mirror) == expected


def test_the_size_is_asked_without_a_download(server):
    server.files["/a"] = Served(CONTENT, faults=[500])
    server.files["/b"] = Served(CONTENT, length=False)
    assert remote_size(f"{server.url}/a", "a") == len(CONTENT)
    assert remote_size(f"{server.url}/b", "b") is None
    assert server.sent == {}
    with pytest.raises(DataError, match="404"):
        remote_size(f"{server.url}/c", "c")


# --- Images ---------------------------------------------------------------------------------------


@pytest.fixture
def images(server):
    names = [f"COCO_train2014_{number:012d}.jpg" for number in range(12)]
    for number, name in enumerate(names):
        server.files[f"/p/{name}"] = Served(jpeg(number * 20))
    return names


def get(server, names, folder, **kwargs):
    return fetch_images(names, folder, lambda name: f"{server.url}/p/{name}", 4, **kwargs)


def test_images_come_in_parallel_and_only_once_and_half_ones_again(server, images, tmp_path):
    seen = []
    folder = tmp_path / "deep" / "images"
    assert get(server, images * 2, folder, progress=lambda *state: seen.append(state)) == 12
    assert leftovers(folder) == images
    assert all((folder / name).read_bytes() == server.files[f"/p/{name}"].content for name in images)
    assert seen == [(number, 12) for number in range(1, 13)]
    assert get(server, images, folder) == 0
    assert len(server.log) == 12
    whole = (folder / images[3]).read_bytes()
    (folder / images[3]).write_bytes(whole[: len(whole) // 2])
    (folder / images[4]).write_bytes(b"")
    assert get(server, images, folder) == 2 and (folder / images[3]).read_bytes() == whole


def test_failed_images_are_listed_at_the_end_and_the_others_kept(server, images, tmp_path):
    server.files[f"/p/{images[2]}"].faults = [404]
    server.files[f"/p/{images[5]}"].faults = [500] * 3
    server.files[f"/p/{images[7]}"] = Served(b"<html>log in first</html>")
    server.files[f"/p/{images[8]}"].faults = [("cut", 100)]  # comes with the second attempt
    with pytest.raises(DataError, match="3 of 12 images could not be downloaded.*run the same command") as caught:
        get(server, images, tmp_path)
    for number, reason in ((2, "404"), (5, "500"), (7, "not a whole image")):
        assert any(images[number] in line and reason in line for line in str(caught.value).splitlines())
    assert leftovers(tmp_path) == [name for n, name in enumerate(images) if n not in (2, 5, 7)]
    server.files[f"/p/{images[7]}"] = Served(jpeg(9))
    assert get(server, images, tmp_path) == 3


def test_a_server_that_is_gone_ends_it_early(tmp_path, server):
    names = [f"{number}.jpg" for number in range(500)]
    with pytest.raises(DataError, match=r"were not tried, because so many failed in a row"):
        get(server, names, tmp_path)
    assert len(server.log) < 400


def test_an_image_cannot_climb_out_of_its_folder(server, tmp_path):
    for name in ("../a.jpg", "/a.jpg", "b/a.jpg", "..", "b\\a.jpg", "a\0.jpg"):
        with pytest.raises(DataError, match="is not the plain name of a file"):
            get(server, [name], tmp_path / "p")
    assert not server.log
