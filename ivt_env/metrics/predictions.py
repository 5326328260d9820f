"""Predictions in a file: reading them, and matching them to the samples of a data set.

A file is JSON lines, one object per prediction, or one JSON array of such objects::

    {"format": "xyxy", "frame": "px"}                       a header, only as the first line
    {"sample_id": "1-2", "box": [103.9, 300, 238.2, 477.4]}
    {"sample_id": "1-3", "box": null}                       the model gave no box: a counted miss

``id`` and ``bbox`` are read alike. So is a file of the project's own data (``ivt_env.data.custom``): its
``dataset.json`` declares the boxes, and a line without an id goes by its number. Other keys do no harm.

What the four numbers mean is **declared** (by the caller, the header or a published layout) and never guessed. A guess
goes by magnitude, and pixels of a small image look like thousandths: scores would be wrong by points, with nothing to
see. A declaration that does not fit many of the boxes is refused in the same spirit.
"""

from __future__ import annotations

import difflib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from ivt_env import boxes
from ivt_env.boxes import frame_unit
from ivt_env.data.checked import MAX_LINE_BYTES, json_lines, short
from ivt_env.data.custom import read_declared
from ivt_env.data.sample import Sample
from ivt_env.failures import reading

Array = NDArray[np.float64]
Numbers = tuple[float, ...]

FORMATS = {
    "xyxy": "left, top, right, bottom",
    "xywh": "left, top, width, height",
    "cxcywh": "centre x, centre y, width, height",
    "xy": "the two numbers of a point",
}
"""What the numbers are."""

FRAMES = boxes.FRAMES | {
    "resized": "pixels of the resized image that the model saw; each row then has input_size: [height, width]"
}
"""What they are measured in; beside these, a whole number N for 0 to N, relative to the image."""

SUSPICIOUS_SHARE = 0.05
"""Above this share of boxes (and at least 2) that do not fit, the declaration is taken for wrong."""
_FAR_OUTSIDE = {"xyxy": 0.1, "xy": 0.1, "xywh": 0.02, "cxcywh": 0.02}
"""How far outside the image (in its sides) a box must reach not to fit. Wider for xyxy, where a
wrong format already shows in reversed corners and only a wrong frame is left to find."""
_LARGEST = 1e9
_LONGEST_ID = 1000
_MAX_ARRAY_BYTES = 64 << 20
_REMEDY = "fix the file or write it again"


class PredictionError(ValueError):
    """A file of predictions that cannot be scored. Names the file, the row, the value and the remedy."""


@dataclass(frozen=True, slots=True)
class Layout:
    """Which fields a row has, and what is known of its boxes from the layout alone."""

    id_field: str = "sample_id"
    box_field: str = "box"
    box_format: str | None = None
    frame: str | None = None
    format_field: str | None = None
    """A field in which each row declares its own format."""


LAYOUTS = {
    "ivt": Layout(),
    "refl4": Layout("id", "pred_bbox", frame="px", format_field="format"),
    "refadv": Layout("row_idx", "pred_box_xyxy_first", "xyxy", "px"),
}
"""Published layouts by name. ``refl4``: what Ref-L4's evaluator reads, a JSON array of ``id``, ``pred_bbox`` and
``format`` (xyxy or xywh). ``refadv``: the ``outputs/*_predictions.jsonl`` of Ref-Adv's repository, with the first box
in pixels, already clamped, and an empty list for an unreadable answer."""


@dataclass(frozen=True, slots=True)
class Prediction:
    """One row of a file."""

    row: int
    """1-based: the line, or the element of a JSON array."""
    sample_id: str
    numbers: Numbers | None
    """As in the file; None for a failed prediction: no four finite numbers, or four times 0 or -1."""
    box_format: str
    frame: str
    input_size: Numbers | None = None
    """(height, width) in pixels of what the model saw; with frame ``resized`` only."""


@dataclass(frozen=True, slots=True)
class PredictionFile:
    """What a file holds, checked row by row but not yet against a data set."""

    path: Path
    rows: tuple[Prediction, ...]

    @property
    def declared(self) -> str:
        """The declaration that was used, for example ``xyxy px``."""
        return ", ".join(sorted({f"{row.box_format} {row.frame}" for row in self.rows}))


@dataclass(frozen=True, slots=True)
class Matched:
    """Predictions in the order of the samples. Everything counted here but ``ignored`` is a miss."""

    boxes_px: Array
    """xyxy in pixels of the original images, shape (n, 4); a row of NaN where there is no box. Boxes
    without area are kept as they are: a rule may sort corners."""
    missing: int
    """Samples without a row."""
    parse_failures: int
    """Rows without four finite numbers, or with the mark of a failed prediction in their place: [0, 0, 0, 0] or
    [-1, -1, -1, -1]."""
    without_area: int
    """Boxes with x2 <= x1 or y2 <= y1."""
    ignored: int
    """Rows of no sample of the data set, left out on demand."""


def read_predictions(
    path: str | os.PathLike[str],
    layout: str = "ivt",
    *,
    box_format: str | None = None,
    frame: str | None = None,
    id_field: str | None = None,
    box_field: str | None = None,
) -> PredictionFile:
    """Read a file of predictions: JSON lines or a JSON array, UTF-8.

    ``layout`` is one of ``LAYOUTS``; ``id_field`` and ``box_field`` name fields where they are not the layout's.
    ``box_format`` (of ``FORMATS``) and ``frame`` (of ``FRAMES``, or N) are given where the caller declares them.
    A box that is null, not four finite numbers or [0, 0, 0, 0] is a parse failure, not an error; a file in which no
    box at all is four numbers is a PredictionError, as is an id that is there twice.
    """
    where = Path(path)
    if layout not in LAYOUTS:
        raise PredictionError(f"no layout {layout!r}; there are {', '.join(LAYOUTS)}")
    fields = LAYOUTS[layout]
    fields = replace(fields, id_field=id_field or fields.id_field, box_field=box_field or fields.box_field)
    rows = _objects(where)
    first = next(rows, None)
    fields = _spelt(fields, first)
    header = _header(first, fields, where) if first else {}
    if header:
        first = next(rows, None)
        fields = _spelt(fields, first)
    claims = {"": (box_format, frame), "the header line": (header.get("format"), header.get("frame"))}
    claims[f"the layout {layout}"] = fields.box_format, fields.frame
    if layout == "ivt" and first and "image" in first[1] and (beside := where.with_name("dataset.json")).is_file():
        own = read_declared(beside)
        claims[str(beside)] = own.box, own.frame
    declared_format = _agreed(where, "format", _format_of, {who or "--format": c for who, (c, _) in claims.items()})
    declared_frame = _agreed(where, "frame", _frame_of, {who or "--frame": c for who, (_, c) in claims.items()})
    if declared_format is None and fields.format_field is None:
        raise PredictionError(_undeclared(where, "format", FORMATS))
    if declared_frame is None:
        raise PredictionError(_undeclared(where, "frame", FRAMES))
    found: dict[str, Prediction] = {}
    unreadable: tuple[int, Any] | None = None
    # One row after the other: what else a row holds (all that a model wrote) is not kept.
    for number, row in [] if first is None else chain([first], rows):
        if "image" in row and "bbox" in row:
            row = {"id": str(number)} | row
        prediction = _row(where, number, row, fields, declared_format, declared_frame)
        value = row[fields.box_field]
        if prediction.numbers is None and unreadable is None and value not in (None, []) and not _is_mark(value):
            unreadable = number, value
        first_row = found.setdefault(prediction.sample_id, prediction).row
        if first_row != number:
            raise PredictionError(
                f"{where}: rows {first_row} and {number} both answer {short(prediction.sample_id)}; leave one answer "
                "per sample"
            )
    if not found:
        raise PredictionError(f"{where}: holds no predictions; write one JSON object per line")
    if unreadable and all(prediction.numbers is None for prediction in found.values()):
        count = 2 if next(iter(found.values())).box_format == "xy" else 4
        raise PredictionError(
            f"{where}: no row has {'two' if count == 2 else 'four'} numbers in {fields.box_field!r} (row "
            f"{unreadable[0]}: {short(unreadable[1])}); name the field of the box with --box-field, or write it as "
            f"[{', '.join(['number'] * count)}]"
        )
    return PredictionFile(where, tuple(found.values()))


def match(
    file: PredictionFile,
    samples: Sequence[Sample],
    *,
    missing: Literal["error", "miss"] = "error",
    extra: Literal["error", "ignore"] = "error",
    trust: bool = False,
) -> Matched:
    """Predictions in the order of the samples, in pixels of the original images.

    Args:
        file: what ``read_predictions`` gave.
        samples: n samples with unique ids.
        missing: ``error``, as Ref-L4's evaluator has it, or ``miss``: samples without a row are misses.
        extra: of rows whose id no sample has. Files over several splits need ``ignore``.
        trust: score even where many boxes contradict the declaration (``SUSPICIOUS_SHARE``).
    """
    index = {sample.sample_id: number for number, sample in enumerate(samples)}
    if len(index) != len(samples):
        raise PredictionError(f"{len(samples)} samples have {len(index)} ids: predictions cannot be told apart")
    known = [row for row in file.rows if row.sample_id in index]
    if extra == "error" or not known:  # all rows ignored would be a score of 0 over nothing
        _refuse_unknown(file, samples, index)
    if len(known) < len(samples) and missing == "error":
        answered = {row.sample_id for row in known}
        absent = [id_ for id_ in index if id_ not in answered]
        raise PredictionError(
            f"{file.path}: {len(absent)} of {len(samples)} samples have no prediction, the first {absent[0]!r}; add "
            "them (a null box is a counted miss), or give --missing miss to count them as misses"
        )
    answered_rows = [(row, samples[index[row.sample_id]]) for row in known if row.numbers is not None]
    if not trust:
        _refuse_misfit(file.path, answered_rows)
    boxes_px = np.full((len(samples), 4), np.nan)
    without_area = 0
    for row, sample in answered_rows:
        box = to_xyxy_px(row, sample)
        without_area += row.box_format != "xy" and not _has_area(box)
        boxes_px[index[row.sample_id]] = box
    return Matched(
        boxes_px,
        missing=len(samples) - len(known),
        parse_failures=len(known) - len(answered_rows),
        without_area=without_area,
        ignored=len(file.rows) - len(known),
    )


def to_xyxy_px(row: Prediction, sample: Sample) -> Numbers:
    """The box of a row as xyxy in pixels of the sample's original image, neither clamped nor rounded."""
    assert row.numbers is not None
    a, b, c, d = row.numbers
    height, width = sample.size
    if row.frame == "resized":
        assert row.input_size is not None
        scale_x, scale_y = width / row.input_size[1], height / row.input_size[0]
    else:
        unit = frame_unit(row.frame)
        scale_x, scale_y = (width / unit, height / unit) if unit else (1.0, 1.0)
    if row.box_format == "xywh":
        a, b, c, d = a, b, a + c, b + d
    elif row.box_format == "cxcywh":
        a, b, c, d = a - c / 2, b - d / 2, a + c / 2, b + d / 2
    return a * scale_x, b * scale_y, c * scale_x, d * scale_y


def _objects(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """The objects of a file with their row numbers from 1."""
    with reading(path, "give a file of predictions as JSON lines", PredictionError, "not UTF-8 text"):
        with path.open("rb") as file:
            is_array = file.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"[")
        for number, row in enumerate(_whole(path), 1) if is_array else _parsed_lines(path):
            if not isinstance(row, dict):
                raise PredictionError(f"{path}: row {number} is {short(row)}, not a JSON object; write one per line")
            yield number, row


def _parsed_lines(path: Path) -> Iterator[tuple[int, Any]]:
    is_first = True
    for number, line in json_lines(path):
        if line is None:
            raise PredictionError(
                f"{path}: row {number} is longer than {MAX_LINE_BYTES >> 20} MB, which no prediction is; write one "
                "JSON object per line"
            )
        text = line.decode("utf-8")
        try:
            row = json.loads(text)
        except (ValueError, RecursionError) as error:
            if is_first and text.startswith("{") and (spread := _spread(path)):
                raise PredictionError(f"{path}: {spread}") from error
            raise PredictionError(f"{path}: row {number} is no JSON: {short(text)} ({error}); {_REMEDY}") from error
        yield number, row
        is_first = False


def _whole(path: Path) -> Any:
    """A file that is one JSON value."""
    if (size := path.stat().st_size) > _MAX_ARRAY_BYTES:
        raise PredictionError(
            f"{path}: one JSON value of {size >> 20} MB, which would fill the memory (the limit is "
            f"{_MAX_ARRAY_BYTES >> 20} MB); write the predictions as JSON lines"
        )
    text = path.read_bytes().decode("utf-8-sig")
    with reading(path, _REMEDY, PredictionError, "not a whole JSON array"):
        found = json.loads(text)
    return found


def _spread(path: Path) -> str | None:
    """What to say of a file of objects that go over several lines; None where it is something else."""
    wanted = "what is scored is JSON lines, one prediction a line, or one JSON array of predictions"
    try:
        text = path.read_bytes()[:_MAX_ARRAY_BYTES].decode("utf-8-sig")
        value, end = json.JSONDecoder().raw_decode(text.lstrip())
    except (OSError, ValueError, RecursionError):
        return None
    if text.lstrip()[end:].strip():
        return f"holds JSON objects that go over several lines, and {wanted}; `jq -c .` writes each on one line"
    return f"is one JSON object over several lines, and {wanted}{_inner_list(value) or '; write it so'}"


def _inner_list(value: dict[str, Any]) -> str | None:
    """Where a list of objects inside an object may be the predictions that are meant."""
    for key, held in value.items():
        if isinstance(held, list) and held and isinstance(held[0], dict):
            return f": its {short(key)} is a list of {len(held)} objects; write that list to a file of its own"
    return None


def _spelt(fields: Layout, first: tuple[int, dict[str, Any]] | None) -> Layout:
    """``fields`` as a row writes them: ``id`` for ``sample_id``, ``bbox`` for ``box``."""
    row = first[1] if first else {}
    if fields.box_field == "box" and "box" not in row and "bbox" in row:
        fields = replace(fields, box_field="bbox")
    if fields.id_field == "sample_id" and "sample_id" not in row and ("id" in row or "image" in row):
        fields = replace(fields, id_field="id")
    return fields


def _header(first: tuple[int, dict[str, Any]], fields: Layout, path: Path) -> dict[str, Any]:
    """The declaration in the first row, or nothing where that is a prediction."""
    number, row = first
    if fields.id_field in row or fields.box_field in row or not row.keys() & {"format", "frame"}:
        return {}
    if unknown := sorted(row.keys() - {"format", "frame"}):
        raise PredictionError(
            f"{path}: row {number}, a header, has the unknown key {short(unknown[0])}; it takes format and frame"
        )
    return row


def _format_of(value: Any) -> str:
    if not isinstance(value, str) or value not in FORMATS:
        raise ValueError(f"choose one of {', '.join(FORMATS)}")
    return value


def _frame_of(value: Any) -> str:
    """A frame by its name; a whole number N as ``"N"``."""
    if value == "resized":
        return "resized"
    unit = frame_unit(value)
    return str(value) if unit is None or value in FRAMES else str(unit)


def _agreed(path: Path, what: str, check: Callable[[Any], str], claims: dict[str, Any]) -> str | None:
    """What all say who claim something, None without any claim."""
    made: list[tuple[str, str]] = []
    for who, value in claims.items():
        if value is None:
            continue
        try:
            made.append((check(value), who))
        except ValueError as error:
            raise PredictionError(f"{path}: {who} says {what} {short(value)}; {error}") from error
        if made[-1][0] != made[0][0]:
            raise PredictionError(
                f"{path}: {made[0][1]} says {what} {made[0][0]}, but {who} says {value}; find out which is true and "
                "correct the other"
            )
    return made[0][0] if made else None


def _undeclared(path: Path, what: str, choices: dict[str, str]) -> str:
    meanings = "; ".join(f"{name}: {meaning}" for name, meaning in choices.items())
    return (
        f"{path}: the {what} of the boxes is declared nowhere, and it is not guessed because a wrong guess looks like "
        f"a bad model. Give --{what} ({meanings}), or make the first line a header such as "
        '{"format": "xyxy", "frame": "px"}'
    )


def _row(
    path: Path, number: int, row: dict[str, Any], fields: Layout, declared_format: str | None, frame: str
) -> Prediction:
    here = f"{path}: row {number}"
    for field, option in ((fields.id_field, "--id-field"), (fields.box_field, "--box-field")):
        if field not in row:
            inner = _inner_list(row) or ""
            raise PredictionError(
                f"{here} has no field {field!r}, only {short(sorted(row))}; name it with {option}{inner}"
            )
    sample_id = row[fields.id_field]
    why = None
    if not isinstance(sample_id, str) and type(sample_id) is not int:  # bool is an int, and is no id
        why = f"is {short(sample_id)}, neither a text nor a whole number"
    elif len(str(sample_id)) > _LONGEST_ID:
        why = f"has {len(str(sample_id))} characters, too many for an id (at most {_LONGEST_ID})"
    if why:
        raise PredictionError(f"{here}: {fields.id_field} {why}; name the field of the id with --id-field")
    stated = row.get(fields.format_field or "format")
    known = isinstance(stated, str) and stated in FORMATS
    if fields.format_field is not None and not known:
        raise PredictionError(f"{here}: {fields.format_field} is {short(stated)}; each row of this layout declares it")
    if known and declared_format is not None and stated != declared_format:
        raise PredictionError(f"{here} says format {stated}, but {declared_format} is declared; correct one of them")
    box_format = declared_format or str(stated)
    stated = row.get("frame")
    if isinstance(stated, str) and stated in FRAMES and _frame_of(stated) != frame:
        raise PredictionError(f"{here} says frame {stated}, but {frame} is declared; correct one of them")
    value = row[fields.box_field]
    if box_format == "xy":  # a box without area, whose centre is the point
        value = value * 2 if isinstance(value, list) and len(value) == 2 else None
    numbers = None if _is_mark(value) else _numbers(value, 4, -_LARGEST, _LARGEST)
    size = None
    if frame == "resized" and numbers is not None:
        size = _numbers(row.get("input_size"), 2, 0, 1e6)
        if size is None:
            raise PredictionError(
                f"{here}: input_size is {short(row.get('input_size'))}, and frame resized needs [height, width] in "
                "pixels of the image that the model saw"
            )
    return Prediction(number, str(sample_id), numbers, box_format, frame, size)


def _numbers(value: Any, count: int, above: float, below: float) -> Numbers | None:
    """A list of so many numbers between two others, which NaN is not; None for anything else."""
    is_list = isinstance(value, list) and len(value) == count
    if not is_list or not all(type(v) in (int, float) and above < v < below for v in value):
        return None
    return tuple(map(float, value))


def _is_mark(value: Any) -> bool:
    """Whether a box is what evaluators write for a failed prediction: four times 0, or four times -1."""
    return isinstance(value, list) and len(value) == 4 and any(value.count(mark) == 4 for mark in (0, -1))


def _refuse_unknown(file: PredictionFile, samples: Sequence[Sample], index: dict[str, int]) -> None:
    unknown = [row for row in file.rows if row.sample_id not in index]
    if not unknown:
        return
    wanted = unknown[0].sample_id
    some = list(index)[:20_000]  # each comparison takes a while
    near = difflib.get_close_matches(wanted[:100], some, n=3, cutoff=0.5) or some[:3]
    served = f"{samples[0].dataset} {samples[0].split}" if samples else "the data set"
    raise PredictionError(
        f"{file.path}: {len(unknown)} of {len(file.rows)} rows have an id that {served} has not, the first is row "
        f"{unknown[0].row}: {short(wanted)}; ids there are like {', '.join(map(repr, near))}. Check data set and "
        "split, or give --extra ignore to leave these rows out"
    )


def _refuse_misfit(path: Path, rows: Sequence[tuple[Prediction, Sample]]) -> None:
    """Raise where more boxes than a bad model would give contradict the declaration."""
    numbers = {row.row: row.numbers for row, _ in rows if row.numbers is not None}
    # What has no area in any format tells nothing about the format.
    flat = {k for k, (a, b, c, d) in numbers.items() if not ((c > 0 and d > 0) or (c > a and d > b))}
    small = {k for k, box in numbers.items() if all(abs(value) <= 1 for value in box)}
    rows = [(row, sample) for row, sample in rows if row.row not in flat]
    checks: tuple[tuple[str, Callable[[Prediction, Sample], bool]], ...] = (
        (
            "have no area (x2 <= x1 or y2 <= y1)",
            lambda row, sample: row.box_format != "xy" and not _has_area(to_xyxy_px(row, sample)),
        ),
        ("reach far outside their image", lambda row, sample: _reach(row, sample) > _FAR_OUTSIDE[row.box_format]),
        ("lie within 0..1 in every number", lambda row, _: row.frame != "relative" and row.row in small),
    )
    for what, contradicts in checks:
        bad = [(row, sample) for row, sample in rows if contradicts(row, sample)]
        if len(bad) < 2 or len(bad) <= SUSPICIOUS_SHARE * len(rows):
            continue
        row, sample = bad[0]
        remedy = "probably another frame; declare it" if what.startswith("lie") else _better_format(rows)
        raise PredictionError(
            f"{path}: {len(bad)} of {len(rows)} boxes, read as {row.box_format} {row.frame}, {what}; the first is row "
            f"{row.row}, {list(numbers[row.row])} in an image {sample.size[1]} wide and {sample.size[0]} high. The "
            f"declaration looks wrong: {remedy}. If it is right all the same, give --trust-declaration"
        )


def _better_format(rows: Sequence[tuple[Prediction, Sample]]) -> str:
    """The format under which most boxes would fit, if nearly all do."""
    fitting = {}
    for name in (name for name in FORMATS if name != "xy"):
        read = [(replace(row, box_format=name), sample) for row, sample in rows]
        fits = [_has_area(to_xyxy_px(*one)) and _reach(*one) <= 0.02 for one in read]
        fitting[name] = sum(fits) / len(rows)
    best = max(fitting, key=lambda name: fitting[name])
    if fitting[best] > 1 - SUSPICIOUS_SHARE and any(row.box_format != best for row, _ in rows):
        return f"probably {best} ({FORMATS[best]}), under which {fitting[best]:.0%} would fit; declare it"
    return f"probably another frame ({', '.join(FRAMES)}) or format ({', '.join(FORMATS)}); declare it"


def _has_area(box: Numbers) -> bool:
    return box[2] > box[0] and box[3] > box[1]


def _reach(row: Prediction, sample: Sample) -> float:
    """How far the box leaves the image, in sides of the image; 0 or less inside."""
    x1, y1, x2, y2 = to_xyxy_px(row, sample)
    height, width = sample.size
    return max(-x1 / width, -y1 / height, x2 / width - 1, y2 / height - 1)
