"""Teachers by name."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from ivt_agents.sft.teacher.openai import Budget, OpenAITeacher, TeacherError
from ivt_agents.sft.teacher.prompts import TraceRequest


class Teacher(Protocol):
    """Writes remarks on students' boxes."""

    name: str
    """Says who wrote a trace; part of the cache's key."""
    batch: int
    """How many requests it likes to be given at once."""

    def write(self, requests: Sequence[TraceRequest]) -> list[str]:
        """One text per request, unchecked."""
        ...


def load_teacher(name: str, budget: Budget | None = None) -> Teacher:
    """The teacher called ``name``: ``hf:<model>`` or ``openai:<base url>[#<model>]``, which may cost ``budget``.

    A served model has answered one small request by then.
    The template is not a ``Teacher``: it looks at numbers, not at images, and never fails.
    """
    kind, _, rest = name.partition(":")
    if kind == "openai" and rest:
        served = OpenAITeacher(rest, budget)
        served.check()
        return served
    if kind == "hf" and rest:
        from ivt_agents.sft.teacher.hf import HFTeacher

        return HFTeacher(rest)
    raise TeacherError(f"teacher {name!r}: choose template, hf:MODEL or openai:BASE_URL[#MODEL]")
