"""Files and folders that are complete or absent, and locks on folders.

If this is false, a kill or a full disk leaves a cut-off file under its final name, which the next command takes for
a whole one; two runs write into one folder; a device is replaced by a file.
"""

import json
import os
import resource
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from ivt_env.files import (
    ASKED,
    FileError,
    asked_of,
    forget,
    lock_folder,
    refuse_other,
    whole_file,
    whole_folder,
    write_whole,
)


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def test_a_file_is_what_was_written_and_nothing_else_is_left(tmp_path):
    write_whole(tmp_path / "deep" / "a.bin", b"\0one")
    write_whole(tmp_path / "deep" / "a.bin", "zwölf\r\n")
    assert (tmp_path / "deep" / "a.bin").read_bytes() == "zwölf\r\n".encode()
    assert names(tmp_path / "deep") == ["a.bin"]


def test_an_error_in_the_block_leaves_the_old_file(tmp_path):
    write_whole(tmp_path / "a", b"old")
    with pytest.raises(KeyError), whole_file(tmp_path / "a") as file:
        file.write(b"new")
        raise KeyError
    assert (tmp_path / "a").read_bytes() == b"old" and names(tmp_path) == ["a"]


def test_a_full_disk_leaves_the_old_file_and_names_the_one_that_was_to_be_written(tmp_path):
    write_whole(tmp_path / "a", b"old")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        with pytest.raises(OSError, match="a'") as caught:
            write_whole(tmp_path / "a", bytes(100_000))
        with pytest.raises(OSError), whole_folder(tmp_path / "folder", {}) as folder:
            (folder / "x").write_bytes(bytes(100_000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert caught.value.filename == str(tmp_path / "a")
    assert (tmp_path / "a").read_bytes() == b"old" and names(tmp_path) == ["a"]


@pytest.mark.parametrize("name", ["x" * 255, "ü" * 127, "." * 200 + "a"])
def test_a_name_may_be_as_long_as_the_system_allows(tmp_path, name):
    write_whole(tmp_path / name, b"1")
    assert names(tmp_path) == [name]


def put(kind: str, path: Path) -> None:
    """Something that is no regular file, at a name."""
    if kind == "a pipe":
        os.mkfifo(path)
    elif kind == "a socket":
        with socket.socket(socket.AF_UNIX) as one:
            one.bind(str(path))
    elif kind == "a device":
        try:
            os.mknod(path, stat.S_IFCHR | 0o666, os.makedev(1, 3))
        except PermissionError:
            pytest.skip("only root makes devices")
    elif kind == "a folder":
        path.mkdir()
    else:
        (path.parent / "elsewhere").write_text("precious")
        path.symlink_to("elsewhere" if kind == "a link" else "nowhere")


@pytest.mark.parametrize("kind", ["a pipe", "a socket", "a device", "a folder", "a link", "a link to nowhere"])
def test_only_a_regular_file_is_ever_replaced(tmp_path, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)  # a socket's name is short
    put(kind, Path("a"))
    there = Path("a").lstat()
    with pytest.raises(FileError, match="^a is a"):
        write_whole("a", b"new")
    assert os.path.samestat(Path("a").lstat(), there)
    assert not Path("nowhere").exists() and not [n for n in names(tmp_path) if n.endswith(".partial")]
    if kind == "a link":
        assert Path("elsewhere").read_text() == "precious"


def test_a_target_that_changes_while_it_is_written_is_refused_too(tmp_path):
    with pytest.raises(FileError, match="pipe"), whole_file(tmp_path / "a") as file:
        file.write(b"new")
        os.mkfifo(tmp_path / "a")
    assert stat.S_ISFIFO((tmp_path / "a").lstat().st_mode)


def test_two_writers_of_one_file_come_one_after_the_other(tmp_path):
    def write(letter: bytes) -> None:
        for _ in range(20):
            write_whole(tmp_path / "a", letter * 100_000, sync=False)

    threads = [threading.Thread(target=write, args=(letter,)) for letter in (b"a", b"b", b"c")]
    for thread in threads:
        thread.start()
    seen = set()
    while any(t.is_alive() for t in threads):
        if (tmp_path / "a").exists():
            content = (tmp_path / "a").read_bytes()
            assert len(content) == 100_000 and len(set(content)) == 1
            seen.add(content[:1])
    assert seen and names(tmp_path) == ["a"]


@pytest.mark.parametrize("kind", ["a pipe", "a folder", "a link"])
def test_what_lies_at_the_name_of_a_half_written_file_is_never_written_through(tmp_path, kind):
    with whole_file(tmp_path / "a"):
        (partial,) = (p for p in tmp_path.iterdir())
    (tmp_path / "a").unlink()
    put(kind, partial)
    write_whole(tmp_path / "a", b"new")
    assert (tmp_path / "a").read_bytes() == b"new" and not partial.exists()
    if kind == "a link":
        assert (tmp_path / "elsewhere").read_text() == "precious"


KILLED = """
import os, signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # what a shell starts in the background ignores it
from ivt_env.files import *
what, path = sys.argv[1:]
if what == "lock":
    with lock_folder(path):
        with whole_file(path + "/half") as file:
            file.write(b"half"); file.flush()
            print("ready", flush=True); time.sleep(60)
elif what == "file":
    with whole_file(path) as file:
        file.write(b"half"); file.flush()
        print("ready", flush=True); time.sleep(60)
else:
    with whole_folder(path, {"seed": 1}) as folder:
        (folder / "half").write_bytes(b"half")
        print("ready", flush=True); time.sleep(60)
"""


def started(what: str, path: Path) -> "subprocess.Popen[str]":
    process = subprocess.Popen([sys.executable, "-c", KILLED, what, str(path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    return process


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("what", ["file", "folder"])
def test_what_a_killed_process_left_is_not_taken_for_whole_and_goes_with_the_next_writer(tmp_path, what, number):
    process = started(what, tmp_path / "a")
    process.send_signal(number)
    process.wait()
    assert not (tmp_path / "a").exists()
    if what == "file":
        write_whole(tmp_path / "a", b"new")
    else:
        with whole_folder(tmp_path / "a", {"seed": 2}) as folder:
            (folder / "b").write_bytes(b"new")
        assert names(tmp_path / "a") == sorted([ASKED, "b"])
    assert names(tmp_path) == ["a"]


def test_a_folder_is_replaced_at_once_and_says_what_it_was_asked_for(tmp_path):
    for seed in (1, 2):
        with whole_folder(tmp_path / "a", {"seed": seed, "out": Path("x"), "pair": (1, 2)}) as folder:
            assert asked_of(tmp_path / "a") == (None if seed == 1 else {"seed": 1, "out": "x", "pair": [1, 2]})
            (folder / f"of-{seed}").write_text("")
    assert names(tmp_path / "a") == sorted([ASKED, "of-2"]) and names(tmp_path) == ["a"]


def test_a_folder_is_replaced_where_names_cannot_be_exchanged(tmp_path, monkeypatch):
    monkeypatch.setattr("ctypes.CDLL", lambda name: object())
    test_a_folder_is_replaced_at_once_and_says_what_it_was_asked_for(tmp_path)


def test_a_folder_with_other_files_is_never_replaced(tmp_path):
    write_whole(tmp_path / "home" / "letter", "dear")
    (tmp_path / "link").symlink_to("home")
    for name in ("home", "link", "home/letter"):
        with pytest.raises(FileError), whole_folder(tmp_path / name, {}):
            raise AssertionError("it must not come to writing")
    assert (tmp_path / "home" / "letter").read_text() == "dear" and names(tmp_path) == ["home", "link"]


def test_forgetting_takes_the_name_first(tmp_path, monkeypatch):
    write_whole(tmp_path / "a" / "b", "1")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("shutil.rmtree", lambda *a, **k: (_ for _ in ()).throw(KeyboardInterrupt))
        forget(tmp_path / "a")
    assert not (tmp_path / "a").exists()
    with lock_folder(tmp_path):
        pass
    assert names(tmp_path) == []
    forget(tmp_path / "a")  # nothing to do


def test_the_first_option_that_differs_is_named(tmp_path):
    asked = {"seed": 0, "lr": 1e-4, "model": Path("tiny"), "many": (1, 2)}
    with whole_folder(tmp_path / "policy", asked):
        pass
    made = asked_of(tmp_path / "policy")
    assert made is not None
    refuse_other(tmp_path / "policy", made, asked, "give --overwrite")
    refuse_other(tmp_path / "policy", made, asked | {"seed": 1}, "give --overwrite", may_differ={"seed"})
    with pytest.raises(FileError, match=r"policy was made with lr 0\.0001, not 0\.1: give --overwrite"):
        refuse_other(tmp_path / "policy", made, asked | {"lr": 0.1, "many": ()}, "give --overwrite")
    with pytest.raises(FileError, match="new None, not 3"):
        refuse_other(tmp_path / "policy", made, asked | {"new": 3}, "give --overwrite")


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"\xff", b"[" * 100_000])
def test_a_damaged_record_of_what_was_asked_is_named(tmp_path, content):
    (tmp_path / ASKED).write_bytes(content)
    with pytest.raises(FileError, match=ASKED):
        asked_of(tmp_path)


def test_a_folder_in_use_is_refused_and_the_message_says_who(tmp_path):
    process = started("lock", tmp_path)
    try:
        with pytest.raises(FileError, match=f"in use by process {process.pid} .-c lock"), lock_folder(tmp_path):
            raise AssertionError("two at once")
        assert (tmp_path / ".lock").exists()
    finally:
        process.kill()
        process.wait()
    with lock_folder(tmp_path):  # a killed process holds nothing, and what it left half-written is gone
        assert names(tmp_path) == [".lock"]
        with pytest.raises(FileError, match=f"process {os.getpid()}"), lock_folder(tmp_path):
            raise AssertionError("twice in one process")
    assert names(tmp_path) == []


def test_a_forked_child_holds_no_lock(tmp_path):
    with lock_folder(tmp_path):
        child = os.fork()
        if child == 0:
            time.sleep(30)
            os._exit(0)
    try:
        with lock_folder(tmp_path):
            pass
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_only_what_was_left_half_written_is_swept(tmp_path):
    for name in ("data.partial", ".mine.partial", "metrics.jsonl"):
        (tmp_path / name).write_text(json.dumps(name))
    with lock_folder(tmp_path):
        pass
    assert names(tmp_path) == [".mine.partial", "data.partial", "metrics.jsonl"]
