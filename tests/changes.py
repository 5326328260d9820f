"""Seeded changes to files and folders, and commands that meet them in forked children.

    rng = random.Random(0)
    what, changed = mutate(path.read_bytes(), rng, "json")      # one content
    what = mutate_folder(folder, rng)                           # one file of a folder, or the file itself
    ended = forked(lambda: cli.main(["score", str(path), ...])) # status, output, peak of memory
    assert ended.promised, (what, ended)

A child costs what the command does: everything that it imports must be imported before. How many changes a test
makes is ``number(few)``: few of them in the suite, as many as the variable IVT_MUTATIONS says on request.
"""

from __future__ import annotations

import contextlib
import faulthandler
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
    float("nan"), float("inf"), float("-inf"), "", " ", "x", "0", "1e999", "\x00", "a\x00b", "\ud800", "é" * 300,
    "x" * 100_000, "../../etc/passwd", "/", "/dev/null", "${HOME}", "{{ 7 * 7 }}", "<script>", [], {}, [None], [[]],
    {"": None}, {"x": {"y": []}}, [0] * 4, [1, 2], ["x"] * 1000,
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


def mutate(raw: bytes, rng: random.Random, kind: str) -> tuple[str, bytes]:
    """What was done, and the changed content.

    Args:
        raw: the content.
        rng: decides.
        kind: "json", "jsonl" or "yaml", of which values and keys are changed as well; or "bytes".
    """
    if kind in ("json", "jsonl", "yaml") and rng.random() < 0.7:
        changed = _structure(raw, rng, kind)
        if changed is not None:
            return changed
    return _bytes(raw, rng)


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
    what, changed = mutate(path.read_bytes(), rng, kind_of(path))
    path.write_bytes(changed)
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
    try:
        os.dup2(output, 1)
        os.dup2(errors, 2)
        sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)
        in_use = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (in_use + MOST_BYTES,) * 2)
        faulthandler.disable()  # of pytest
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


def _structure(raw: bytes, rng: random.Random, kind: str) -> tuple[str, bytes] | None:
    """Another value, key or depth somewhere inside; None for content that is not what it is called."""
    lines = raw.splitlines(keepends=True) if kind == "jsonl" else [raw]
    place = rng.randrange(len(lines)) if lines else 0
    try:
        content = (yaml.safe_load if kind == "yaml" else json.loads)(lines[place])
    except (ValueError, IndexError, yaml.YAMLError):
        return None
    what, content = _changed(content, rng)
    if kind == "yaml":
        text = yaml.safe_dump(content, allow_unicode=True).replace("\ud800", "?")
    else:
        text = json.dumps(content)
    # Nested so deeply that no library writes it: put into the written text.
    for mark, deep in _NESTED.items():
        text = text.replace(f'"{mark}"', deep).replace(mark, deep)
    if rng.random() < 0.05 and text.startswith("{"):
        what, text = "a key twice", "{" + text[1:-1] + ", " + text[1:]
    lines[place] = text.encode("utf-8", "surrogatepass") + (b"\n" if kind == "jsonl" else b"")
    return what, b"".join(lines)


_NESTED = {f"NESTED{n}": opened * n + closed * n for n, opened, closed in ((60, "[", "]"), (3000, "[", "]"))}
_NESTED |= {"NESTED100000": "[" * 100_000, "NESTEDMAP": '{"a": ' * 5000 + "1" + "}" * 5000}


def _changed(content: Any, rng: random.Random) -> tuple[str, Any]:
    """Change one random place of a JSON-able value."""
    places = list(_places(content, ()))
    where = rng.choice(places)
    how = rng.random()
    if not where:
        return _swap(content, rng, "all of it")
    parent = content
    for key in where[:-1]:
        parent = parent[key]
    key, name = where[-1], "/".join(map(str, where))
    if how < 0.2:
        del parent[key]
        return f"{name} deleted", content
    if how < 0.3 and isinstance(parent, dict):
        parent[f"{key}x" if rng.random() < 0.5 else str(key).upper()] = parent.pop(key)
        return f"{name} renamed", content
    if how < 0.35 and isinstance(parent, list):
        parent.insert(key, parent[key])
        return f"{name} twice", content
    if how < 0.4:
        parent[key] = [parent[key]]
        return f"{name} in a list", content
    what, parent[key] = _swap(parent[key], rng, name)
    return what, content


def _swap(value: Any, rng: random.Random, name: str) -> tuple[str, Any]:
    if rng.random() < 0.12:
        mark = rng.choice(list(_NESTED))
        return f"{name} is {mark}", mark
    if isinstance(value, (int, float)) and not isinstance(value, bool) and rng.random() < 0.4:
        factor = rng.choice((-1, 0, 2, 7, 1000, 10**7, 10**12))
        return f"{name} times {factor}", value * factor
    new = rng.choice(_SWAPS)
    return f"{name} is {repr(new)[:40]}", new


def _places(content: Any, where: tuple[Any, ...]) -> Any:
    yield where
    items: Any = ()
    if isinstance(content, dict):
        items = list(content.items())
    elif isinstance(content, list):
        items = list(enumerate(content))[:50]
    for key, value in items:
        yield from _places(value, (*where, key))
