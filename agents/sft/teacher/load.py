"""Model teachers by name, what every model teacher is shown and asked, and which of its answers can be used.

The teacher sees the image with the student's box (translucent red, as the student sees it) and the
target (green outline), and is told in words what geometry says is wrong, so that it cannot get left
and right wrong. Its words become the student's reasoning, so they must not name what only the
teacher sees, and they must not hold numbers: the answer's own coordinates follow them.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch

from ivt_agents.play.chat import Budget, ChatClient, Usage, user_turn
from ivt_agents.sft.teacher.template import critique
from ivt_agents.vlm.generation import generate
from ivt_agents.vlm.load import load_policy
from ivt_agents.vlm.prompts import Prompts
from ivt_agents.vlm.turns import WHOLE
from ivt_env.data.sample import Dataset
from ivt_env.rendering import Overlay, draw_overlay, place_on_canvas

SYSTEM = (
    "You review boxes that a student drew around objects in images. You write short corrective "
    "remarks that the student could have written while looking at its own box."
)

QUESTION = (
    'The expression is: "{expression}".\n'
    "The student's box is the translucent red rectangle. The object that the expression means is "
    "inside the green outline, which the student cannot see.\n"
    "Measured: {measured}\n"
    "In one or two short sentences say what is wrong with the red rectangle and how it must move or "
    "change its size. Refer to what is visible. Write plain English: no numbers, no coordinates, no "
    "JSON, no lists, and never mention the green outline."
)

IMAGE_SIDE = 768
"""Images are scaled down to this many pixels on the longer side: a box's error stays visible, and cost bounded."""

MAX_REPLY_TOKENS = 120
"""Two sentences; a longer text is cut off and too long to be used anyway."""

MAX_CHARACTERS = 300
"""Two sentences at most; longer text is an essay, or no remark at all."""

_TARGET = Overlay(style="outline", colour=(0, 220, 90), width=3)
_MARKUP = re.compile(r"[{}\[\]`|]|</?\w+>|bbox", re.IGNORECASE)
_NUMBER = re.compile(r"\d+\.\d+|\d{2,}|\d+\s*(?:%|px\b|pixels?\b|percent\b)|\(\s*\d+\s*,")
_WORD = re.compile(r"[^\W\d_]{2,}")
_REFUSAL = re.compile(
    r"\b(?:i(?:'m| am) (?:sorry|unable|not able)|i (?:can(?:'t|not| not)|won't)\b|as an ai\b|sorry\b)", re.IGNORECASE
)
_HIDDEN = re.compile(r"\bgreen (?:outline|box|rectangle|frame|border|line|area|region)\b", re.IGNORECASE)


class TeacherError(ValueError):
    """A teacher that cannot be used, or that is not fit for its work. Says why, and what to do."""


@dataclass(frozen=True, slots=True, eq=False)
class TraceRequest:
    """One remark to be written."""

    image: np.ndarray
    """RGB uint8 (height, width, 3), both boxes drawn."""
    question: str

    def key(self, teacher: str) -> str:
        """Hash of teacher, prompt and image: equal keys get equal answers from the cache."""
        digest = hashlib.sha256()
        for part in (teacher, SYSTEM, self.question, str(self.image.shape)):
            digest.update(part.encode("utf-8") + b"\x00")
        digest.update(np.ascontiguousarray(self.image).tobytes())
        return digest.hexdigest()


def trace_request(dataset: Dataset, index: int, shown: tuple[float, float, float, float]) -> TraceRequest:
    """The request for a remark on the box ``shown`` on sample ``index``."""
    sample = dataset[index]
    image = dataset.image(sample)
    side = min(IMAGE_SIDE, max(image.shape[:2]))
    canvas, extent = place_on_canvas(image, side)
    draw_overlay(canvas, extent, shown, Overlay())
    draw_overlay(canvas, extent, sample.box, _TARGET)
    measured = critique(shown, sample.box, sample.siblings)
    # str.replace, not str.format: an expression may hold braces. The expression goes in last.
    question = QUESTION.replace("{measured}", measured).replace("{expression}", sample.expression)
    return TraceRequest(canvas[: extent[0], : extent[1]], question)


def tidy(text: str) -> str:
    """One line without the quotation marks that models like to put around an answer."""
    line = " ".join(text.split())
    return line[1:-1].strip() if len(line) > 1 and line[0] == line[-1] and line[0] in "\"'" else line


def unusable_reason(text: str) -> str | None:
    """Why a tidied text cannot become a trace; None: it can."""
    if not text:
        return "empty"
    if len(text) > MAX_CHARACTERS:
        return f"longer than {MAX_CHARACTERS} characters"
    for pattern, why in (
        (_MARKUP, "holds JSON or markup"),
        (_NUMBER, "holds coordinates or other numbers"),
        (_REFUSAL, "is a refusal"),
        (_HIDDEN, "names the green outline, which the student cannot see"),
    ):
        if found := pattern.search(text):
            return f"{why} ({found[0]!r})"
    return None if len(_WORD.findall(text)) >= 3 else f"holds no sentence ({text!r})"


class ServedTeacher:
    """The ``openai:`` teacher: any server that speaks chat completions with images.

    ``name`` says who wrote a trace and is part of the cache's key; ``batch`` requests are given to it at once.
    """

    def __init__(self, client: ChatClient) -> None:
        self._client, self.name, self.batch = client, client.name, client.concurrency

    def write(self, requests: Sequence[TraceRequest], keep: Callable[[int, str], None]) -> None:
        """Call ``keep`` with the place of each request and its text, unchecked, as soon as it is there.

        As many requests at a time as the client sends; ``keep`` is called in its threads.
        """
        self._client.run([partial(self._write, k, request, keep) for k, request in enumerate(requests)])

    def _write(self, place: int, request: TraceRequest, keep: Callable[[int, str], None]) -> None:
        messages = [{"role": "system", "content": SYSTEM}, user_turn(request.question, [request.image])]
        body = {"messages": messages, "temperature": 0, "max_tokens": MAX_REPLY_TOKENS}
        keep(place, self._client.ask(body).text)


class HFTeacher:
    """Writes remarks greedily with a local model: ``tiny``, a folder, or a hub name."""

    batch = 16

    def __init__(self, model: str) -> None:
        """Load ``model``, named as ``load_policy`` takes it."""
        dtype = torch.bfloat16 if torch.cuda.is_available() else torch.float32
        self.name = f"hf:{model}"
        self._policy = load_policy(model, dtype=dtype, max_new_tokens=MAX_REPLY_TOKENS)
        self._policy.model.eval()
        # The policy's own question would ask for a box.
        self._policy.dialogue.prompts = Prompts("{expression}")

    def write(self, requests: Sequence[TraceRequest], keep: Callable[[int, str], None]) -> None:
        """One text per request; empty where the model did not come to an end."""
        policy = self._policy
        images = policy.dialogue.process([r.image for r in requests])
        prompts = [
            policy.dialogue.prompt(f"{SYSTEM}\n\n{r.question}", None, [(image, WHOLE)])
            for r, image in zip(requests, images, strict=True)
        ]
        turns = generate(policy.core, prompts, policy.sampling, policy.generator, keep=False)
        for place, turn in enumerate(turns):
            keep(place, policy.text(turn) if turn.finished else "")


Teacher = ServedTeacher | HFTeacher


def load_teacher(name: str, budget: Budget | None = None) -> Teacher:
    """The teacher called ``name``: ``hf:<model>`` or ``openai:<base url>[#<model>]``, which may cost ``budget``.

    A served model has answered one small request by then.
    The template is not a ``Teacher``: it looks at numbers, not at images, and never fails.
    """
    kind, _, rest = name.partition(":")
    if kind == "openai" and rest:
        client = ChatClient(rest, Usage(replace(budget or Budget(), options="--teacher-max")))
        client.check()
        return ServedTeacher(client)
    if kind == "hf" and rest:
        return HFTeacher(rest)
    raise TeacherError(f"teacher {name!r}: choose template, hf:MODEL or openai:BASE_URL[#MODEL]")
