"""Is a data set on this machine whole, readable and free of leaks? What ``ivt data check`` says.

Everything is looked at, not a sample: every row through its reader, every image file decoded.
"""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from itertools import islice, product
from typing import Any, Literal

from ivt_env.data.checked import Box
from ivt_env.data.images import read_image
from ivt_env.data.sample import DataError
from ivt_env.data.table import Source, Table, open_table
from ivt_env.game import unplayable

Level = Literal["error", "warning", "note"]
MOST_LEFT_OUT = 0.1
"""Share of a split's rows that may be unusable; with more the data set is not fit for use."""
_EXAMPLES = 5


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing worth knowing about a data set."""

    level: Level
    """``error``: results would be wrong or a run would stop; ``warning``: look at it; ``note``: good to know."""
    split: str
    text: str
    count: int
    """How many rows or images."""
    examples: tuple[str, ...] = ()
    """The first few."""


@dataclass
class Report:
    """What was found in a data set."""

    name: str
    layout: str
    folder: str
    samples: dict[str, int] = field(default_factory=dict)
    """Split -> expressions."""
    images: dict[str, int] = field(default_factory=dict)
    """Split -> distinct images."""
    images_read: int = 0
    """Image files decoded; 0 if that was not asked for."""
    findings: list[Finding] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether there is no error."""
        return all(finding.level != "error" for finding in self.findings)

    def as_json(self) -> dict[str, Any]:
        """JSON-able."""
        return asdict(self) | {"ok": self.ok}

    def __str__(self) -> str:
        """For a person to read."""
        lines = [f"{self.name} ({self.layout}) in {self.folder}"]
        lines += [f"  {s:<8} {n:>8,} expressions on {self.images[s]:>7,} images" for s, n in self.samples.items()]
        lines.append(f"  {self.images_read:,} image files read" if self.images_read else "  images not read")
        for level in ("error", "warning", "note"):
            for finding in (f for f in self.findings if f.level == level):
                lines.append(f"  {level.upper():<8} {finding.split}: {finding.text} ({finding.count:,})")
                lines += [f"             {example}" for example in finding.examples]
                if finding.count > len(finding.examples) > 0:
                    lines.append(f"             ... and {finding.count - len(finding.examples):,} more")
        warned = any(finding.level == "warning" for finding in self.findings)
        good = "  readable, but see the warnings above" if warned else "  whole and readable"
        lines.append(good if self.ok else "  NOT fit for use: see the errors above")
        return "\n".join(lines)


def check_source(
    source: Source,
    splits: Sequence[str] | None = None,
    read_images: bool = True,
    workers: int = 4,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Report:
    """Check a data set; DataError where a split cannot be opened at all.

    Args:
        source: where it lies and how it is read.
        splits: which; None is all. Leaks can only be found between splits that are looked at.
        read_images: whether to decode every image (slow: some 100 a second and core).
        workers: threads that decode images.
        progress: called with images done and images in all.
    """
    report = Report(source.name, source.layout, str(source.folder))
    tables = {split: open_table(source, split, need_images=read_images) for split in splits or source.splits}
    for split, table in tables.items():
        report.samples[split], report.images[split] = len(table), len(set(table.image_ids()))
        expected = (source.published or {}).get(split)
        if expected is not None and expected != len(table):
            text = f"holds {len(table):,} expressions, published are {expected:,}"
            report.findings.append(Finding("error", split, text, abs(expected - len(table))))
        report.findings += _rows(table)
    report.findings += left_out(tables)
    report.findings += leaks({(source.name, s): t for s, t in tables.items()}, source.may_share_images)
    if read_images:
        report.findings += _images(tables, report, workers, progress)
    return report


def left_out(tables: Mapping[str, Table]) -> Iterator[Finding]:
    """The rows that the reader has refused, with its reasons; ``tables`` are splits of one source."""
    reasons: dict[str | None, list[str]] = defaultdict(list)
    for split, reason in next(iter(tables.values())).left_out:
        reasons[split].append(reason)
    for split, found in reasons.items():
        held = [len(table) for name, table in tables.items() if split in (None, name)]
        if not held:
            continue  # of a split that is not looked at
        share = len(found) / (len(found) + sum(held))
        text = f"rows cannot be used and are left out: {share:.1%}, and more than {MOST_LEFT_OUT:.0%} is unfit for use"
        level: Level = "error" if share > MOST_LEFT_OUT else "warning"
        yield Finding(level, split or "all", text, len(found), _first(found))


def leaks(tables: Mapping[tuple[str, str], Table], allowed: bool = False, every: bool = False) -> Iterator[Finding]:
    """Images that are in a training split and in another one, in one data set or across several.

    ``allowed`` says that the data set is known to be divided like this (the google partitions), ``every`` names all
    images instead of the first few.
    """
    images = {key: set(table.image_ids()) for key, table in tables.items()}
    for train, other in product(images, images):
        shared = sorted(images[train] & images[other])
        if train[1] == "train" and other[1] != "train" and shared:
            text = f"{' '.join(train)} shares images with {' '.join(other)}: leave them out of training"
            level: Level = "warning" if allowed or train[0] != other[0] else "error"
            yield Finding(level, f"train/{other[1]}", text, len(shared), tuple(shared) if every else _first(shared))


def _rows(table: Table) -> Iterator[Finding]:
    """Repeated and ambiguous expressions, rows that no environment plays, and targets that leave their images."""
    same: Counter[tuple[str, str, Box]] = Counter()
    refused: list[str] = []
    beyond: list[str] = []
    for index in range(len(table)):
        sample = table[index]
        same[sample.image_id, " ".join(sample.expression.casefold().split()), sample.box] += 1
        if why := unplayable(sample):
            refused.append(f"{sample.sample_id}: {why}")
        if not all(-1e-9 <= value <= 1 + 1e-9 for value in sample.box):
            beyond.append(f"{sample.sample_id}: {[round(value, 4) for value in sample.box]}")
    twice = [f"{image}: {text!r}" for (image, text, _), count in same.items() if count > 1]
    boxes = Counter((image, text) for image, text, _ in same)
    torn = [f"{image}: {text!r} has {count} boxes" for (image, text), count in boxes.items() if count > 1]
    found: list[tuple[Level, str, list[str]]] = [
        ("note", "expressions stand twice with the same image and box", twice),
        ("warning", "expressions are ambiguous: one image, one text, several boxes", torn),
        ("error", "rows cannot be played", refused),
        ("note", "targets reach beyond their images: they are kept and scored as they are", beyond),
    ]
    for level, text, rows in found:
        if rows:
            yield Finding(level, table.split, text, len(rows), _first(rows))


def _images(
    tables: Mapping[str, Table], report: Report, workers: int, progress: Callable[[int, int], None]
) -> Iterator[Finding]:
    """Decode every image once; find broken ones, and equal files under different ids."""
    jobs: dict[str, tuple[Table, int]] = {}
    splits_of: dict[str, set[str]] = defaultdict(set)
    for split, table in tables.items():
        for index, image_id in enumerate(table.image_ids()):
            jobs.setdefault(image_id, (table, index))
            splits_of[image_id].add(split)
    ids_of: dict[str, list[str]] = defaultdict(list)
    broken: list[str] = []
    with ThreadPoolExecutor(workers) as pool:
        # In slices: an exception must not wait behind 20,000 queued images.
        done, waiting = 0, iter(jobs.items())
        while chunk := list(islice(waiting, 64)):
            for (image_id, _), result in zip(chunk, pool.map(_decode, (job for _, job in chunk)), strict=True):
                if result.startswith("sha256:"):
                    ids_of[result].append(image_id)
                else:
                    table, index = jobs[image_id]
                    broken.append(f"{table.split} {table[index].sample_id}: {result}")
            done += len(chunk)
            progress(done, len(jobs))
    report.images_read = done - len(broken)
    if broken:
        yield Finding("error", "all", "images cannot be read", len(broken), _first(broken))
    copies = [ids for ids in ids_of.values() if len(ids) > 1]
    leaking = [ids for ids in copies if len({"train" if "train" in splits_of[i] else "other" for i in ids}) > 1]
    if leaking:
        text = "image files are the same in train and in another split, under different ids"
        yield Finding("error", "train/other", text, len(leaking), _first(" = ".join(ids) for ids in leaking))
    elif copies:
        text = "image files are the same under different ids"
        yield Finding("note", "all", text, len(copies), _first(" = ".join(ids) for ids in copies))


def _decode(job: tuple[Table, int]) -> str:
    """``sha256:...`` of the file, or what is wrong with it."""
    table, index = job
    sample = table[index]
    try:
        path = table.image_path(sample)
        content = path.read_bytes()
        read_image(content, str(path), sample.size)
    except DataError as error:
        return str(error)
    except OSError as error:
        return f"{error.filename}: cannot be read ({error.strerror}); check its permissions"
    return "sha256:" + hashlib.sha256(content).hexdigest()


def _first(texts: Iterable[str]) -> tuple[str, ...]:
    return tuple(islice(texts, _EXAMPLES))
