"""Seeded changes to files and folders, and commands that meet them in forked children.

    rng = random.Random(0)
    what, content = mutate(path.read_bytes(), rng, "json")      # one content
    what, value = changed({"a": [1]}, rng)                      # one value
    what = mutate_folder(folder, rng)                           # one file of a folder, or the file itself
    ended = forked(lambda: cli.main(["score", str(path), ...])) # status, output, peak of memory
    assert ended.promised, (what, ended)

A child costs what the command does: everything that it imports must be imported before. How many changes a test
makes is ``number(few)``: few of them in the suite, as many as the variable IVT_MUTATIONS says on request.
"""

from __future__ import annotations

import contextlib
import copy
import faulthandler
import gc
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

MOST_BYTES = 2 * 1024**3
"""Of memory that a command may use, whatever it is given."""
SECONDS = 60

_BUG = 70
_SWAPS: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 3, 10**9, 2**31, 2**63, -(2**63), 10**30, 10**400, 0.5, -0.0, 1e308, 1e-320,
    float("nan"), float("inf"), float("-inf"), "", " ", "x", "0", "NaN", "1e999", "\x00", "a\x00b", "\ud800",
    "é" * 5000, "x" * 300_000, "../../etc/passwd", "/", "/dev/null", "${HOME}", "{{ 7 * 7 }}", "<script>", [], {},
    [None], [[]], {"": None}, {"x": {"y": []}}, [0] * 4, [1, 2], ["x"] * 1000, [0] * 10_000,
    {str(n): n for n in range(3000)},
)  # fmt: skip


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    status: int | None
    """None: it was killed by ``killed_by``."""
    killed_by: str | None
    output: str
    errors: str
    peak_bytes: int

    @property
    def promised(self) -> bool:
        """Done or unfit, or status 2 with an error in one line; no traceback, no crash, no waste of memory."""
        ends_well = self.status in (0, 1) or (self.status == 2 and "error: " in (self.errors.splitlines() or [""])[-1])
        small = self.peak_bytes < MOST_BYTES and "not enough memory" not in self.errors
        return ends_well and small and "Traceback" not in self.errors


def number(few: int) -> int:
    """How many changes a test makes."""
    return int(os.environ.get("IVT_MUTATIONS", few))


def mutate(raw: bytes, rng: random.Random, kind: str = "bytes") -> tuple[str, bytes]:
    """What was done, and the changed content.

    Args:
        raw: the content.
        rng: decides.
        kind: "json", "jsonl" or "yaml", of which values and keys are changed as well; or "bytes".
    """
    if kind != "bytes" and rng.random() < 0.7:
        try:
            content = [json.loads(line) for line in raw.splitlines()] if kind == "jsonl" else _READ[kind](raw)
        except (ValueError, yaml.YAMLError):  # not what it is called
            return _bytes(raw, rng)
        what, content = changed(content, rng)
        if kind == "yaml":
            with contextlib.suppress(RecursionError):  # else as JSON, which is YAML too
                return what, yaml.safe_dump(content, allow_unicode=True).encode("utf-8", "surrogatepass")
        if kind == "jsonl" and isinstance(content, list):
            return what, b"".join(written(line) + b"\n" for line in content)
        text = written(content)
        if rng.random() < 0.05 and text.startswith(b"{"):
            return f"{what}, all keys twice", b"{" + text[1:-1] + b", " + text[1:]
        return what, text
    return _bytes(raw, rng)


def changed(value: Any, rng: random.Random) -> tuple[str, Any]:
    """What was done, and a copy of a JSON-like value of which one place or three hold something else."""
    root = [copy.deepcopy(value)]
    done = []
    for _ in range(rng.choice((1, 1, 1, 3))):
        holder, key, name = rng.choice(_places(root) or [(root, 0, "")])
        if not root:  # all of it was deleted
            break
        done.append(f"{name} {_change(holder, key, value, rng)}")
    return ", ".join(done), root[0] if root else None


def written(value: Any) -> bytes:
    """JSON of any depth: Python's own writer gives up before a thousand levels."""
    pieces: list[str] = []
    work: list[Any] = [value]
    while work:
        one = work.pop()
        if isinstance(one, _Text):
            pieces.append(one)
        elif isinstance(one, (dict, list)):
            opening, closing = "{}" if isinstance(one, dict) else "[]"
            parts: list[Any] = [_Text(opening)]
            for key, held in one.items() if isinstance(one, dict) else enumerate(one):
                name = f"{json.dumps(str(key))}: " if isinstance(one, dict) else ""
                parts += [_Text((", " if len(parts) > 1 else "") + name), held]
            work += reversed([*parts, _Text(closing)])
        else:
            pieces.append(json.dumps(one, default=str))
    return "".join(pieces).encode("utf-8", "surrogatepass")


def nested(depth: int, as_dict: bool) -> Any:
    """A list in a list, or an object in an object, ``depth`` times."""
    value: Any = 1
    for _ in range(depth):
        value = {"a": value} if as_dict else [value]
    return value


def kind_of(path: Path) -> str:
    """The kind of a file by its name."""
    return {".json": "json", ".jsonl": "jsonl", ".yaml": "yaml", ".yml": "yaml"}.get(path.suffix, "bytes")


def mutate_folder(folder: Path, rng: random.Random, pattern: str = "**/*") -> str:
    """Change one file below ``folder``, or put something else in its place; says what was done."""
    path = rng.choice(sorted(p for p in folder.glob(pattern) if p.is_file()))
    name = path.relative_to(folder)
    if rng.random() < 0.15:
        how = rng.choice(("removed", "a folder", "a link to itself", "a link to nowhere", "of another file"))
        others = sorted(p for p in folder.glob("**/*") if p.is_file() and p != path)
        content = rng.choice(others).read_bytes() if others else b""
        path.unlink()
        if how == "a folder":
            path.mkdir()
        elif how.startswith("a link"):
            path.symlink_to(path if how == "a link to itself" else folder / "nowhere")
        elif how == "of another file":
            path.write_bytes(content)
        return f"{name}: {how}"
    what, content = mutate(path.read_bytes(), rng, kind_of(path))
    path.write_bytes(content)
    return f"{name}: {what}"


def forked(command: Callable[[], object], folder: Path | None = None) -> Ended:
    """Run ``command`` in a child, with a limit on memory and time. What it returns is the exit status.

    Args:
        command: such as ``lambda: cli.main([...])``.
        folder: to work in.
    """
    with tempfile.TemporaryFile() as output, tempfile.TemporaryFile() as errors:
        sys.stdout.flush()
        sys.stderr.flush()
        child = os.fork()
        if not child:
            _run_and_exit(command, folder, output.fileno(), errors.fileno())
        _, how, used = os.wait4(child, 0)
        said = []
        for file in (output, errors):
            file.seek(0)
            said.append(file.read(1_000_000).decode("utf-8", "replace"))
    killed = signal.Signals(os.WTERMSIG(how)).name if os.WIFSIGNALED(how) else None
    status = None if killed else os.WEXITSTATUS(how)
    return Ended(status, killed, said[0], said[1], used.ru_maxrss * 1024)


def _run_and_exit(command: Callable[[], object], folder: Path | None, output: int, errors: int) -> None:
    status = _BUG
    gc.freeze()  # to look through all that the parent made would copy its memory
    try:
        os.dup2(output, 1)
        os.dup2(errors, 2)
        sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)
        in_use = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (in_use + MOST_BYTES,) * 2)
        faulthandler.disable()  # of pytest
        if "torch" in sys.modules:  # its pool is made anew after a fork, which two threads at once do wrongly
            sys.modules["torch"].set_num_threads(1)
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(SECONDS)
        if folder is not None:
            os.chdir(folder)
        try:
            done = command()
            status = done if type(done) is int else 0
        except SystemExit as ended:
            status = ended.code if isinstance(ended.code, int) else 0 if ended.code is None else 2
    except BaseException:
        with contextlib.suppress(OSError):
            traceback.print_exc()
    finally:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError):
                stream.flush()
        os._exit(status)


def copied(folder: Path, to: Path) -> Path:
    """A copy of ``folder`` at ``to``, in place of what is there."""
    shutil.rmtree(to, ignore_errors=True)
    return Path(shutil.copytree(folder, to))


# --- One change ---------------------------------------------------------------------------------------


def _bytes(raw: bytes, rng: random.Random) -> tuple[str, bytes]:
    size = len(raw)
    at = rng.randrange(size + 1)
    end = min(size, at + rng.choice((1, 8, 100, 5000)))
    how = rng.randrange(11)
    if how == 0:
        return "empty", b""
    if how <= 2:
        return f"cut off at {at}", raw[:at]
    if how == 3:
        return f"zeros from {at} to {end}", raw[:at] + bytes(end - at) + raw[end:]
    if how == 4:
        return f"NUL at {at}", raw[:at] + b"\x00" + raw[at:]
    if how == 5:
        return f"without {at} to {end}", raw[:at] + raw[end:]
    if how == 6:
        return f"{at} to {end} twice", raw[:end] + raw[at:]
    if how == 7:
        return f"noise at {at}", raw[:at] + rng.randbytes(rng.choice((1, 4, 64))) + raw[at:]
    if how == 8:
        encoding = rng.choice(("utf-16", "utf-32", "utf-8-sig", "utf-7"))
        return f"as {encoding}", raw.decode("latin-1").encode(encoding)
    flipped = bytearray(raw or b"\x00")
    # The head of a file holds its sizes and offsets: half of the flips go there.
    reach = len(flipped) if rng.random() < 0.5 else min(len(flipped), 512)
    places = [rng.randrange(reach) for _ in range(rng.choice((1, 1, 2, 10)))]
    for place in places:
        flipped[place] ^= 1 << rng.randrange(8)
    return f"bits flipped in {places}", bytes(flipped)


class _Text(str):
    """Of the JSON itself, not a value in it."""


_READ: dict[str, Callable[[bytes], Any]] = {"json": json.loads, "yaml": yaml.safe_load}
_WAYS = ("deleted", "renamed", "repeated", "in a list", "times", "nested", "of elsewhere", "swapped", "swapped")


def _change(holder: Any, key: Any, whole: Any, rng: random.Random) -> str:
    """Change what ``holder`` has at ``key``; says how."""
    value, how = holder[key], rng.choice(_WAYS)
    if how == "deleted":
        del holder[key]
    elif how == "renamed" and isinstance(holder, dict):
        holder[rng.choice((f"{key}x", str(key).upper()))] = holder.pop(key)
    elif how == "repeated" and isinstance(holder, list):
        holder[key:key] = [value] * rng.choice((1, 50))
    elif how == "in a list":
        holder[key] = [value]
    elif how == "times" and type(value) in (int, float):
        how = f"times {(factor := rng.choice((-1, 0, 2, 7, 1000, 10**7, 10**12)))}"
        holder[key] = value * factor
    elif how == "nested":
        depth, as_dict = rng.choice((30, 60, 990, 3000, 100_000)), rng.random() < 0.5
        how = f"is {depth} {'objects' if as_dict else 'lists'} deep"
        holder[key] = nested(depth, as_dict)
    elif how == "of elsewhere" and (places := _places(whole)):
        other, at, name = rng.choice(places)
        how = f"is that of {name}"
        holder[key] = copy.deepcopy(other[at])
    else:
        new = rng.choice(_SWAPS)
        how = f"is {str(new)[:40]!r}"
        holder[key] = copy.deepcopy(new)  # a later change must not reach the table
    return how


def _places(root: Any) -> list[tuple[Any, Any, str]]:
    """The places below, the first thousands of them: what holds each, its key there, and its name."""
    found, work = [], [(root, "")]
    for holder, name in work:
        if len(found) > 5000:
            break
        items = holder.items() if isinstance(holder, dict) else enumerate(holder) if isinstance(holder, list) else ()
        for key, held in items:
            found.append((holder, key, f"{name}/{key}"[-60:]))
            if isinstance(held, (dict, list)):
                work.append((held, found[-1][2]))
    return found
