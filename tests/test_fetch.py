"""A file under its own name is whole and the published one, however often the connection broke.

Silent when false: half an image folder or a parquet file mixed from two versions trains and scores
like a data set, only worse; a checksum that is not compared lets a mirror put anything in its place.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import time
from pathlib import Path

import pytest
from file_server import CONTENT, ONCE, QUICK, Served, leftovers, sha256

from ivt_env.data import fetch
from ivt_env.data.catalogue import mirrored
from ivt_env.data.fetch import (
    Patience,
    bytes_to_come,
    download,
    note_path,
    remote_size,
)
from ivt_env.data.sample import DataError


def test_a_download_is_whole_and_noted_and_not_repeated(server, tmp_path):
    server.files["/a.zip"] = Served(CONTENT)
    target = tmp_path / "deep" / "a.zip"
    seen = []
    first = download(
        f"{server.url}/a.zip", target, size=len(CONTENT), sha256=sha256(CONTENT), patience=QUICK,
        progress=lambda done, total: seen.append((done, total)),
    )  # fmt: skip
    assert (first.path, first.bytes, first.sha256, first.downloaded) == (target, len(CONTENT), sha256(CONTENT), True)
    assert target.read_bytes() == CONTENT
    assert note_path(target).read_text() == f"{sha256(CONTENT)}  a.zip\n"
    assert leftovers(target.parent) == ["a.zip", "a.zip.sha256"]
    assert seen[-1] == (len(CONTENT), len(CONTENT)) and seen == sorted(seen)
    for known in ({"size": len(CONTENT), "sha256": sha256(CONTENT)}, {"size": len(CONTENT)}, {}):
        again = download(f"{server.url}/a.zip", target, **known)
        assert not again.downloaded and again.sha256 == sha256(CONTENT)
    assert len(server.log) == 1


@pytest.mark.parametrize("same_process", [True, False])
@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize(
    "validators",
    [{}, {"etag": None, "last_modified": "Wed, 01 Jan 2020 00:00:00 GMT"}],
    ids=["etag", "time"],
)
def test_a_cut_connection_goes_on_where_it_stopped(server, tmp_path, same_process, known, validators):
    served = server.files["/a"] = Served(CONTENT, faults=[("cut", 300_000)], **validators)
    target = tmp_path / "a"
    checks = {"size": len(CONTENT), "sha256": sha256(CONTENT)} if known else {}
    if not same_process:
        with pytest.raises(DataError, match=r"a: could not be downloaded from http.* a\.partial: run the same command"):
            download(f"{server.url}/a", target, patience=ONCE, **checks)
        assert not target.exists() and bytes_to_come(target, len(CONTENT)) == len(CONTENT) - 300_000
    download(f"{server.url}/a", target, patience=QUICK, **checks)
    assert target.read_bytes() == CONTENT
    first, second = server.requests("/a")
    assert "Range" not in first
    assert second["Range"] == "bytes=300000-"
    assert second["If-Range"] == (served.etag or served.last_modified)
    assert server.sent["/a"] == len(CONTENT)  # not a byte twice
    assert leftovers(tmp_path) == ["a", "a.sha256"]


def test_progress_counts_as_patience_with_a_bad_line(server, tmp_path):
    server.files["/a"] = Served(CONTENT, faults=[("cut", 100_000)] * 9)
    assert download(f"{server.url}/a", tmp_path / "a", patience=QUICK).sha256 == sha256(CONTENT)
    assert len(server.log) == 10  # more breaks than attempts, each with something new


def test_a_stalled_connection_times_out_and_goes_on(server, tmp_path):
    server.files["/a"] = Served(CONTENT, faults=[("stall", 300_000)])
    start = time.monotonic()
    download(f"{server.url}/a", tmp_path / "a", patience=Patience(3, 0.0, 1.0, timeout_s=0.3))
    assert (tmp_path / "a").read_bytes() == CONTENT
    assert time.monotonic() - start < 4
    assert server.requests("/a")[1]["Range"] == "bytes=300000-"


def test_a_server_that_ignores_range_starts_from_zero(server, tmp_path):
    server.files["/a"] = Served(CONTENT, ranges=False, faults=[("cut", 300_000), ("cut", 500_000)])
    download(f"{server.url}/a", tmp_path / "a", patience=QUICK)
    assert (tmp_path / "a").read_bytes() == CONTENT
    assert server.sent["/a"] == 300_000 + 500_000 + len(CONTENT)


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
    server.files["/a"] = Served(CONTENT, faults=[("cut", 300_000)], **before)
    with pytest.raises(DataError):
        download(f"{server.url}/a", tmp_path / "a", patience=ONCE)
    server.files["/a"] = Served(new, **after)
    download(f"{server.url}/a", tmp_path / "a", patience=QUICK)
    assert (tmp_path / "a").read_bytes() == new


def test_a_checksum_alone_lets_a_server_without_validators_go_on(server, tmp_path):
    server.files["/a"] = Served(CONTENT, etag=None, faults=[("cut", 300_000)])
    download(f"{server.url}/a", tmp_path / "a", sha256=sha256(CONTENT), patience=QUICK)
    assert server.sent["/a"] == len(CONTENT)


def test_a_whole_partial_file_only_gets_its_name(server, tmp_path):
    (tmp_path / "a.partial").write_bytes(CONTENT)
    got = download(f"{server.url}/a", tmp_path / "a", size=len(CONTENT), sha256=sha256(CONTENT), patience=QUICK)
    assert got.downloaded and not server.log
    assert leftovers(tmp_path) == ["a", "a.sha256"]


def test_a_partial_file_that_is_too_long_is_started_again(server, tmp_path):
    server.files["/a"] = Served(CONTENT)
    (tmp_path / "a.partial").write_bytes(CONTENT + b"x")
    (tmp_path / "a.partial.json").write_text(json.dumps({"validator": '"one"'}))
    download(f"{server.url}/a", tmp_path / "a", patience=QUICK)  # answered with 416
    assert (tmp_path / "a").read_bytes() == CONTENT
    (tmp_path / "b.partial").write_bytes(CONTENT + b"x")
    server.files["/b"] = Served(CONTENT)
    download(f"{server.url}/b", tmp_path / "b", size=len(CONTENT), patience=QUICK)
    assert "Range" not in server.requests("/b")[0]


def test_damaged_facts_about_a_partial_file_only_cost_time(server, tmp_path):
    server.files["/a"] = Served(CONTENT)
    (tmp_path / "a.partial").write_bytes(b"half")
    (tmp_path / "a.partial.json").write_bytes(b"\xff{")
    download(f"{server.url}/a", tmp_path / "a", patience=QUICK)
    assert (tmp_path / "a").read_bytes() == CONTENT


def test_a_server_without_content_length_is_believed_only_with_the_known_size(server, tmp_path):
    server.files["/a"] = Served(CONTENT, length=False)
    assert download(f"{server.url}/a", tmp_path / "a", patience=QUICK).bytes == len(CONTENT)
    server.files["/b"] = Served(CONTENT, length=False, faults=[("cut", 1000)])
    download(f"{server.url}/b", tmp_path / "b", size=len(CONTENT), patience=QUICK)
    assert (tmp_path / "b").read_bytes() == CONTENT
    with pytest.raises(DataError, match="sends more than the 1000 bytes"):
        download(f"{server.url}/a", tmp_path / "c", size=1000, patience=QUICK)
    assert leftovers(tmp_path) == ["a", "a.sha256", "b", "b.sha256"]


def test_a_redirect_keeps_the_range_and_leads_nowhere_else(server, tmp_path):
    server.files["/a"] = Served(faults=[302] * 9, headers={"Location": "/real"}, etag=None)
    server.files["/real"] = Served(CONTENT, faults=[("cut", 300_000)])
    download(f"{server.url}/a", tmp_path / "a", patience=QUICK)
    assert server.requests("/real")[1]["Range"] == "bytes=300000-"
    assert server.sent["/real"] == len(CONTENT)
    server.files["/b"] = Served(faults=[302] * 9, headers={"Location": "file:///etc/hostname"}, etag=None)
    with pytest.raises(DataError, match="/b"):
        download(f"{server.url}/b", tmp_path / "b", patience=QUICK)
    assert not (tmp_path / "b").exists()


# --- What cannot be had ---------------------------------------------------------------------------


def test_two_errors_of_the_server_are_outlived(server, tmp_path):
    server.files["/a"] = Served(CONTENT, faults=[500, 500])
    download(f"{server.url}/a", tmp_path / "a", patience=QUICK)
    assert len(server.log) == 3


def test_waits_double_and_heed_the_server(server, tmp_path, monkeypatch):
    waits = []
    monkeypatch.setattr(time, "sleep", waits.append)
    server.files["/a"] = Served(CONTENT, faults=[500, 503, 429, 500], headers={"Retry-After": "3"})
    with pytest.raises(DataError):
        download(f"{server.url}/a", tmp_path / "a", patience=Patience(attempts=4, first_wait_s=2.0))
    assert waits == [3.0, 4.0, 8.0]
    waits.clear()
    server.files["/a"] = Served(CONTENT, faults=[500, 500, 500], headers={"Retry-After": "86400"})
    download(f"{server.url}/a", tmp_path / "a", patience=Patience(attempts=4, first_wait_s=2.0, longest_wait_s=5.0))
    assert waits == [5.0, 5.0, 5.0]


@pytest.mark.parametrize(("status", "attempts"), [(500, 3), (404, 1), (403, 1), (410, 1)])
def test_an_error_of_the_server_names_file_address_and_remedy(server, tmp_path, status, attempts):
    server.files["/a"] = Served(CONTENT, faults=[status] * 9)
    with pytest.raises(DataError) as caught:
        download(f"{server.url}/a", tmp_path / "a", patience=QUICK)
    for part in (str(tmp_path / "a"), f"{server.url}/a", str(status), "--mirror"):
        assert part in str(caught.value)
    assert len(server.log) == attempts
    assert leftovers(tmp_path) == []


def test_no_connection_names_file_address_and_remedy(server, tmp_path):
    with pytest.raises(
        DataError, match=r"a: could not be downloaded from http://127.0.0.1:1/a: no connection .*mirror"
    ):
        download("http://127.0.0.1:1/a", tmp_path / "a", patience=QUICK)
    for address in ("file:///etc/hostname", "ftp://example.org/a", "a", "http://x:port/"):
        with pytest.raises(DataError, match="address"):
            download(address, tmp_path / "a", patience=QUICK)


def test_a_wrong_checksum_leaves_nothing(server, tmp_path):
    server.files["/a"] = Served(CONTENT)
    with pytest.raises(DataError, match=rf"a: what {server.url}/a gave is not the published .*--mirror"):
        download(f"{server.url}/a", tmp_path / "a", sha256=sha256(b"other"), patience=QUICK)
    assert leftovers(tmp_path) == []


def test_another_size_is_refused_before_a_byte_is_taken(server, tmp_path):
    server.files["/a"] = Served(CONTENT)
    with pytest.raises(DataError, match=f"offers {len(CONTENT)} bytes, the published file has 7"):
        download(f"{server.url}/a", tmp_path / "a", size=7, patience=QUICK)
    assert not (tmp_path / "a").exists()


def test_a_web_page_in_place_of_a_file_costs_nothing_that_was_received(server, tmp_path):
    served = server.files["/a"] = Served(CONTENT, faults=[("cut", 300_000)])
    with pytest.raises(DataError):
        download(f"{server.url}/a", tmp_path / "a", patience=ONCE)
    server.files["/a"] = Served(b"<html>log in first</html>", etag=None, headers={"Content-Type": "text/html"})
    with pytest.raises(DataError, match=rf"a: {server.url}/a sends a web page .*open it in a browser"):
        download(f"{server.url}/a", tmp_path / "a", patience=QUICK)
    server.files["/a"] = served
    download(f"{server.url}/a", tmp_path / "a", patience=QUICK)
    assert (tmp_path / "a").read_bytes() == CONTENT
    assert server.requests("/a")[-1]["Range"] == "bytes=300000-"


def test_a_half_file_under_the_right_name_is_downloaded_again(server, tmp_path, caplog):
    server.files["/a"] = Served(CONTENT)
    for known in ({"size": len(CONTENT)}, {"sha256": sha256(CONTENT)}):
        (tmp_path / "a").write_bytes(CONTENT[:1000])
        assert download(f"{server.url}/a", tmp_path / "a", patience=QUICK, **known).downloaded
        assert (tmp_path / "a").read_bytes() == CONTENT
        assert "downloading it again" in caplog.text


def test_without_a_published_checksum_a_second_fetch_is_compared_with_the_first(server, tmp_path):
    target = tmp_path / "a"
    server.files["/a"] = Served(CONTENT)
    download(f"{server.url}/a", target, patience=QUICK)
    target.write_bytes(b"edited")
    with pytest.raises(DataError, match=r"a: has changed since it was downloaded .*Delete the file"):
        download(f"{server.url}/a", target, patience=QUICK)
    target.unlink()
    server.files["/a"] = Served(CONTENT[::-1], etag='"two"')
    with pytest.raises(DataError, match=r"now gives another file .*delete the note"):
        download(f"{server.url}/a", target, patience=QUICK)
    assert not target.exists()
    requests = len(server.log)
    note_path(target).unlink()
    download(f"{server.url}/a", target, patience=QUICK)
    assert target.read_bytes() == CONTENT[::-1] and len(server.log) == requests  # the download was kept


def test_two_processes_do_not_write_one_file(server, tmp_path):
    fcntl = pytest.importorskip("fcntl")
    server.files["/a"] = Served(CONTENT)
    with open(tmp_path / "a.partial", "wb") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(DataError, match=r"a\.partial: another process"):
            download(f"{server.url}/a", tmp_path / "a", patience=QUICK)
    assert download(f"{server.url}/a", tmp_path / "a", patience=QUICK).downloaded


# --- The disk -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("factor", "free_mib"), [(0.0, 64), (8.0, 70)])
def test_a_disk_without_room_is_told_before_a_byte_is_written(server, tmp_path, monkeypatch, factor, free_mib):
    server.files["/a"] = Served(CONTENT)
    monkeypatch.setattr(shutil, "disk_usage", lambda place: shutil._ntuple_diskusage(1 << 40, 0, free_mib << 20))
    with pytest.raises(DataError, match=r"a needs (1.0|9.4) MB .* but only .* MB are free .*make room"):
        download(f"{server.url}/a", tmp_path / "a", space_factor=factor, patience=QUICK)
    assert leftovers(tmp_path) == []


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="the system has no full device")
def test_a_disk_that_fills_up_is_named_with_the_remedy(server, tmp_path):
    server.files["/a"] = Served(CONTENT)
    (tmp_path / "a.partial").symlink_to("/dev/full")  # its writes really fail with ENOSPC
    with pytest.raises(DataError, match=r"a: the disk .* is full .*run the same command again"):
        download(f"{server.url}/a", tmp_path / "a", patience=QUICK)
    assert not (tmp_path / "a").exists()
    assert len(server.log) == 1  # trying again would not help


def test_a_download_stopped_by_the_disk_goes_on_when_there_is_room(server, tmp_path):
    resource = pytest.importorskip("resource")
    server.files["/a"] = Served(CONTENT)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300_001, limits[1]))
    try:
        with pytest.raises(DataError, match=r"a: larger than a file can be there .*--data-root"):
            download(f"{server.url}/a", tmp_path / "a", patience=QUICK)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (tmp_path / "a.partial").read_bytes() == CONTENT[:300_001]  # the odd end: a write that took a part
    download(f"{server.url}/a", tmp_path / "a", patience=QUICK)
    assert (tmp_path / "a").read_bytes() == CONTENT
    assert server.requests("/a")[1]["Range"] == "bytes=300001-"


@pytest.mark.parametrize("code", [errno.EACCES, errno.EROFS, errno.EPERM])
def test_no_permission_is_named_with_the_remedy(server, tmp_path, monkeypatch, code):
    server.files["/a"] = Served(CONTENT)
    real = os.open

    def refuse(path, *args, **kwargs):
        if str(path).endswith(".partial"):
            raise OSError(code, os.strerror(code), str(path))
        return real(path, *args, **kwargs)

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(DataError, match=r"a: no permission .*a\.partial.*; make the folder yours, or .*--data-root"):
        download(f"{server.url}/a", tmp_path / "a", patience=QUICK)


def test_a_file_in_the_way_of_a_folder_is_named(server, tmp_path):
    (tmp_path / "sub").write_text("a file")
    with pytest.raises(DataError, match=r"sub/a: a file is in the way of a folder .*sub"):
        download(f"{server.url}/a", tmp_path / "sub" / "a", patience=QUICK)
    (tmp_path / "folder").mkdir()
    with pytest.raises(DataError, match="folder: is no file"):
        download(f"{server.url}/a", tmp_path / "folder", patience=QUICK)


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


@pytest.mark.parametrize("mirror", ["", "m.org", "ftp://m.org", "file:///data", "https://"])
def test_a_mirror_that_is_no_address_is_refused(mirror):
    with pytest.raises(DataError, match="--mirror"):
        mirrored("http://a.org/x", mirror)


def test_the_size_is_asked_without_a_download(server):
    server.files["/a"] = Served(CONTENT, faults=[500])
    server.files["/b"] = Served(CONTENT, length=False)
    assert remote_size(f"{server.url}/a", "a", QUICK) == len(CONTENT)
    assert remote_size(f"{server.url}/b", "b", QUICK) is None
    assert server.sent == {}
    with pytest.raises(DataError, match="404"):
        remote_size(f"{server.url}/c", "c", QUICK)


def test_nothing_but_the_standard_library_is_needed_to_download():
    source = Path(fetch.__file__).read_text("utf-8")
    tops = {line.split()[1].split(".")[0] for line in source.splitlines() if line.startswith(("import ", "from "))}
    assert tops - set(__import__("sys").stdlib_module_names) == {"ivt_env"}


def test_waiting_for_a_server_is_said(server, tmp_path, caplog):
    for faults, ask in (
        ([503], lambda url: download(url, tmp_path / "a", patience=QUICK)),
        ([503], lambda url: remote_size(url, "a", QUICK)),
        ([503], lambda url: fetch.get_bytes(url, 1 << 21, "a", QUICK)),
    ):
        server.files["/a"] = Served(CONTENT, faults=faults)
        caplog.clear()
        ask(f"{server.url}/a")
        (said,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
        assert said.startswith(f"{server.url}/a: ") and said.endswith("; trying again")
