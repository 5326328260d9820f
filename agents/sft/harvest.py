"""Has a model teacher write the traces of drafted demonstrations: cached, resumable, counted.

Each finished demonstration is appended to a file at once, so a run that is killed, that reaches its
cost cap or whose server goes away loses at most the request in flight, and the next run goes on.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path

from ivt_agents.play.chat import AnswerCache, ServedError
from ivt_agents.sft.demonstrations import Demonstration, load_demonstrations
from ivt_agents.sft.teacher.load import (
    QUESTION,
    SYSTEM,
    Teacher,
    TeacherError,
    TraceRequest,
    tidy,
    trace_request,
    unusable_reason,
)
from ivt_env.data.sample import Dataset
from ivt_env.failures import read_json
from ivt_env.files import write_whole

UNUSABLE_LIMIT = 0.2
"""More unusable texts than this share and the teacher is not fit for the work: an error."""
_UNUSABLE_AFTER = 20
"""The share is first looked at after this many texts."""

log = logging.getLogger(__name__)


def write_traces(
    drafts: Sequence[Demonstration],
    dataset: Dataset,
    teacher: Teacher,
    path: Path,
    cache: AnswerCache,
    on_progress: Callable[[int], None] | None = None,
) -> list[Demonstration]:
    """The drafts with the teacher's words; those it had no usable words for are left out.

    First answers and stops need no words of the teacher's, and in search scenes the words must say what is seen, not
    where the target is: these drafts stay as they are. ``path`` gets JSON lines one by one; what is there from an
    earlier run is kept, also after a ServedError. TeacherError for a file of another harvest, and for a share of
    unusable texts above ``UNUSABLE_LIMIT``. ``on_progress`` gets the number of drafts finished since the last call.
    """
    done = _begin(path, drafts, dataset, teacher)
    todo = [d for d in drafts if _key(d) not in done]
    if on_progress and done:
        on_progress(len(drafts) - len(todo))
    asked = unusable = 0
    with path.open("a", encoding="utf-8") as file:
        for start in range(0, len(todo), teacher.batch):
            some = todo[start : start + teacher.batch]
            try:
                texts = _texts(some, dataset, teacher, cache)
            except ServedError as error:
                raise type(error)(
                    f"{error}. {len(done)} of {len(drafts)} demonstrations are written and kept in {path}: run again "
                    f"to go on where it stopped, or train on them with --teacher template --demonstrations {path}"
                ) from error
            for draft, text in zip(some, texts, strict=True):
                if text is not None:
                    asked += 1
                    if why := unusable_reason(text):
                        unusable += 1
                        log.warning("%s on %s: text not used, it %s", teacher.name, draft.sample_id, why)
                        if asked >= _UNUSABLE_AFTER and unusable > UNUSABLE_LIMIT * asked:
                            raise TeacherError(
                                f"{unusable} of {asked} texts of {teacher.name} could not be used (limit"
                                f" {UNUSABLE_LIMIT:.0%}; reasons are logged): it is not fit for this; what could be"
                                f" used is in {path}"
                            )
                        continue
                    draft = replace(draft, trace=text)
                file.write(json.dumps(asdict(draft), allow_nan=False) + "\n")
                file.flush()
                done[_key(draft)] = draft
            if on_progress:
                on_progress(len(some))
    if unusable:
        log.warning("%s: %d of %d texts could not be used; their demonstrations are left out", path, unusable, asked)
    # In the drafts' order, however many runs it took.
    return [done[_key(d)] for d in drafts if _key(d) in done]


def _texts(drafts: Sequence[Demonstration], dataset: Dataset, teacher: Teacher, cache: AnswerCache) -> list[str | None]:
    """Tidied texts; None for a draft that needs no words."""
    asked: list[tuple[int, TraceRequest]] = []
    texts: list[str | None] = [None] * len(drafts)
    for k, draft in enumerate(drafts):
        search = dataset[draft.index].meta.get("kind") == "mark"
        if draft.trace and draft.shown is not None and draft.answer is not None and not search:
            request = trace_request(dataset, draft.index, draft.shown)
            if (stored := cache.get(request.key(teacher.name))) is None:
                asked.append((k, request))
            else:
                texts[k] = stored["text"]

    def keep(place: int, text: str) -> None:
        k, request = asked[place]
        cache.put(request.key(teacher.name), {"teacher": teacher.name, "text": text})
        texts[k] = text

    if asked:
        teacher.write([request for _, request in asked], keep)
    return [text if text is None else tidy(text) for text in texts]


def _begin(
    path: Path, drafts: Sequence[Demonstration], dataset: Dataset, teacher: Teacher
) -> dict[tuple[object, ...], Demonstration]:
    """What an earlier run has finished; refuses the file of another harvest."""
    head = path.with_suffix(".json")
    prompt = hashlib.sha256((SYSTEM + QUESTION).encode("utf-8")).hexdigest()[:16]
    mine = {"teacher": teacher.name, "prompt": prompt}
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        write_whole(head, json.dumps(mine) + "\n")
        return {}
    theirs = read_json(head, f"remove {path} and {head}", TeacherError) if head.exists() else None
    if theirs != mine:
        raise TeacherError(f"{path} was begun by {theirs}, not by {mine}: remove it, or choose another --out")
    content = path.read_bytes()
    with path.open("r+b") as file:  # what a killed run had half written is cut off
        file.truncate(content.rfind(b"\n") + 1)
    if not path.stat().st_size:
        return {}
    done = {_key(d): d for d in load_demonstrations(path, dataset)}
    if strange := set(done) - {_key(d) for d in drafts}:
        raise TeacherError(
            f"{path} holds {len(strange)} demonstrations that this run does not ask for (another seed, student or "
            "number of samples?): remove it, or choose another --out"
        )
    return done


def _key(demonstration: Demonstration) -> tuple[object, ...]:
    return demonstration.index, demonstration.shown, demonstration.answer
