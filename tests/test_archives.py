"""An archive writes inside its folder, all of it or nothing, and no more than was expected.

Silent when false: an archive from a mirror replaces a file of the user's (a start-up script, say), fills
the disk of a shared machine, or leaves a folder that looks complete and is not.
"""

from __future__ import annotations

import io
import os
import shutil
import stat
import struct
import tarfile
import zipfile
from pathlib import Path

import pytest

from ivt_env.data.archives import unpack
from ivt_env.data.sample import DataError

FILES = {"set/a.json": b"[1, 2]" * 50, "set/images/b.jpg": bytes(range(256)) * 9, "set/empty.txt": b""}


def make_zip(path, files, **attributes):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("set/", b"")
        for name, content in files.items():
            info = zipfile.ZipInfo("placeholder")
            info.filename = info.orig_filename = name  # the constructor would cut a NUL and mend separators
            info.compress_type = zipfile.ZIP_DEFLATED
            for key, value in attributes.items():
                if key in info.__slots__:
                    setattr(info, key, value)
            archive.writestr(info, content)
    return path


def make_tar(path, files, mode="w:gz", **attributes):
    with tarfile.open(path, mode, format=tarfile.PAX_FORMAT) as archive:
        folder = tarfile.TarInfo("set")
        folder.type = tarfile.DIRTYPE
        archive.addfile(folder)
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            for key, value in attributes.items():
                setattr(info, key, value)
            archive.addfile(info, io.BytesIO(content))
    return path


MAKERS = {"zip": make_zip, "tgz": make_tar, "tar": lambda path, files, **a: make_tar(path, files, "w", **a)}


@pytest.fixture(params=MAKERS)
def make(request, tmp_path):
    """Writes an archive of each kind, under a name that says nothing."""
    return lambda files, **attributes: MAKERS[request.param](tmp_path / "archive", files, **attributes)


def contents(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in Path(folder).rglob("*") if p.is_file()}


def everything_below(folder):
    return sorted(p.relative_to(folder).as_posix() for p in Path(folder).rglob("*"))


# --- What is unpacked -----------------------------------------------------------------------------


def test_an_interrupted_unpacking_goes_on_and_what_is_there_is_not_written_again(make, tmp_path, monkeypatch):
    archive, out, seen = make(FILES), tmp_path / "deep" / "out", []
    real, calls = os.replace, []

    def interrupted(source, target):
        calls.append(target)
        if len(calls) == 2:
            raise KeyboardInterrupt
        real(source, target)

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        unpack(archive, out)
    assert len(contents(out)) == 1  # no half file under any name
    (out / "set" / "a.json").write_bytes(b"half")
    total = sum(map(len, FILES.values()))
    assert unpack(archive, out, progress=lambda *state: seen.append(state)) == (3, total)
    assert contents(out) == FILES and seen[-1] == (total, total)
    calls.clear()
    monkeypatch.setattr(shutil, "disk_usage", lambda place: shutil._ntuple_diskusage(1 << 40, 0, 0))
    unpack(archive, out)
    assert not calls


def test_only_what_is_wanted_is_unpacked_without_its_folders(make, tmp_path):
    files = FILES | {"set/deep/other.json": b"{}", "__MACOSX/set/._a.json": b"x"}
    got = unpack(make(files), tmp_path / "out", only=("*.json",), flatten=True)
    assert contents(tmp_path / "out") == {"a.json": FILES["set/a.json"], "other.json": b"{}"}
    assert got[0] == 2
    with pytest.raises(DataError, match=r"archive: .*it holds no files that match \*\.csv"):
        unpack(make(files), tmp_path / "out", only=("*.csv",))


def test_a_folder_of_an_archive_is_unpacked_without_what_lies_beside_it(make, tmp_path):
    files = FILES | {"set/deep/other.json": b"{}", "set/deeper/no.json": b"", "set/deep-not.json": b""}
    assert unpack(make(files), tmp_path / "out", below="set/deep")[0] == 1
    assert contents(tmp_path / "out") == {"other.json": b"{}"}
    with pytest.raises(DataError, match=r"archive: .*it holds no files in set/none"):
        unpack(make(files), tmp_path / "out", below="set/none")


def test_a_folder_that_the_user_keeps_elsewhere_is_used(make, tmp_path):
    (tmp_path / "big-disk").mkdir()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "set").symlink_to(tmp_path / "big-disk")
    unpack(make(FILES), tmp_path / "out")
    assert (tmp_path / "big-disk" / "a.json").read_bytes() == FILES["set/a.json"]


# --- What is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        "../outside.txt",
        "set/../../outside.txt",
        "set/..",
        "/tmp/outside.txt",
        "//host/share/outside.txt",
        "..\\outside.txt",
    ],
)
@pytest.mark.parametrize("options", [{}, {"flatten": True}, {"only": ("*.json",)}, {"below": "set"}], ids=str)
def test_a_member_cannot_leave_the_folder_wanted_or_not(make, tmp_path, name, options):
    archive = make(FILES | {name: b"outside"})
    with pytest.raises(DataError) as caught:
        unpack(archive, tmp_path / "out", **options)
    text = str(caught.value)
    assert str(archive) in text and repr(name) in text and "leave the folder" in text and "fetch the original" in text
    assert everything_below(tmp_path) == ["archive"]  # not even the members before it


@pytest.mark.parametrize(
    ("make", "attributes"),
    [(make_tar, {"type": kind}) for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE)]
    + [(make_zip, {"external_attr": (kind | 0o777) << 16}) for kind in (stat.S_IFLNK, stat.S_IFCHR)],
)
def test_links_and_devices_are_refused(tmp_path, make, attributes):
    archive = make(tmp_path / "archive", {"set/odd": b""}, linkname="/etc/passwd", **attributes)
    with pytest.raises(DataError, match="archive: .*its member 'set/odd' is a link or a device"):
        unpack(archive, tmp_path / "out")
    assert everything_below(tmp_path) == ["archive"]


def test_an_encrypted_member_is_refused(tmp_path):
    archive = make_zip(tmp_path / "archive", FILES)
    content = bytearray(archive.read_bytes())
    at = content.rindex(b"PK\x01\x02") + 8  # the flags in the table of contents
    content[at] |= 1
    archive.write_bytes(content)
    with pytest.raises(DataError, match="encrypted"):
        unpack(archive, tmp_path / "out")


def test_two_members_for_one_file_are_refused(make, tmp_path):
    with pytest.raises(DataError, match="'set/deep/a.json' and an earlier one would be the same file"):
        unpack(make(FILES | {"set/deep/a.json": b""}), tmp_path / "out", flatten=True)
    assert everything_below(tmp_path) == ["archive"]


def test_an_archive_that_swells_is_refused(tmp_path):
    for maker in (make_zip, make_tar):
        archive = maker(tmp_path / "archive", {"set/zeros": bytes(40_000_000)})
        with pytest.raises(DataError, match=r"at its member 'set/zeros' it has grown to 40\.0 MB"):
            unpack(archive, tmp_path / "out")
        assert everything_below(tmp_path) == ["archive"]


# --- What is broken -------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_a_half_downloaded_archive_is_named_with_the_remedy(make, tmp_path, share):
    archive = make({f"set/{number}": os.urandom(5000) for number in range(20)})
    content = archive.read_bytes()
    archive.write_bytes(content[: int(share * len(content))])
    with pytest.raises(DataError, match=r"archive: .*fetch the original again"):
        unpack(archive, tmp_path / "out")
    assert everything_below(tmp_path) == ["archive"]


@pytest.mark.parametrize("content", [b"", b"<html>not found</html>", b"PK", b"\x1f\x8b", os.urandom(4000)])
def test_something_else_is_named_with_the_remedy(tmp_path, content):
    (tmp_path / "archive").write_bytes(content)
    with pytest.raises(DataError, match=r"archive: .*fetch the original again"):
        unpack(tmp_path / "archive", tmp_path / "out")
    with pytest.raises(DataError, match=r"absent: cannot be read .*fetch the original again"):
        unpack(tmp_path / "absent", tmp_path / "out")


def test_a_damaged_member_or_one_of_another_size_than_stated_leaves_no_file(tmp_path):
    archive = make_zip(tmp_path / "archive", {"set/a": os.urandom(5000)})
    damaged = bytearray(content := archive.read_bytes())
    damaged[2000] ^= 255
    for broken in (bytes(damaged), content.replace(struct.pack("<L", 5000), struct.pack("<L", 6000))):
        archive.write_bytes(broken)
        with pytest.raises(DataError, match=r"archive: cannot be unpacked .*fetch the original again"):
            unpack(archive, tmp_path / "out")
        assert contents(tmp_path / "out") == {}


# --- The disk -------------------------------------------------------------------------------------


def test_a_disk_without_room_is_told_before_a_file_is_written(make, tmp_path, monkeypatch):
    archive = make({"set/a": bytes(3_000_000)})
    monkeypatch.setattr(shutil, "disk_usage", lambda place: shutil._ntuple_diskusage(1 << 40, 0, 66_000_000))
    with pytest.raises(DataError, match=r"out: unpacking archive needs 3\.0 MB .*, but only 66\.0 MB are free"):
        unpack(archive, tmp_path / "out")
    assert everything_below(tmp_path) == ["archive"]


def test_a_disk_that_fills_up_leaves_no_half_file(make, tmp_path, full_disk):
    with pytest.raises(OSError, match="No space left"):
        unpack(make({"a": b"content"}), tmp_path / "out")
    assert everything_below(tmp_path / "out") == []
